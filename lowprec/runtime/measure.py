"""Times the kernels of several schemes against each other on one shape, weights cold, activations quantised inside.

On a CPU first a screening on at most 256 rows of the weight, warm, throws out forms that are more than three times
slower than their scheme's best (a cold cache has been seen to change ratios by two, not by three). What is left, at
most two forms a scheme, runs interleaved at full size. On a GPU all forms are captured in graphs (`timing_cuda.py`).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowprec.formats import WEIGHT_FORMATS, held_bits
from lowprec.formats.nested import LEVELS, RATIOS
from lowprec.formats.two_level import stored_multiples
from lowprec.records import Scheme
from lowprec_kernels import timing, timing_cuda
from lowprec_kernels.cpu_nested import NestedOperands, nested_gemm
from lowprec_kernels.kernel import Kernel, Operands, State
from lowprec_kernels.packing import pack_int4
from lowprec_kernels.timing import Timing

SCREEN_ROWS = 256
SCREEN_RATIO = 3.0
FINALISTS = 2
STATIC_SCALE = 1.0 / 32.0
GPU_ROTATION_BYTES = 4 << 30
Key = tuple[str, str]


def random_operands(scheme: Scheme, n: int, k: int, seed: int = 0, device: str = "cpu") -> Operands:
    """Random codes [n, k] of a resolved `scheme`, for timing; a static scheme gets a fixed activation scale."""
    made = _random_operands(scheme, n, k, seed)

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    return dataclasses.replace(
        made,
        codes=made.codes.to(device),
        scale=moved(made.scale),
        zero=moved(made.zero),
        multiples=moved(made.multiples),
        activation_scale=moved(made.activation_scale),
    )


def _random_operands(scheme: Scheme, n: int, k: int, seed: int) -> Operands:
    generator = torch.Generator().manual_seed(seed)
    if scheme.weight is None:
        return Operands(weight="bf16", codes=torch.randn(n, k, generator=generator, dtype=torch.bfloat16))
    fmt = WEIGHT_FORMATS[scheme.weight]
    columns = 1 if fmt.group_size is None else k // fmt.group_size
    scale = (torch.rand(n, columns, generator=generator) / 64 + 1 / 128).to(torch.bfloat16).to(torch.float32)
    static = torch.tensor(STATIC_SCALE) if scheme.activation is not None and "static" in scheme.activation else None
    if fmt.code_dtype == torch.float8_e4m3fn:
        # Random bytes without the two bit patterns that mean NaN.
        raw = torch.randint(0, 127, (n, k), generator=generator, dtype=torch.uint8)
        sign = torch.randint(0, 2, (n, k), generator=generator, dtype=torch.uint8) * 128
        return Operands(weight="fp8", codes=(raw + sign).view(fmt.code_dtype), scale=scale, activation_scale=static)
    limit = 2 ** (fmt.bits - 1) - 1
    codes = torch.randint(-limit, limit + 1, (n, k), generator=generator, dtype=torch.int8)
    if held_bits(fmt) == 4:
        zero = None if fmt.symmetric else torch.randint(-8, 8, scale.shape, generator=generator, dtype=torch.int8)
        scale = fmt.store_scales(scale)
        return Operands(
            weight="int4",
            codes=pack_int4(codes),
            scale=scale,
            activation_scale=static,
            zero=zero,
            group_size=fmt.group_size,
            multiples=stored_multiples(scheme.weight, scale),
        )
    return Operands(weight="int8", codes=codes, scale=scale, activation_scale=static)


def independent_states(kernel: Kernel, operands: Operands, copies: int) -> list[State]:
    """`copies` states that share nothing that `kernel` reads, except small scales that it does not lay out anew."""
    first = kernel.prepare(operands)
    if any(tensor.layout is not torch.strided for tensor in first.tensors):
        # oneDNN's own layouts are prepared anew, so that their clones cannot differ in layout.
        return [kernel.prepare(operands) for _ in range(copies)]
    states = []
    for _ in range(copies):
        tensors = tuple(tensor.clone() for tensor in first.tensors)
        # A form that packs does not read the stored codes again, so those need not be held once per copy.
        packed = first.tensors[0] is not operands.codes
        stored = operands if packed else dataclasses.replace(operands, codes=tensors[0])
        states.append(State(operands=stored, tensors=tensors))
    return states


def _candidate(kernel: Kernel, states: Sequence[State], x: Tensor) -> Callable[[int], object]:
    return lambda copy: kernel.run(states[copy], x)


def _screen(scheme: Scheme, kernels: Sequence[Kernel], n: int, k: int, x: Tensor) -> list[Kernel]:
    """The forms that may be the fastest at full size, best first."""
    if len(kernels) <= 1:
        return list(kernels)
    operands = random_operands(scheme, min(n, SCREEN_ROWS), k)
    runs = {kernel.name: _candidate(kernel, independent_states(kernel, operands, 1), x) for kernel in kernels}
    found = timing.time_interleaved(runs, seconds_per_candidate=0.004, min_runs=2, max_runs=20)
    best = min(t.p50_us for t in found.values())
    ranked = sorted(kernels, key=lambda kernel: found[kernel.name].p50_us)
    return [kernel for kernel in ranked if found[kernel.name].p50_us <= SCREEN_RATIO * best][:FINALISTS]


def random_nested(fmt: str, n: int, k: int, seed: int = 0) -> NestedOperands:
    """A nested weight [n, k] of random codes on a base in `fmt` (int4-g64, ...), for timing."""
    generator = torch.Generator().manual_seed(seed)
    base = WEIGHT_FORMATS[fmt]
    group_size = base.group_size or k

    def nibbles(*shape: int) -> Tensor:
        return torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)

    shape = (n, k // group_size)
    return NestedOperands(
        base=pack_int4(nibbles(n, k)),
        residual=pack_int4(nibbles(n, k)),
        scale=(0.001 + 0.02 * torch.rand(shape, generator=generator)).to(torch.bfloat16),
        ratio=torch.full(shape, max(RATIOS), dtype=torch.int8),
        zero=None if base.symmetric else nibbles(*shape),
        bias=None,
        group_size=group_size,
    )


def nested_candidate(weights: Sequence[NestedOperands], level: int, x: Tensor) -> Callable[[int], object]:
    """For the clock: x [M, K] through copy `i` of a weight at a level."""
    return lambda copy: nested_gemm(weights[copy], x, level)


def nested_copies(weight: NestedOperands, copies: int) -> list[NestedOperands]:
    """Clones that share nothing with the weight or each other."""

    def cloned() -> NestedOperands:
        parts = {f.name: getattr(weight, f.name) for f in dataclasses.fields(weight)}
        tensors: dict[str, Any] = {name: part.clone() for name, part in parts.items() if isinstance(part, Tensor)}
        return dataclasses.replace(weight, **tensors)

    return [cloned() for _ in range(copies)]


def measure_levels(
    fmt: str,
    n: int,
    k: int,
    ms: Sequence[int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    seconds_per_candidate: float = 0.15,
) -> dict[tuple[int, int], Timing]:
    """Times x[m, k] through a nested weight [n, k] at each of its levels on this CPU, interleaved, weights cold.

    Args:
        fmt: of the base: int4-g64, int4-g128-asym, ...
        ms: rows of the activations.
        dtype: of the activations.

    Returns:
        (level, rows) -> its time.
    """
    # Level 4 reads half a byte of a weight, level 8 a whole one, each of its own copies.
    copies = timing.copies_for(1.5 * n * k)
    weight, found = random_nested(fmt, n, k), dict[tuple[int, int], Timing]()
    weights = {level: nested_copies(weight, copies) for level in LEVELS}
    with torch.inference_mode():
        for m in ms:
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(dtype)
            runs = {str(level): nested_candidate(weights[level], level, x) for level in LEVELS}
            times = timing.time_interleaved(runs, copies=copies, seconds_per_candidate=seconds_per_candidate)
            found |= {(level, m): times[str(level)] for level in LEVELS}
    return found


def measure_kernels(
    forms: Mapping[str, Sequence[Kernel]],
    schemes: Mapping[str, Scheme],
    n: int,
    k: int,
    m: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seconds_per_candidate: float = 0.15,
    min_runs: int = 3,
    device: str = "cpu",
) -> dict[Key, Timing]:
    """Times x[m, k] @ w[n, k]^T for every scheme, all interleaved.

    Args:
        forms: name -> the kernels that can run the scheme at this shape.
        schemes: name -> resolved scheme.
        dtype: of the activations.
        device: device type that the kernels run on.

    Returns:
        (name, kernel) -> its time, for the kernels that passed the screening.
    """
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    on_gpu = device == "cuda"
    with torch.inference_mode():
        # A GPU has few forms, and a graph of a few rows tells little of the whole.
        finalists = {n_: list(ks) if on_gpu else _screen(schemes[n_], ks, n, k, x) for n_, ks in forms.items()}
        per_round = sum(kernel.bytes_per_weight * n * k for chosen in finalists.values() for kernel in chosen)
        cache = torch.cuda.get_device_properties(x.device).L2_cache_size if on_gpu else None
        copies = timing.copies_for(per_round, cache, GPU_ROTATION_BYTES if on_gpu else timing.MEMORY_LIMIT_BYTES)
        runs: dict[str, Callable[[int], object]] = {}
        keys: dict[str, Key] = {}
        for name, chosen in finalists.items():
            operands = random_operands(schemes[name], n, k, device=device)
            for kernel in chosen:
                label = f"{name}/{kernel.name}"
                keys[label] = (name, kernel.name)
                runs[label] = _candidate(kernel, independent_states(kernel, operands, copies), x)
        if on_gpu:
            found = timing_cuda.time_graphed(runs, copies=copies, sample_ms=seconds_per_candidate * 1e3)
        else:
            found = timing.time_interleaved(
                runs, copies=copies, seconds_per_candidate=seconds_per_candidate, min_runs=min_runs
            )
    return {keys[label]: value for label, value in found.items()}
