"""Sources, independent units and splits: disjoint to the paragraph, seeded, and clear when the text is too little."""

import dataclasses
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec.errors import ConfigError, DataError
from lowprec.records import from_json, to_json
from lowprec.steps import sources
from lowprec.steps.data import DataSummary, Encoder, Splits, SplitSizes, encoder_of, split
from lowprec.steps.sources import Document, cut_text, paragraphs, read_sources
from lowprec.steps.tokens import TokenSet
from lowprec.steps.units import BOILERPLATE_DOCUMENTS, TRIVIAL_CHARACTERS, find_units, paragraph_keys

BOS = 1
SMALL = SplitSizes(calibration=300, tuning=200, held_out=300, looks=2, window=64)


class Words:
    """A tokenizer whose tokens are words; BOS first by default, as many families have it."""

    def __init__(self, bos: bool = True) -> None:
        self.bos = bos

    def __call__(self, text: Any, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [self(t, add_special_tokens)["input_ids"] for t in text]}
        ids = [2 + zlib.crc32(word.encode()) % 50_000 for word in text.split()]
        return {"input_ids": [BOS] * (self.bos and add_special_tokens) + ids}


def paragraph(number: int, words: int = 24) -> str:
    return " ".join(f"w{number}x{i}" for i in range(words))


def corpus(documents: int = 40, length: int = 4, source: str = "a") -> list[Document]:
    return [
        Document(source=source, name=str(i), text="\n\n".join(paragraph(hash_of(source, i, j)) for j in range(length)))
        for i in range(documents)
    ]


def hash_of(*parts: object) -> int:
    return zlib.crc32(repr(parts).encode())


def test_documents_that_share_a_paragraph_are_one_unit_over_any_chain() -> None:
    texts = [[0, 1], [1, 2], [2, 3], [4], [5, 6]]
    documents = [Document(source="a", text="\n\n".join(map(paragraph, t)), name=str(i)) for i, t in enumerate(texts)]
    units = find_units(documents)
    assert [[d.name for d in unit] for unit in units.members] == [["0", "1", "2"], ["3"], ["4"]]


def test_sharing_is_seen_through_case_and_wrapping_and_lines_of_unwrapped_text() -> None:
    long = paragraph(1, 60)
    assert paragraph_keys("One two\n  THREE four five six seven eight nine ten")[0][1] is not None
    a, b = "One two\n  THREE four five six seven eight nine ten", "one TWO three four\nfive six seven eight nine ten"
    assert paragraph_keys(a)[0][1] == paragraph_keys(b)[0][1]
    unwrapped = find_units(
        [Document(source="a", text=f"{long}\n{paragraph(2)}"), Document(source="a", text=f"{paragraph(3)}\n{long}")]
    )
    assert len(unwrapped.members) == 1


def test_trivial_paragraphs_link_nothing_and_boilerplate_is_taken_out() -> None:
    heading, licence = "Parameters\n----------", paragraph(999)
    assert len(heading) < TRIVIAL_CHARACTERS
    texts = [f"{heading}\n\n{licence}\n\n{paragraph(i)}" for i in range(BOILERPLATE_DOCUMENTS + 1)]
    units = find_units([Document(source="a", text=text) for text in texts])
    assert len(units.members) == len(texts)
    assert units.boilerplate_paragraphs == 1
    assert all("w999x0" not in d.text and heading in d.text for unit in units.members for d in unit)
    fewer = find_units([Document(source="a", text=text) for text in texts[:-1]])
    assert len(fewer.members) == 1
    assert fewer.boilerplate_paragraphs == 0


def test_exact_duplicates_are_dropped() -> None:
    documents = [*corpus(3), Document(source="b", text=corpus(3)[1].text.upper())]
    units = find_units(documents)
    assert units.duplicate_documents == 1
    assert [unit[0].source for unit in units.members] == ["a", "a", "a"]


def window_paragraphs(tokens: TokenSet, owners: dict[int, set[int]]) -> set[int]:
    """Numbers of the paragraphs of which a word stands in the set."""
    return {number for ids in tokens.ids for i in ids.tolist() for number in owners.get(i, ())}


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(0, 120), min_size=1, max_size=6), min_size=30, max_size=80),
    seed=st.integers(0, 2**31),
    split_over=st.integers(1, 3),
)
def test_splits_are_disjoint_to_the_paragraph(texts: list[list[int]], seed: int, split_over: int) -> None:
    documents = [
        Document(source=f"s{i % split_over}", name=str(i), text="\n\n".join(map(paragraph, numbers)))
        for i, numbers in enumerate(texts)
    ]
    sizes = SplitSizes(calibration=90, tuning=60, held_out=90, looks=2, window=48)
    words = {f"w{n}x{i}": n for n in range(121) for i in range(24)}
    numbering = {word: i + 2 for i, word in enumerate(words)}
    encoder = Encoder(encode=lambda batch: [[numbering[w] for w in text.split()] for text in batch], prefix=(BOS,))
    owners = {numbering[word]: {n} for word, n in words.items()}
    try:
        splits = split(documents, encoder, sizes, seed)
    except DataError:
        return  # hypothesis may glue everything into one unit
    sets = [splits.calibration, splits.tuning, *splits.held_out]
    for i, first in enumerate(sets):
        for second in sets[i + 1 :]:
            assert not window_paragraphs(first, owners) & window_paragraphs(second, owners)
            assert not set(first.units) & set(second.units)
    assert all(32 <= len(ids) <= 48 and ids[0] == BOS for s in sets for ids in s.ids)
    again = split(documents, encoder, sizes, seed)
    assert to_json(again.summary) == to_json(splits.summary)


def made(seed: int = 0, bos: bool = True, sizes: SplitSizes = SMALL) -> Splits:
    return split([*corpus(60, 4, "a"), *corpus(30, 4, "b")], Words(bos), sizes, seed)


def test_splits_hold_what_was_wanted_of_every_source_in_proportion() -> None:
    splits = made()
    for summary in splits.summary.sets:
        assert summary.wanted_tokens <= summary.tokens <= summary.wanted_tokens + 2 * SMALL.window
        shares = {name: tokens / summary.tokens for name, _, tokens in summary.per_source}
        assert shares["a"] == pytest.approx(2 / 3, abs=0.2)
    assert splits.summary.notes == ()
    assert [s.name for s in splits.summary.sets] == ["calibration", "tuning", "held-out 1", "held-out 2"]
    assert from_json(DataSummary, to_json(splits.summary)) == splits.summary


def test_the_seed_decides() -> None:
    assert made(1).calibration.digest == made(1).calibration.digest
    assert made(1).calibration.digest != made(2).calibration.digest


def test_one_long_unit_does_not_crowd_out_the_others() -> None:
    documents = [*corpus(60), *corpus(1, 200, "a")]
    splits = split(documents, Words(), SMALL)
    for s in (splits.calibration, splits.tuning, *splits.held_out):
        held = [sum(len(ids) for ids, u in zip(s.ids, s.units, strict=True) if u == unit) for unit in set(s.units)]
        assert max(held) <= 2 * 64
        assert len(held) >= 3


def test_windows_follow_the_tokenizers_own_default() -> None:
    assert encoder_of(Words()).prefix == (BOS,)
    assert encoder_of(Words(bos=False)).prefix == ()
    assert all(ids[0] == BOS for ids in made().tuning.ids)
    assert all(BOS not in ids for ids in made(bos=False).tuning.ids)


def test_batches_hold_every_window_once_padded_on_the_right() -> None:
    tokens = made().calibration
    batches = tokens.batches(200, pad=7)
    assert sorted(i for batch in batches for i in batch.index) == list(range(len(tokens)))
    for batch in batches:
        assert batch.ids.numel() <= 200
        for row, i in enumerate(batch.index):
            length = int(batch.lengths[row])
            assert torch.equal(batch.ids[row, :length], tokens.ids[i])
            assert (batch.ids[row, length:] == 7).all()
        assert torch.equal(batch.mask().sum(1), batch.lengths)
    assert len(tokens.batches(1)) == len(tokens)
    lengths = [int(n) for batch in batches for n in batch.lengths]
    assert lengths == sorted(lengths)


def test_subset_takes_whole_windows_of_all_sources() -> None:
    tokens = made(sizes=SplitSizes(calibration=1500, tuning=300, held_out=500, window=64)).calibration
    part = tokens.subset(500)
    assert part.ids == tokens.ids[: len(part)]
    assert 500 <= part.tokens < 500 + 64
    assert set(part.sources) == {0, 1}
    assert tokens.subset(10**9).tokens == tokens.tokens
    assert part.digest != tokens.digest


def test_too_little_text_first_gives_up_looks_then_size_then_says_what_is_needed() -> None:
    one_look = made(sizes=SplitSizes(calibration=2500, tuning=1200, held_out=3500, window=64))
    assert len(one_look.held_out) == 1
    assert "the judge has 1" in one_look.summary.notes[0]
    smaller = made(sizes=SplitSizes(calibration=3000, tuning=2600, held_out=4000, window=64))
    assert any("% of the wanted tokens" in note for note in smaller.summary.notes)
    assert smaller.tuning.tokens < 2600
    with pytest.raises(DataError, match=r"too little text: \d+ tokens in 90 independent units.*97810 .*--data"):
        made(sizes=SplitSizes())
    with pytest.raises(DataError, match="1 independent units"):
        split(corpus(1, 200), Words(), SMALL)
    with pytest.raises(DataError, match=r"0 tokens in 0 .* \(1 more, in pieces of fewer than 32,"):
        split([Document(source="a", text="short")], Words(), SMALL)


def test_more_text_grows_tuning_and_held_out_and_leaves_calibration_as_it_is() -> None:
    usual, grown = made(), made(sizes=dataclasses.replace(SMALL, growth=2.0))
    assert grown.calibration.digest == usual.calibration.digest
    assert 2 * SMALL.tuning <= grown.tuning.tokens <= 2 * SMALL.tuning + 2 * SMALL.window
    assert [2 * SMALL.held_out <= look.tokens for look in grown.held_out] == [True, True]
    assert set(grown.tuning.units) >= set(usual.tuning.units)


def test_where_looks_cannot_grow_they_become_one() -> None:
    sizes = SplitSizes(calibration=1500, tuning=800, held_out=1500, window=64)
    usual, grown = made(sizes=sizes), made(sizes=dataclasses.replace(sizes, growth=10.0))
    assert [len(usual.held_out), len(grown.held_out)] == [2, 1]
    looks = [set(look.units) for look in usual.held_out]
    assert set(grown.held_out[0].units) == looks[0] | looks[1]
    assert grown.held_out[0].tokens >= sum(look.tokens for look in usual.held_out)
    assert not set(grown.held_out[0].units) & {*grown.calibration.units, *grown.tuning.units}
    assert f"the judge looks once, at {grown.held_out[0].tokens} tokens" in grown.summary.notes[-1]
    with pytest.raises(ConfigError, match=r"grow 0\.5 times: give 1 or more"):
        dataclasses.replace(sizes, growth=0.5)


def test_text_files_are_cut_at_blank_lines(tmp_path: Path) -> None:
    text = "\n\n".join(paragraph(i) for i in range(200))
    parts = list(cut_text(text, 1000))
    assert [p for part in parts for p in paragraphs(part)] == paragraphs(text)
    assert all(1000 <= len(part) < 1500 for part in parts[:-1])
    unbroken = "word " * 5000
    assert all(len(part) <= 8_000 for part in cut_text(unbroken))
    assert "".join(cut_text(unbroken)).replace(" ", "") == unbroken.replace(" ", "")
    (tmp_path / "book.txt").write_text(text.replace("\n", "\r\n"))
    found = read_sources([tmp_path / "book.txt"])
    assert {d.source for d in found} == {"book.txt"}
    assert len(read_sources([tmp_path / "book.txt"], characters=1)) == 1 < len(found)


def test_jsonl_takes_text_or_the_first_string(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1, "title": "no", "text": "yes"}\n\n{"n": 2, "body": "first"}\n')
    assert [(d.text, d.name) for d in read_sources([path])] == [("yes", "line 1"), ("first", "line 3")]
    for line, message in [("{", "line 1 is not JSON"), ("[1]", "is a list"), ('{"n": 1}', "no string field")]:
        path.write_text(line)
        with pytest.raises(DataError, match=message):
            read_sources([path])


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"id": [1, 2], "body": ["one", None]}), path)
    assert [d.text for d in read_sources([path])] == ["one"]
    parquet.write_table(arrow.table({"id": [1, 2]}), path)
    with pytest.raises(DataError, match="no string column"):
        read_sources([path])
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match="no readable Parquet"):
        read_sources([path])


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")

    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(sources.importlib, "import_module", missing)
    for item in (tmp_path / "a.parquet", "owner/name"):
        with pytest.raises(ConfigError, match=r"pip install 'lowprec\[data\]'"):
            read_sources([item])


def test_a_data_sets_name_goes_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Fake:
        @staticmethod
        def load_dataset(*arguments: Any, **options: Any) -> list[dict[str, str]]:
            asked.append((arguments, options))
            return [{"text": "one"}, {"text": "two"}]

    monkeypatch.setattr(sources, "_optional", lambda name, purpose: Fake)
    assert [d.text for d in read_sources(["owner/name:config:test"])] == ["one", "two"]
    assert asked == [(("owner/name", "config"), {"split": "test", "streaming": True})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n \n", "holds no text"),
        ("latin.txt", "caf\xe9 au lait".encode("latin-1"), r"not UTF-8 \(byte 3\).*iconv"),
        ("zero.txt", b"a\0b", "binary"),
        ("table.csv", b"a,b", ".csv files are not read"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((DataError, ConfigError), match=message):
        read_sources([tmp_path / name])


def test_missing_files_folders_and_repetitions_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"there is no file nowhere\.txt; check the path"):
        read_sources(["nowhere.txt"])
    with pytest.raises(DataError, match="is a folder"):
        read_sources([tmp_path])
    with pytest.raises(ConfigError, match="twice"):
        read_sources([tmp_path / "a.txt", str(tmp_path / ".." / tmp_path.name / "a.txt")])


def test_files_of_one_name_keep_apart(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(f"text of {folder}")
    found = read_sources([tmp_path / "x" / "a.txt", tmp_path / "y" / "a.txt"])
    assert len({d.source for d in found}) == 2


def test_the_offline_default_is_two_sources_large_enough_and_the_same_every_time() -> None:
    documents = read_sources()
    assert {d.source for d in documents} == {"python-topics", "docstrings"}
    # The wanted tokens of the default splits at a generous 5 characters a token.
    assert sum(len(d.text) for d in documents) > 5 * SplitSizes().total(2)
    assert len(find_units(documents).members) > 150
    again = list(sources._package_docstrings("numpy"))
    assert [(d.name, d.text) for d in documents if d.name.startswith("numpy/")] == again


def test_sets_are_divided_and_cut_without_losing_their_units() -> None:
    data = TokenSet(
        ids=(torch.arange(10), torch.arange(4), torch.arange(25)),
        units=(1, 2, 3),
        sources=(0, 0, 0),
        documents=("a", "b", "c"),
        source_names=("s",),
    )
    assert data.after(1).units == (2, 3)
    cut = data.cut(10)
    assert [(u, len(ids)) for u, ids in zip(cut.units, cut.ids, strict=True)] == [(1, 10), (2, 4), (3, 10), (3, 10)]
    assert torch.equal(cut.ids[3], torch.arange(10, 20))
    framed = dataclasses.replace(data, prefix=(0,), suffix=(24,)).cut(10)
    assert framed.ids[-1].tolist() == [0, *range(9, 17), 24], "special tokens stand around every piece"
    assert len(data.subset(11)) == 2
