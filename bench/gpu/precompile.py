"""Compiles what the other stages will launch, in many processes, before anything is timed.

A call stands for the variants of a kernel that one launch needs; calls that differ in sizes alone, in no way that
Triton specialises on, are compiled once. Workers see no GPU (`dry.py`), so as many may run as there are cores.
"""

import functools
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.gpu import candidates
from bench.gpu.candidates import BY_NAME, Case
from bench.gpu.dry import Target, build_launcher, dry
from bench.gpu.journal import Item, Notes, Row
from bench.gpu.setting import Setting
from lowprec_kernels.tuning import Config

# Names a file with the variants that are compiled, a JSON list.
VARIABLE = "LOWPREC_BENCH_COMPILED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One launch: of the op of that name, or ("cast-fp8") of a cast."""

    op: str
    case: Case
    dtype: torch.dtype
    bias: bool = False
    config: Config | None = None

    def variant(self) -> tuple[object, ...]:
        """Equal for calls that compile the same, as far as sizes tell."""
        case, config = self.case, self.config
        sizes: list[object] = [case.experts, case.m == 1, case.m % 16 == 0, case.n % 16 == 0, case.k % 16 == 0]
        # The stride of scales is the number of groups, or of blocks.
        op = BY_NAME.get(self.op)
        group = 0 if op is None else op.group or (candidates.BLOCK if op.weight == "fp8-block" else 0)
        sizes.append(group > 0 and case.k // group % 16 == 0)
        sizes += [case.m, case.n, case.k] if config is None else [case.k % config.block_k == 0]
        return (self.op, self.dtype, self.bias, config, *sizes)


@functools.cache
def _compiled() -> frozenset[str] | None:
    path = os.environ.get(VARIABLE)
    return None if path is None else frozenset(json.loads(Path(path).read_text()))


def compiled(call: Call) -> bool:
    """Whether the stage that compiles has come to it; True where there was no such stage."""
    known = _compiled()
    return known is None or str(call.variant()) in known


def launch_dry(call: Call, setting: Setting) -> None:
    """Launches it on tensors that do not exist; within `dry`."""
    kind = call.op.removeprefix("cast-")
    if kind != call.op:
        x = torch.empty(call.case.m, call.case.k, device="cuda", dtype=call.dtype)
        candidates.fast_cast(kind)(x, config=call.config)
        return
    op = BY_NAME[call.op]
    weight = candidates.make_weight(op, call.case, setting)
    inputs = candidates.make_input(op, call.case, setting, call.dtype)
    bias = torch.empty(call.case.n, device="cuda", dtype=call.dtype) if call.bias else None
    candidates.launch(op, inputs, weight, bias, call.dtype, call.config)


def _run(call: Call, setting: Setting) -> list[Row]:
    start = time.perf_counter()
    with dry(Target.asked()) as compiled:
        launch_dry(call, setting)
    kernels = [kernel for kernel in compiled if kernel is not None]
    launchers = [build_launcher(kernel) for kernel in kernels]
    shared = max((kernel.metadata.shared for kernel in kernels), default=0)
    row: Row = {"variant": str(call.variant()), "seconds": round(time.perf_counter() - start, 2), "shared": shared}
    row["launchers"] = [error for error in launchers if error is not None]
    limit = Target.asked().shared_memory_per_block_optin
    if shared > limit:
        raise RuntimeError(f"{shared} bytes of shared memory, a block has {limit}")
    return [row]


def items(calls: Iterable[Call], setting: Setting) -> list[Item]:
    """One for each variant, in the order of the calls."""
    first: dict[tuple[object, ...], Call] = {}
    for call in calls:
        first.setdefault(call.variant(), call)

    def item(call: Call) -> Item:
        def run(notes: Notes) -> list[Row]:
            return _run(call, setting)

        return Item(key=str(call), run=run)

    return [item(call) for call in first.values()]
