"""What a KV cache in 8 bits loses, keeps and takes: KL on held-out text, bytes of a token, and the time of a step.

    python bench/kv_cache.py MODEL [--tokens 8192] [--window 256] [--context 640] [--context 4096]

Each cache format in every layer that can have it: keys alone, values alone, and both, against the model as it is, on
held-out text of the default sources. Then what a step of decoding takes to store a token in one layer and to hand out
all of them, as a ratio to transformers' own cache within one run. Nothing is rounded but the cache.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lowprec.formats import CACHE_FORMATS
from lowprec.records import CachePart, CachePlace, Workload
from lowprec.runtime.kvcache import PARTS
from lowprec.runtime.measure_cache import measure_cache
from lowprec.steps.caches import Caches, cache_bytes, find_caches, ranges, scales_of
from lowprec.steps.data import SplitSizes, split
from lowprec.steps.load import load
from lowprec.steps.measure import Run, compare, compare_tokens, paired, run_through
from lowprec.steps.scores import mean_kl, perplexity_increase
from lowprec.steps.sources import read_sources
from lowprec.steps.stream import Override, Stream
from lowprec.steps.tokens import Batched, TokenSet, batched

CALIBRATION_TOKENS = 4096
FORMATS = tuple(CACHE_FORMATS)
ROUNDED: tuple[tuple[CachePart, ...], ...] = (("keys",), ("values",), PARTS)
TOKEN = Workload(batch=1, prompt_tokens=1, output_tokens=0)


def caches_of(stream: Stream, fmt: str, calibration: TokenSet) -> Caches:
    """The groups, with calibrated scales where the format has them."""
    found = find_caches(stream, calibration.ids[0][None, :8], fmt)
    return replace(found, scales=scales_of(ranges(stream, found.groups, calibration.batches()), fmt))


def overlay_of(caches: Caches, parts: Sequence[CachePart]) -> dict[str, Override]:
    """These parts of every layer rounded."""
    made = {}
    for module in caches.modules:
        cached = {part: found[1] for part in parts if (found := caches.at(module, part)) is not None}
        made[module] = Override(weight=None, cache=cached)
    return made


def losses(stream: Stream, text: Batched, calibration: TokenSet) -> tuple[Table, CachePlace]:
    """A row for each format and what is rounded in it; and one place of the cache, for its size."""
    table = Table("format", "rounded", "KL, nats", "perplexity", "bytes of a token", title=f"{text.data.tokens} tokens")
    reference = run_through(stream, text.batches)
    for fmt in FORMATS:
        caches = caches_of(stream, fmt, calibration)
        places = [place for group in caches.groups for place in group.places]
        for parts in ROUNDED:
            candidate: Run = run_through(stream, text.batches, overlay_of(caches, parts))
            compared = compare(reference, [candidate], text.batches, compare_tokens)[0]
            scores = paired(compared, text.data, text.batches)
            size = sum(cache_bytes([p], fmt if p.part in parts else None, TOKEN, 2) for p in places)
            share = size / cache_bytes(places, None, TOKEN, 2)
            row = f"{mean_kl(scores):.2e}", f"{perplexity_increase(scores):+.3%}", f"{size:,.0f} ({share:.3f})"
            table.add_row(fmt, " and ".join(parts), *row)
    return table, places[0]


def main(
    model: Annotated[Path, typer.Argument(help="Folder or GGUF file.")],
    tokens: Annotated[int, typer.Option(help="Held-out tokens.")] = 8192,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 256,
    context: Annotated[list[int] | None, typer.Option(help="Tokens that are held, for times; repeatable.")] = None,
) -> None:
    """Prints both tables."""
    console, loaded = Console(width=120), load(model)
    sizes = SplitSizes(calibration=CALIBRATION_TOKENS, tuning=1024, held_out=tokens, window=window)
    splits = split(read_sources(()), loaded.tokenizer, sizes, 0)
    calibration = splits.calibration.subset(CALIBRATION_TOKENS)
    stream = Stream(loaded.module, loaded.forward, calibration.subset(1).batches()[0])
    table, place = losses(stream, batched(splits.held_out[0].subset(tokens)), calibration)
    console.print(table)
    times = Table("tokens held", *FORMATS, title="time of a step in one layer, transformers' own cache being 1")
    for held in context or (640, 4096):
        found = measure_cache(place.heads, place.width, [None, *FORMATS], 1, 1, held, seconds_per_candidate=1.0)
        times.add_row(str(held), *(f"{found[fmt].p50_us / found[None].p50_us:.2f}" for fmt in FORMATS))
    console.print(times)


if __name__ == "__main__":
    typer.run(main)
