"""Where text comes from: files, `datasets` names, and two offline sources that every installation has.

A source gives documents. What a record is in JSONL, Parquet or a dataset is a document; a plain text file is cut at its
blank lines into documents of about `DOCUMENT_CHARACTERS`, which treats neighbouring pages of one book as independent:
give many short files or JSONL where that matters. Whether documents share text is found out later (`steps.data`).

The offline default is two sources: `pydoc_data.topics` of CPython (the language reference, one document per topic) and
the documentation strings of the standard library and of packages that are installed anyway (one document per module,
read with `ast`, nothing is imported). Modules are taken in the order of a hash of their names, so that a bounded volume
is spread over a package; the volume, not the clock, bounds the work, so two runs read the same text.

Left out: compressed text, CSV, folders, and reading more than the first `characters` of a large source.
"""

import ast
import hashlib
import importlib
import importlib.util
import json
import os
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowprec.errors import ConfigError, DataError

DOCUMENT_CHARACTERS = 4_000
DEFAULT_CHARACTERS = 4_000_000
TOPICS = "python-topics"
DOCSTRINGS = "docstrings"

_BLANK = re.compile(r"\n[^\S\n]*\n\s*")
_PACKAGES = ("stdlib", "numpy", "scipy", "torch", "transformers")
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "testing", "__pycache__", "idlelib", "lib2to3"}
)
_PACKAGE_CHARACTERS = 240_000
_PACKAGE_SOURCE_CHARACTERS = 2_500_000
_MODULE_CHARACTERS = (800, 8_000)
_DOCSTRING_CHARACTERS = 240
_CHARACTERS_PER_QUOTE = 800
_TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".rst"})
_JSON_SUFFIXES = frozenset({".jsonl", ".ndjson", ".json"})
_REFUSED_SUFFIXES = frozenset({".gz", ".zst", ".zip", ".csv", ".tsv", ".pkl", ".pickle", ".pt"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text of one source; `name` says which in messages."""

    source: str
    text: str
    name: str = ""


def read_sources(data: Sequence[str | Path] = (), characters: int = DEFAULT_CHARACTERS) -> tuple[Document, ...]:
    """Reads the documents of every source named in `data`; none named is the offline default.

    Args:
        data: paths of text, JSONL or Parquet files, names of `datasets` as NAME[:CONFIG[:SPLIT]], "python-topics" or
            "docstrings".
        characters: at most about so many are read in all, the same number from each source, from its beginning.

    Raises:
        DataError: a source is missing, unreadable, damaged or empty.
        ConfigError: a source of a kind that is not supported, named twice, or whose optional package is not installed.
    """
    named = [str(item) for item in data] or [TOPICS, DOCSTRINGS]
    if len({_identity(item) for item in named}) < len(named):
        raise ConfigError(f"--data names a source twice: {', '.join(named)}; name each once")
    labels = _labels(named)
    documents: list[Document] = []
    for item, label in zip(named, labels, strict=True):
        found = list(_limited(_reader(item)(item), characters // len(named), label))
        if not found:
            raise DataError(f"{item} holds no text; calibration needs many thousand tokens: give another file")
        documents.extend(found)
    return tuple(documents)


def cut_text(text: str, size: int = DOCUMENT_CHARACTERS) -> Iterator[str]:
    """Cuts a text at blank lines into documents of at least `size` characters (the last may be shorter).

    A paragraph longer than twice that is first cut at line ends, or at blanks where a line is that long.
    """
    held: list[str] = []
    for paragraph in paragraphs(text):
        for piece in _pieces(paragraph, 2 * size):
            held.append(piece)
            if sum(map(len, held)) >= size:
                yield "\n\n".join(held)
                held = []
    if held:
        yield "\n\n".join(held)


def paragraphs(text: str) -> list[str]:
    """The non-empty pieces between blank lines."""
    return [piece for piece in _BLANK.split(text.replace("\r\n", "\n").strip()) if piece.strip()]


def _pieces(paragraph: str, size: int) -> Iterator[str]:
    while len(paragraph) > size:
        at = max(paragraph.rfind("\n", size // 2, size), 0) or max(paragraph.rfind(" ", size // 2, size), 0) or size
        yield paragraph[:at]
        paragraph = paragraph[at:].lstrip()
    if paragraph:
        yield paragraph


def _limited(texts: Iterable[tuple[str, str]], characters: int, source: str) -> Iterator[Document]:
    read = 0
    for name, text in texts:
        if read >= characters:
            return
        if text.strip():
            read += len(text)
            yield Document(source=source, text=text, name=name)


def _identity(item: str) -> str:
    path = Path(item).expanduser()
    return str(path.resolve()) if path.exists() else item


def _labels(named: list[str]) -> list[str]:
    """The file name of a path, the whole of a data set's name; the path where two files have one name."""
    short = [Path(item).name if Path(item).expanduser().exists() else item for item in named]
    return [item if short.count(name) > 1 else name for item, name in zip(named, short, strict=True)]


def _reader(item: str) -> Callable[[str], Iterator[tuple[str, str]]]:
    """The function that reads `item`: by its built-in name, by the file's suffix, else as a data set's name."""
    if item in (TOPICS, DOCSTRINGS):
        return {TOPICS: _topics, DOCSTRINGS: _docstrings}[item]
    path = Path(item).expanduser()
    suffix = path.suffix.lower()
    if suffix in _REFUSED_SUFFIXES:
        raise ConfigError(f"--data {item}: {suffix} files are not read; give text, JSONL or Parquet")
    if path.is_dir():
        raise DataError(f"{item} is a folder; name the text, JSONL or Parquet files in it one by one")
    if path.is_file():
        if suffix == ".parquet":
            return _parquet
        return _jsonl if suffix in _JSON_SUFFIXES else _text
    if suffix in _TEXT_SUFFIXES | _JSON_SUFFIXES | {".parquet"} or item.startswith(("/", ".", "~")):
        raise DataError(f"there is no file {item}; check the path (relative ones start at {Path.cwd()})")
    return _dataset


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start}); convert it, for example with "
            f"`iconv -f LATIN1 -t UTF-8 {path.name}`"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
    if "\0" in text:
        raise DataError(f"{path} is binary (a zero byte at character {text.index(chr(0))}); give a text file")
    return text


def _text(item: str) -> Iterator[tuple[str, str]]:
    for number, text in enumerate(cut_text(_read_text(Path(item).expanduser()))):
        yield f"part {number + 1}", text


def _jsonl(item: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_read_text(Path(item).expanduser()).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{item}, line {number} is not JSON ({error.msg}); give one object per line") from error
        yield f"line {number}", _text_of(record, f"{item}, line {number}")


def _text_of(record: Any, place: str) -> str:
    """The field `text` of a record, else its first string field."""
    if not isinstance(record, dict):
        raise DataError(f'{place} is a {type(record).__name__}, not an object such as {{"text": "..."}}')
    if isinstance(record.get("text"), str):
        return str(record["text"])
    for value in record.values():
        if isinstance(value, str):
            return value
    raise DataError(f"{place} has no string field (it has {', '.join(map(repr, record)) or 'none'}); name one `text`")


def _optional(name: str, purpose: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{purpose} needs {name}: pip install 'lowprec[data]'") from error


def _parquet(item: str) -> Iterator[tuple[str, str]]:
    arrow = _optional("pyarrow", f"reading {item}")
    parquet = _optional("pyarrow.parquet", f"reading {item}")
    try:
        with parquet.ParquetFile(Path(item).expanduser()) as file:
            schema = file.schema_arrow
            texts = [f.name for f in schema if arrow.types.is_string(f.type) or arrow.types.is_large_string(f.type)]
            if not texts:
                raise DataError(f"{item} has no string column (it has {', '.join(schema.names)}); name one `text`")
            column = "text" if "text" in texts else texts[0]
            number = 0
            for batch in file.iter_batches(columns=[column], batch_size=256):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield f"row {number}", value or ""
    except (arrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{item} is no readable Parquet file ({error}); write it again") from error


def _dataset(item: str) -> Iterator[tuple[str, str]]:
    name, config, split = [*item.split(":"), "", ""][:3]
    if item.count(":") > 2 or not name:
        raise ConfigError(f"--data {item}: a data set is named NAME[:CONFIG[:SPLIT]]; a file needs its path")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise DataError(f"there is no file {item}, and a data set's name has the form OWNER/NAME[:CONFIG[:SPLIT]]")
    datasets = _optional("datasets", f"{item} is no file; reading it as a data set")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield f"row {number}", _text_of(row, f"{item}, row {number}")
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{item} is no file, and as a data set it cannot be read: {error}") from error


def _topics(_: str) -> Iterator[tuple[str, str]]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    yield from sorted(topics.items())


def _docstrings(_: str) -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        yield from _package_docstrings(package)


def _package_docstrings(package: str) -> Iterator[tuple[str, str]]:
    """One (module, text) per module of a package, until the package has given its share or enough was parsed."""
    folder = _package_folder(package)
    if folder is None:
        return
    given = parsed = 0
    for name in sorted(_modules(folder), key=lambda m: hashlib.sha256(m.encode()).digest()):
        if given >= _PACKAGE_CHARACTERS or parsed >= _PACKAGE_SOURCE_CHARACTERS:
            return
        code = (folder / name).read_text(encoding="utf-8", errors="replace")
        # Parsing is what costs time: a file with few triple quotes for its length would give little text.
        if code.count('"""') * _CHARACTERS_PER_QUOTE < len(code):
            continue
        parsed += len(code)
        text = _docstrings_of(code)
        if len(text) >= _MODULE_CHARACTERS[0]:
            given += len(text)
            yield f"{package}/{name}", text


def _package_folder(package: str) -> Path | None:
    if package == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _modules(folder: Path) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        for name in files:
            if name.endswith(".py"):
                yield (Path(place) / name).relative_to(folder).as_posix()


def _docstrings_of(code: str) -> str:
    """The documentation strings of a module of decent length, each once, up to the most that one module may give."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of others' code; as an error it would change what is read
            tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return ""  # templates and files for another Python version are in every installation
    found: dict[str, None] = {}
    length = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None and len(text) >= _DOCSTRING_CHARACTERS and text not in found:
                found[text] = None
                length += len(text)
                if length >= _MODULE_CHARACTERS[1]:
                    break
    return "\n\n".join(found)
