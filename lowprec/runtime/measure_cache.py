"""Times storing tokens in one layer of the KV cache and handing out all of them, in several formats at once.

As decoding does it: the layers' caches in rotation, so that each is cold as it is when the whole model has run in
between; then the tokens that were added are taken off again. Attention itself is left out, since it gets the same
numbers of the same dtype whatever they were kept in.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from transformers import cache_utils

from lowprec.formats import CACHE_FORMATS
from lowprec.records import RoundedPart
from lowprec.runtime.kvcache import PARTS, RoundedLayer
from lowprec_kernels.timing import Timing, copies_for, time_interleaved

LIMIT_BYTES = 96 << 20


def measure_cache(
    heads: int,
    width: int,
    formats: Sequence[str | None],
    batch: int,
    added: int,
    held: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    seconds_per_candidate: float = 0.08,
) -> dict[str | None, Timing]:
    """Format -> time of one part, keys or values: half of what a layer takes that keeps both in it.

    Args:
        formats: cache formats; None for what transformers keeps, `dtype` as it is.
        batch, added, held: sequences, tokens that are stored at a time, tokens that are there before.
    """
    generator = torch.Generator().manual_seed(0)
    old, new = (
        torch.randn(batch, heads, tokens, width, generator=generator).to(device, dtype) for tokens in (held, added)
    )
    copies = copies_for(float(2 * len(formats) * (held + added) * batch * heads * width), limit_bytes=LIMIT_BYTES)

    def candidate(fmt: str | None) -> Callable[[int], object]:
        layers = [_layer(fmt, heads * width) for _ in range(copies)]
        for layer in layers:
            layer.update(old, old)

        def run(copy: int) -> None:
            layers[copy].update(new, new)
            layers[copy].crop(-added)

        return run

    found = time_interleaved(
        {fmt or "": candidate(fmt) for fmt in formats},
        copies=copies,
        seconds_per_candidate=seconds_per_candidate,
        synchronize=torch.cuda.synchronize if device == "cuda" else None,
    )
    return {fmt: found[fmt or ""].per(2) for fmt in formats}


def _layer(fmt: str | None, channels: int) -> cache_utils.DynamicLayer:
    if fmt is None:
        return cache_utils.DynamicLayer()
    cache = CACHE_FORMATS[fmt]
    scale = None if cache.largest is None or cache.by_channel else 1.0
    part = RoundedPart(
        module="", layer=0, part="keys", format=fmt, scale=scale, scales=(1.0,) * channels if cache.by_channel else ()
    )
    return RoundedLayer({name: replace(part, part=name) for name in PARTS})
