"""The torch target: times the kernels that will really run in this process, on this machine.

Per-kernel times come from `lowprec.runtime.measure` (cold weights, all schemes of a shape interleaved, activation
quantisation inside where a form rounds them: few rows may meet the same weights unrounded, see
`lowprec.runtime.dispatch`). A table in rows of two widths takes the time of its two parts, each measured at its own
size. `bytes` are those of the checkpoint, whichever form runs. `measure_end_to_end` times a whole causal model with its
KV cache. On a GPU the kernels are timed in CUDA graphs; a device that is not there is refused.
"""

import dataclasses
import inspect
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lowprec.errors import ModelError, UnsupportedError
from lowprec.formats import WEIGHT_FORMATS, for_tables, resolve, scheme_named
from lowprec.formats.rows import MixedRows
from lowprec.records import CachePlace, CostSample, Origin, Scheme
from lowprec.runtime.dispatch import BUCKET_LIMITS, automatic
from lowprec.runtime.kvcache import cache_argument
from lowprec.runtime.measure import measure_kernels
from lowprec.runtime.measure_cache import measure_cache
from lowprec.targets.base import TARGETS, Progress, cache_sample, unfit, weight_bytes
from lowprec_kernels.kernel import registered

OP = "linear"
END_TO_END_SECONDS = 8.0
REPEATS = 5


class TorchTarget:
    """Torch on this machine.

    Args:
        device: "cpu" or "cuda".
        dtype: of the activations between the layers.
        seconds_per_sample: time spent on each candidate kernel, on average.

    Raises:
        UnsupportedError: no kernel of ours runs on `device`.
    """

    def __init__(
        self, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, seconds_per_sample: float = 0.08
    ) -> None:
        if not any(kernel.device == device for kernel in registered()):
            here = sorted({kernel.device for kernel in registered()} - {"any"})
            raise UnsupportedError(
                f"target torch cannot run on device {device!r}",
                (f"no quantised kernels for it in this version; there are some for: {', '.join(here)}",),
            )
        if device == "cuda" and not torch.cuda.is_available():
            raise UnsupportedError("target torch cannot run on device 'cuda'", ("torch finds no CUDA device here",))
        self._device, self.dtype, self.seconds_per_sample = device, dtype, seconds_per_sample

    @property
    def name(self) -> str:
        """Name that plans use."""
        return "torch"

    @property
    def device(self) -> str:
        """Device and processor."""
        if self._device == "cuda":
            return f"cuda ({torch.cuda.get_device_name()})"
        threads = torch.get_num_threads()
        capability = torch.backends.cpu.get_cpu_capability()
        return f"{self._device} ({platform.machine()}, {capability}, {threads} threads)"

    @property
    def origin(self) -> Origin:
        """All times are measured."""
        return "measured"

    @property
    def baseline(self) -> str:
        """The fastest forms that are not quantised."""
        return "the same runtime, unquantised: every layer bfloat16 in its fastest form"

    @property
    def schemes(self) -> tuple[str, ...]:
        """All families that need no zero points."""
        return ("fp8", "int8", "int4")

    def require(self) -> None:
        """Torch is here; a device that is not was refused when the target was made."""

    def products(self, scheme: Scheme, widths: tuple[int, ...]) -> tuple[int, ...]:
        """Each layer runs by itself."""
        return widths

    def supports(self, scheme: Scheme, n: int, k: int) -> str | None:
        """None if a form other than the slow reference runs it."""
        reason = unfit(scheme, k)
        if reason is not None:
            return reason
        try:
            automatic(resolve(scheme, k), n, k, self._device)
        except UnsupportedError as error:
            return "; ".join(error.reasons)
        return None

    def dense_bytes(self, own: int) -> int:
        """What the model stores."""
        return own

    def time(
        self,
        shapes: Sequence[tuple[int, int]],
        schemes: Sequence[Scheme],
        ms: Sequence[int],
        progress: Progress | None = None,
    ) -> list[CostSample]:
        """See `lowprec.targets.base.Target.time`."""
        samples: list[CostSample] = []
        total, done = len(shapes) * len(ms), 0
        for n, k in shapes:
            resolved = {s.name: resolve(s, k) for s in schemes if self.supports(s, n, k) is None}
            tables = {name: resolved.pop(name) for name in list(resolved) if for_tables(resolved[name])}
            for name, scheme in tables.items():
                samples += [dataclasses.replace(self._in_parts(scheme, n, k, m), scheme=name) for m in ms]
            for m in ms:
                forms = {name: automatic(scheme, n, k, self._device, m) for name, scheme in resolved.items()}
                found = measure_kernels(
                    forms,
                    resolved,
                    n,
                    k,
                    m,
                    dtype=self.dtype,
                    seconds_per_candidate=self.seconds_per_sample,
                    device=self._device,
                )
                for name, scheme in resolved.items():
                    mine = {kernel: t for (owner, kernel), t in found.items() if owner == name}
                    best = min(mine, key=lambda kernel: mine[kernel].p50_us)
                    timing = mine[best]
                    samples.append(
                        CostSample(
                            op=OP,
                            m=m,
                            n=n,
                            k=k,
                            scheme=name,
                            kernel=best,
                            p20_us=timing.p20_us,
                            p50_us=timing.p50_us,
                            p80_us=timing.p80_us,
                            bytes=weight_bytes(scheme, n, k),
                            origin="measured",
                        )
                    )
                done += 1
                if progress is not None:
                    progress(done, total)
        return samples

    def keeps(self, fmt: str) -> str | None:
        """Our cache keeps every format that there is."""
        return None

    @property
    def offered_cache(self) -> None:
        """It is asked for: see `lowprec.settings.Settings`."""
        return

    def fits(self, module: nn.Module, places: Sequence[CachePlace]) -> None:
        """Every cache that transformers makes of keys and values of all tokens."""
        return

    def time_cache(
        self, place: CachePlace, formats: Sequence[str | None], batch: int, added: int, held: int
    ) -> list[CostSample]:
        """See `lowprec.targets.base.CacheTarget.time_cache`; bf16 is the cache that transformers makes by itself."""
        timings = measure_cache(
            place.heads,
            place.width,
            formats,
            batch,
            added,
            held,
            dtype=self.dtype,
            device=self._device,
            seconds_per_candidate=self.seconds_per_sample,
        )
        return [
            cache_sample(
                fmt,
                place,
                batch,
                added,
                held,
                "RoundedLayer" if fmt else "DynamicLayer",
                timings[fmt],
                "measured",
            )
            for fmt in formats
        ]

    def _in_parts(self, scheme: Scheme, n: int, k: int, m: int) -> CostSample:
        """The sum over the parts of a table in rows of two widths."""
        fmt = WEIGHT_FORMATS[str(scheme.weight)]
        assert isinstance(fmt, MixedRows)
        fine = fmt.fine_rows(n)
        sizes = {"w8a16": fine, f"w4a16-g{fmt.group_size}": n - fine}
        parts = [self.time([(rows, k)], [scheme_named(name)], [m])[0] for name, rows in sizes.items() if rows]
        return dataclasses.replace(
            parts[0],
            n=n,
            scheme=scheme.name,
            kernel=" + ".join(part.kernel for part in parts),
            p20_us=sum(part.p20_us for part in parts),
            p50_us=sum(part.p50_us for part in parts),
            p80_us=sum(part.p80_us for part in parts),
            bytes=weight_bytes(scheme, n, k),
        )


def measure_end_to_end(
    model: nn.Module,
    prompt_tokens: int,
    output_tokens: int,
    batch: int = 1,
    *,
    seconds: float = END_TO_END_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Tokens per second of a causal transformers model in prefill and in decode, medians over repeats.

    Prefill counts batch x prompt_tokens over the time of one forward pass that fills the KV cache and returns the
    last position's logits; decode counts one token per sequence and step, greedily continued. Repeats until
    `seconds` are spent, at most five times and at least once; with little time left decode is cut short, never
    below four steps.

    Raises:
        ModelError: the model has no KV cache or no logits.
    """
    config: Any = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None:
        raise ModelError(f"{type(model).__name__} has no config with vocab_size: only causal models can be timed")
    tokens = torch.randint(0, vocabulary, (batch, prompt_tokens), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(getattr(model, "device", "cpu"))
    forward = Cached(model)
    deadline = clock() + seconds
    prefill: list[float] = []
    steps: list[float] = []
    with torch.inference_mode():
        # Kernels lay their weights out on first use; that belongs to loading. A prompt that reaches the last bucket of
        # rows, or the whole one if it is shorter, meets the kernels of prefill, one token those of decode.
        rows = math.ceil((BUCKET_LIMITS[-1] + 1) / batch)
        forward(tokens[:, : min(prompt_tokens, rows)])
        forward(tokens[:, :1])
        for repeat in range(REPEATS):
            start = clock()
            logits, cache = forward(tokens)
            prefill.append(clock() - start)
            for step in range(output_tokens):
                if step >= 4 and clock() > deadline:
                    break
                token = logits[:, -1:].argmax(-1)
                start = clock()
                logits, cache = forward(token, cache)
                steps.append(clock() - start)
            if clock() + prefill[-1] > deadline and repeat:
                break
    return batch * prompt_tokens / statistics.median(prefill), batch / statistics.median(steps) if steps else 0.0


class Cached:
    """A causal model called with a KV cache, by whichever name its version of transformers gives it."""

    def __init__(self, model: nn.Module) -> None:
        taken = inspect.signature(model.forward).parameters
        self._model = model
        self._name = cache_argument(model)
        self._extra = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}

    def __call__(self, tokens: torch.Tensor, cache: Any = None) -> tuple[torch.Tensor, Any]:
        """[B, T] token ids after what the cache holds -> logits of the last position, and the cache."""
        output = self._model(input_ids=tokens, use_cache=True, **{self._name: cache}, **self._extra)
        if tokens.is_cuda:
            torch.cuda.synchronize()
        filled = getattr(output, self._name, None)
        if filled is None:
            raise ModelError(
                f"{type(self._model).__name__} returned no {self._name}: it cannot be timed with a KV cache"
            )
        return output.logits, filled


TARGETS.register("torch", TorchTarget())
