"""Documents to calibration, tuning and held-out windows that share no paragraph.

Units (`steps.units`), not windows, are dealt to the splits and resampled by the judge.

Splits. Within each source the units are dealt in a seeded order, large ones first (by powers of two), each to the split
that lacks most. A split then takes one window of each of its units, then a second of each, ..., until it has its share
of the source: as many units as there are speak, and a long one speaks no longer than it must. For the same reason a
unit counts in the dealing with no more tokens than each must give for the text to suffice (`_cap`). Windows of all
sources alternate, so that the beginning of a set is a smaller set of the same make-up (`subset`).

More text. With `growth` the tuning and held-out splits take more of the windows of their units, as far as there are
any; which unit belongs to which split, and the calibration text, stay the same. Where a look of the judge does not come
by as much as is wanted, the looks become one.

Too little text. If it cannot fill every look, the later looks are left out; if it cannot fill one, all splits shrink in
proportion, down to `MINIMUM_TOKENS` each; below that it is a DataError. Either is said in the summary's notes.

Windows follow the tokenizer's own default for special tokens: what it puts around "x" is put around every window.
Tail windows of fewer than `MINIMUM_WINDOW` tokens are dropped.

Left out: near-duplicate detection (MinHash), packing several documents into one window.
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch

from lowprec.errors import ConfigError, DataError
from lowprec.records import SCHEMA_VERSION
from lowprec.steps.sources import Document
from lowprec.steps.tokens import TokenSet
from lowprec.steps.units import Units, find_units

MINIMUM_WINDOW = 32
MINIMUM_TOKENS = 2_048
# Units are dealt whole: text that only just suffices in sum would leave one split short.
DEALING_MARGIN = 1.05
CAPPED_MARGIN = 1.3
# Share of the wanted tokens from which on a split counts as filled.
FULL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSizes:
    """Wanted tokens: `held_out` for each of at most `looks` looks of the judge; windows of `window` tokens.

    Tuning and each look take up to `growth` times as many where the text has them.
    """

    calibration: int = 32_768
    tuning: int = 16_384
    held_out: int = 44_000
    looks: int = 2
    window: int = 256
    growth: float = 1.0

    def __post_init__(self) -> None:
        if min(self.calibration, self.tuning, self.held_out) < 1 or self.looks < 1:
            raise ConfigError(f"every split needs a positive number of tokens and the judge one look at least: {self}")
        if self.window < MINIMUM_WINDOW:
            raise ConfigError(f"windows of {self.window} tokens are too short: give {MINIMUM_WINDOW} or more")
        if not self.growth >= 1.0:
            raise ConfigError(f"splits cannot grow {self.growth:g} times: give 1 or more")

    def total(self, looks: int) -> int:
        """Tokens that all splits hold together with so many looks."""
        return self.calibration + self.tuning + looks * self.held_out


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """Texts -> token ids without special tokens, and the special tokens that go around every window."""

    encode: Callable[[list[str]], list[list[int]]]
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()


def encoder_of(tokenizer: Any) -> Encoder:
    """Wraps a transformers tokenizer and finds what its default puts before and after a text.

    Raises:
        ConfigError: the tokenizer gives no token for "x", or does not keep it together.
    """

    def encode(texts: list[str]) -> list[list[int]]:
        return [list(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]

    bare, full = encode(["x"])[0], list(tokenizer("x")["input_ids"])
    places = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
    if not bare or not places:
        raise ConfigError(f"the tokenizer gives {full} for 'x', but {bare} without special tokens; give another one")
    at = places[-1]
    return Encoder(encode=encode, prefix=tuple(full[:at]), suffix=tuple(full[at + len(bare) :]))


@dataclass(frozen=True, slots=True, kw_only=True)
class SetSummary:
    """What one split holds; `per_source` is (source, units, tokens)."""

    name: str
    digest: str
    wanted_tokens: int
    tokens: int
    windows: int
    units: int
    per_source: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSummary:
    """Where the splits come from; `notes` are sentences for the report."""

    seed: int
    window: int
    documents: int
    duplicate_documents: int
    boilerplate_paragraphs: int
    units: int
    tokens: int
    sets: tuple[SetSummary, ...]
    notes: tuple[str, ...]
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """Disjoint to the paragraph: statistics, decisions, and one set per look of the judge."""

    calibration: TokenSet
    tuning: TokenSet
    held_out: tuple[TokenSet, ...]
    summary: DataSummary


@dataclass(frozen=True, slots=True)
class _Window:
    ids: torch.Tensor
    unit: int
    source: int
    document: str


def split(documents: Sequence[Document], tokenizer: Any, sizes: SplitSizes, seed: int = 0) -> Splits:
    """Cuts documents into windows and deals them to calibration, tuning and held-out.

    Args:
        tokenizer: an `Encoder`, or a transformers tokenizer.
        sizes: wanted tokens; what is found may be less (see the module), and says so in `summary.notes`.

    Raises:
        DataError: the text cannot fill the splits; says how many tokens were found and how many are needed for what.
    """
    encoder = tokenizer if isinstance(tokenizer, Encoder) else encoder_of(tokenizer)
    found = find_units(documents)
    names = tuple(dict.fromkeys(document.source for document in documents))
    units, dropped = _windows(found, encoder, names, sizes.window)
    sizes, scale, notes = _affordable(sizes, units, dropped)
    generator = random.Random(seed)
    wanted = [sizes.calibration, sizes.tuning, *[sizes.held_out] * sizes.looks]
    growth = [1.0, *[sizes.growth] * (1 + sizes.looks)]
    dealt = _deal(units, [round(scale * tokens) for tokens in wanted], growth, len(names), generator)
    if sizes.looks > 1 and _count(dealt[2]) < FULL * sizes.growth * scale * sizes.held_out and sizes.growth > 1.0:
        dealt[2:] = [[list(chain(*looks)) for looks in zip(*dealt[2:], strict=True)]]
        sizes, wanted = replace(sizes, looks=1), wanted[:3]
        notes.append(f"so small a budget needs more text: the judge looks once, at {_count(dealt[2])} tokens")
    sets = [_interleaved(windows, names, encoder) for windows in dealt]
    _check_dealt(sets, sizes)
    labels = ["calibration", "tuning", *[f"held-out {i + 1}" for i in range(sizes.looks)]]
    for i, name in enumerate(names):
        if not all(i in s.sources for s in sets):
            notes.append(f"source {name} has too few independent units to stand in every split")
    for label, s, tokens in zip(labels, sets, wanted, strict=True):
        if scale == 1.0 and s.tokens < FULL * tokens:
            notes.append(f"{label} holds {s.tokens} of {tokens} wanted tokens: units are dealt whole")
    summary = DataSummary(
        seed=seed,
        window=sizes.window,
        documents=len(documents),
        duplicate_documents=found.duplicate_documents,
        boilerplate_paragraphs=found.boilerplate_paragraphs,
        units=len(units),
        tokens=_count(units),
        sets=tuple(_summary(label, s, w) for label, s, w in zip(labels, sets, wanted, strict=True)),
        notes=tuple(notes),
    )
    return Splits(calibration=sets[0], tuning=sets[1], held_out=tuple(sets[2:]), summary=summary)


def _count(units: Iterable[list[_Window]]) -> int:
    return sum(len(window.ids) for unit in units for window in unit)


def _windows(found: Units, encoder: Encoder, names: tuple[str, ...], window: int) -> tuple[list[list[_Window]], int]:
    """The windows of every unit that has one, in the order of the documents, and the tokens that make none."""
    size = window - len(encoder.prefix) - len(encoder.suffix)
    documents = [(number, document) for number, unit in enumerate(found.members) for document in unit]
    encoded = encoder.encode([document.text for _, document in documents]) if documents else []
    units: list[list[_Window]] = [[] for _ in found.members]
    dropped = 0
    for (number, document), ids in zip(documents, encoded, strict=True):
        for start in range(0, len(ids), size):
            body = ids[start : start + size]
            piece = [*encoder.prefix, *body, *encoder.suffix]
            if len(piece) < MINIMUM_WINDOW:
                dropped += len(body)
            else:
                label = f"{document.source}: {document.name}"
                units[number].append(_Window(torch.tensor(piece), number, names.index(document.source), label))
    return [unit for unit in units if unit], dropped


def _affordable(sizes: SplitSizes, units: list[list[_Window]], dropped: int) -> tuple[SplitSizes, float, list[str]]:
    """The looks that the text can fill, the share of the wanted tokens that it can give, and what to say about it."""
    found, notes = _count(units), []
    looks = sizes.looks
    while looks > 1 and found < DEALING_MARGIN * sizes.total(looks):
        looks -= 1
    if looks < sizes.looks:
        notes.append(
            f"the text has {found} tokens in independent units; {sizes.looks} looks would need "
            f"{_needed(sizes, sizes.looks)}: the judge has {looks}"
        )
    scale = min(1.0, found / (DEALING_MARGIN * sizes.total(looks)))
    if scale < 1.0:
        notes.append(f"the splits hold {scale:.0%} of the wanted tokens: {_needed(sizes, looks)} were needed")
    smallest = min(sizes.calibration, sizes.tuning, sizes.held_out)
    if scale * smallest < min(smallest, MINIMUM_TOKENS) or len(units) < 2 + looks:
        short = f" ({dropped} more, in pieces of fewer than {MINIMUM_WINDOW}, are too short to use)" if dropped else ""
        raise DataError(
            f"too little text: {found} tokens in {len(units)} independent units were found{short}; needed are "
            f"{_needed(sizes, 1)} ({sizes.calibration} calibration, {sizes.tuning} tuning, {sizes.held_out} held-out) "
            f"in at least {2 + looks} units, better 30 for each split: give more text with --data"
        )
    return replace(sizes, looks=looks), scale, notes


def _needed(sizes: SplitSizes, looks: int) -> int:
    return round(DEALING_MARGIN * sizes.total(looks))


def _check_dealt(sets: list[TokenSet], sizes: SplitSizes) -> None:
    for name, tokens in zip(("calibration", "tuning", "held-out"), sets, strict=False):
        if not len(tokens):
            raise DataError(
                f"no independent unit of text is left for {name}: one unit holds most of it; give more documents "
                f"that share no paragraph ({_needed(sizes, sizes.looks)} tokens in all)"
            )


def _deal(
    units: list[list[_Window]],
    wanted: list[int],
    growth: list[float],
    sources: int,
    generator: random.Random,
) -> list[list[list[_Window]]]:
    """Deals each source's units to the splits and takes as many windows as are wanted: split, source -> windows.

    Units are dealt for what is `wanted` of each split; taken is up to `growth` times that.
    """
    total = _count(units)
    chosen: list[list[list[_Window]]] = [[] for _ in wanted]
    for source in range(sources):
        own = [unit for unit in units if unit[0].source == source]
        share = _count(own) / total
        generator.shuffle(own)
        cap = _cap([_count([unit]) for unit in own], CAPPED_MARGIN * share * sum(wanted))
        sized = [(min(_count([unit]), cap), unit) for unit in own]
        sized.sort(key=lambda pair: -pair[0].bit_length())
        dealt: list[list[list[_Window]]] = [[] for _ in wanted]
        # What a split lacks is counted in all the text there is, so that each gets its share of the units.
        supply = sum(size for size, _ in sized)
        lacking = [tokens / sum(wanted) * supply for tokens in wanted]
        for size, unit in sized:
            most = max(range(len(wanted)), key=lambda i: (lacking[i], generator.random()))
            lacking[most] -= size
            dealt[most].append(unit)
        for i, tokens in enumerate(wanted):
            chosen[i].append(_by_rounds(dealt[i], growth[i] * share * tokens, generator))
    return chosen


def _cap(sizes: list[int], tokens: float) -> int:
    """The least number of tokens that each of `sizes` may be cut to for `tokens` in all (the largest, if too few)."""
    left, remaining = tokens, len(sizes)
    for size in sorted(sizes):
        if size * remaining >= left:
            return max(math.ceil(left / remaining), 1)
        left -= size
        remaining -= 1
    return max(sizes, default=1)


def _by_rounds(units: list[list[_Window]], tokens: float, generator: random.Random) -> list[_Window]:
    """One window of each unit, then a second of each, ..., until there are `tokens`; order random within a round."""
    rounds: list[list[_Window]] = [[] for _ in range(max(map(len, units), default=0))]
    for unit in units:
        for place, window in enumerate(generator.sample(unit, len(unit))):
            rounds[place].append(window)
    # All of them are shuffled, so that how much is taken here does not change what is drawn elsewhere.
    for windows in rounds:
        generator.shuffle(windows)
    taken: list[_Window] = []
    held = 0
    for window in chain(*rounds):
        if held >= tokens:
            break
        taken.append(window)
        held += len(window.ids)
    return taken


def _interleaved(windows: list[list[_Window]], names: tuple[str, ...], encoder: Encoder) -> TokenSet:
    """Merges the sources so that each is spread evenly over the set."""
    keyed = [((i + 0.5) / len(own), window) for own in windows for i, window in enumerate(own)]
    merged = [window for _, window in sorted(keyed, key=lambda pair: pair[0])]
    return TokenSet(
        ids=tuple(w.ids for w in merged),
        units=tuple(w.unit for w in merged),
        sources=tuple(w.source for w in merged),
        documents=tuple(w.document for w in merged),
        source_names=names,
        prefix=encoder.prefix,
        suffix=encoder.suffix,
    )


def _summary(name: str, tokens: TokenSet, wanted: int) -> SetSummary:
    per_source = []
    for i, source in enumerate(tokens.source_names):
        own = [j for j, s in enumerate(tokens.sources) if s == i]
        per_source.append((source, len({tokens.units[j] for j in own}), sum(len(tokens.ids[j]) for j in own)))
    return SetSummary(
        name=name,
        digest=tokens.digest,
        wanted_tokens=wanted,
        tokens=tokens.tokens,
        windows=len(tokens),
        units=len(set(tokens.units)),
        per_source=tuple(per_source),
    )
