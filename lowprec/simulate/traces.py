"""Traces of arrivals: made from a seed, or read from a CSV file.

Arrivals are a Poisson process whose rate follows a profile (Lewis and Shedler 1979, by inversion of the integrated
rate). Profiles, between a base and a peak rate:

    poisson      the base all the time
    burst-step   base, at once the peak, at once the base
    burst-ramp   up over a third of the burst, a third at the peak, down over a third
    burst-train  the peak in three pieces, as long as the pauses between them
    diurnal      a sine from base to peak and back

Prompts and outputs are log-normal, as in public traces of conversations (BurstGPT; Splitwise's of Azure), cut at eight
times their mean.
"""

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lowprec.errors import ArtifactError, ConfigError
from lowprec.registry import closest
from lowprec.runtime.controller import EFFORTS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
BURSTS = ("burst-step", "burst-ramp", "burst-train")
PROFILES = ("poisson", *BURSTS, "diurnal")
LONGEST = 8.0
MOST_REQUESTS = 20_000_000

# The names that public traces (Azure's and BurstGPT's) have for the columns, in lower case.
COLUMNS = {
    "arrival": ("arrival", "arrival_s", "timestamp"),
    "prompt": ("prompt", "prompt_tokens", "contexttokens", "request tokens"),
    "output": ("output", "output_tokens", "generatedtokens", "response tokens"),
    "effort": ("effort",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Mean tokens of prompts and outputs, and the standard deviation of their logarithms."""

    prompt: int = 256
    output: int = 128
    spread: float = 0.5

    def __post_init__(self) -> None:
        if self.prompt < 1 or self.output < 1:
            raise ConfigError(f"{self.prompt} prompt and {self.output} output tokens: give 1 or more of each")
        if not 0.0 <= self.spread <= 3.0:
            raise ConfigError(f"a spread of {self.spread:g} is outside [0, 3]: give for example 0.5")

    def draw(self, rng: np.random.Generator, mean: int, count: int) -> Ints:
        """[count] tokens, 1 or more."""
        drawn = mean * np.exp(self.spread * rng.standard_normal(count) - self.spread**2 / 2)
        whole: Ints = np.clip(np.rint(drawn), 1, max(1, round(LONGEST * mean))).astype(np.int64)
        return whole


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """Requests in the order of their arrival.

    Attributes:
        arrival_s: [N], not falling. prompt, output: [N] tokens. effort: [N] indices into `EFFORTS`.
        end_s: when the trace is over.
        bursts: (start, end) in seconds of each; they end where the rate is the base again.
    """

    name: str
    arrival_s: Floats
    prompt: Ints
    output: Ints
    effort: Ints
    end_s: float
    bursts: tuple[tuple[float, float], ...] = ()

    def __len__(self) -> int:
        return len(self.arrival_s)

    def faster(self, factor: float) -> "Trace":
        """The same requests, `factor` times as many a second.

        Raises:
            ConfigError: the factor is not above 0.
        """
        if not (math.isfinite(factor) and factor > 0):
            raise ConfigError(f"arrivals {factor:g} times as fast: give a number above 0")
        bursts = tuple((start / factor, end / factor) for start, end in self.bursts)
        return replace(self, arrival_s=self.arrival_s / factor, end_s=self.end_s / factor, bursts=bursts)


def _profile(
    name: str, base: float, peak: float, seconds: float
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Knots (time, rate) of a profile of this length, linear between them, and its bursts."""
    if name == "poisson":
        return [(0.0, base), (seconds, base)], []
    if name == "diurnal":
        times = np.linspace(0.0, seconds, 1001)
        rates = base + (peak - base) * (1 - np.cos(2 * math.pi * times / seconds)) / 2
        return list(zip(times.tolist(), rates.tolist(), strict=True)), []
    # A fifth of the time before the burst, two fifths for it, two fifths after it.
    start, length = seconds / 5, 2 * seconds / 5
    third = length / 3
    if name == "burst-ramp":
        knots = [(0.0, base), (start, base), (start + third, peak), (start + 2 * third, peak), (start + length, base)]
        return [*knots, (seconds, base)], [(start, start + length)]
    pieces = [(start, start + length)]
    if name == "burst-train":
        piece = length / 5
        pieces = [(start + 2 * i * piece, start + (2 * i + 1) * piece) for i in range(3)]
    knots = [(0.0, base)]
    for begin, end in pieces:
        knots += [(begin, base), (begin, peak), (end, peak), (end, base)]
    return [*knots, (seconds, base)], pieces


def _arrivals(rng: np.random.Generator, knots: Sequence[tuple[float, float]]) -> Floats:
    """Times of a Poisson process of this rate: those of one of rate 1, mapped back through the integrated rate."""
    at, rate = np.array(knots).T
    length, before, after = np.diff(at), rate[:-1], rate[1:]
    total = np.concatenate([[0.0], np.cumsum(length * (before + after) / 2)])
    if total[-1] > MOST_REQUESTS:
        raise ConfigError(f"the trace would have {total[-1]:.3g} requests, more than {MOST_REQUESTS:,}: shorten it")
    mass = np.sort(rng.uniform(0.0, total[-1], rng.poisson(total[-1])))
    piece = np.searchsorted(total, mass, side="right") - 1
    # Within a piece the integral is a parabola; this form of its inverse holds for a constant rate, too.
    rest, slope = mass - total[piece], (after - before)[piece] / length[piece]
    times: Floats = at[piece] + 2 * rest / (before[piece] + np.sqrt(before[piece] ** 2 + 2 * slope * rest))
    return times


def make_trace(
    name: str,
    *,
    base_per_s: float,
    peak_per_s: float,
    seconds: float,
    lengths: Lengths,
    seed: int,
    efforts: Sequence[float] = (1.0, 0.0, 0.0),
) -> Trace:
    """A trace of profile `name`; the same arguments give the same trace.

    Args:
        base_per_s, peak_per_s: requests a second.
        efforts: shares of requests of low, medium and high effort.

    Raises:
        ConfigError: an unknown profile, rates, shares or a length that cannot be.
    """
    if name not in PROFILES:
        raise ConfigError(f"unknown trace {name!r}: {closest(name, PROFILES)}; or give a CSV file")
    if not (0.0 < base_per_s <= peak_per_s < math.inf):
        raise ConfigError(f"base {base_per_s:g} and peak {peak_per_s:g} requests a second: give 0 < base <= peak")
    if not 0.0 < seconds < math.inf:
        raise ConfigError(f"a trace of {seconds:g} s: give a length above 0")
    if seed < 0:
        raise ConfigError(f"seed {seed}: give 0 or more")
    if len(efforts) != len(EFFORTS) or min(efforts) < 0 or abs(sum(efforts) - 1.0) > 1e-6:
        raise ConfigError(f"shares {list(efforts)} of {', '.join(EFFORTS)} effort: give three that add up to 1")
    rng = np.random.default_rng(seed)
    knots, bursts = _profile(name, base_per_s, peak_per_s, seconds)
    arrival = _arrivals(rng, knots)
    count = len(arrival)
    return Trace(
        name=name,
        arrival_s=arrival,
        prompt=lengths.draw(rng, lengths.prompt, count),
        output=lengths.draw(rng, lengths.output, count),
        effort=np.searchsorted(np.cumsum(efforts)[:-1], rng.uniform(size=count), side="right").astype(np.int64),
        end_s=seconds,
        bursts=tuple(bursts),
    )


def read_trace(path: Path, effort: str = "low") -> Trace:
    """The trace of a CSV file with a header.

    Columns: arrival (seconds, or a date and time, in UTC where it names no zone), prompt and output (tokens), effort if
    there is one; what others call them is understood, too (`COLUMNS`). The first request arrives at 0. `effort` is that
    of all without a column.

    Raises:
        ArtifactError: the file cannot be read.
        ConfigError: a column that is missing, or a value that cannot be: line and value are in the message.
    """
    if effort not in EFFORTS:
        raise ConfigError(f"unknown effort {effort!r}: {closest(effort, EFFORTS)}")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(_rows(path, csv.reader(file), effort))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ArtifactError(path, f"cannot be read as a trace ({reason})") from error
    if not rows:
        raise ConfigError(f"{path} has a header and no requests")
    arrival, prompt, output, efforts = (np.array(column) for column in zip(*rows, strict=True))
    arrival = arrival - arrival[0]
    return Trace(
        name=path.name, arrival_s=arrival, prompt=prompt, output=output, effort=efforts, end_s=float(arrival[-1])
    )


def _rows(path: Path, reader: Iterator[list[str]], effort: str) -> Iterator[tuple[float, int, int, int]]:
    header = [name.strip().lower() for name in next(reader, [])]
    places = {
        column: next((header.index(name) for name in names if name in header), -1) for column, names in COLUMNS.items()
    }
    missing = [column for column, place in places.items() if place < 0 and column != "effort"]
    if missing:
        raise ConfigError(
            f"{path} has no column {missing[0]!r}: its header is {', '.join(header) or 'empty'}; "
            "it needs arrival, prompt and output"
        )
    default, before = EFFORTS.index(effort), -math.inf
    for line, row in enumerate(reader, start=2):
        if not row:
            continue
        if len(row) <= max(places.values()):
            raise ConfigError(f"{path}, line {line}: {len(row)} values, the header has {len(header)} columns")
        arrival = _time(path, line, row[places["arrival"]])
        if arrival < before:
            raise ConfigError(
                f"{path}, line {line}: arrival {row[places['arrival']]} is before that of the line above; "
                "sort the file by arrival"
            )
        before = arrival
        given = row[places["effort"]].strip().lower() if places["effort"] >= 0 else ""
        if given and given not in EFFORTS:
            raise ConfigError(f"{path}, line {line}: unknown effort {given!r}: {closest(given, EFFORTS)}")
        prompt, output = (_tokens(path, line, column, row[places[column]]) for column in ("prompt", "output"))
        yield arrival, prompt, output, EFFORTS.index(given) if given else default


def _time(path: Path, line: int, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        try:
            date = datetime.fromisoformat(text.strip())
            # This machine's zone may have hours that come twice or never.
            value = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
        except ValueError:
            value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{path}, line {line}: arrival {text!r} is neither seconds nor a date and time")
    return value


def _tokens(path: Path, line: int, column: str, text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 1 or value != math.floor(value) or value > 1e9:
        raise ConfigError(
            f"{path}, line {line}: {column} {text!r} is no number of tokens: give 1 or more, and leave out requests "
            "that failed"
        )
    return int(value)
