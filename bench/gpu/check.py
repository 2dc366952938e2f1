"""Every kernel against float64 over the same operands: ||y - truth|| / ||truth||, on regular and ragged shapes.

A result must not depend on what was in its memory: blocks of its size are filled with NaN and given back right before
the launch, and every case runs twice, on fresh inputs. INT8 sums are held against the truth bit for bit, with scales of
one and float32 results, which hold them exactly. All candidates of a family are checked at one shape. A captured graph,
replayed on new inputs, must give what a launch gives; and operands of more than 2^31 elements are read to their end.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.gpu import candidates
from bench.gpu.candidates import CASTS, OPS, PLAIN_CASTS, Case, Op, config_label
from bench.gpu.journal import Item, Notes, Row
from bench.gpu.precompile import Call
from bench.gpu.setting import Setting
from lowprec_kernels.tuning import Config

# By the dtype of the result, whose own rounding is most of the error.
ROUNDING = {torch.bfloat16: 1.0, torch.float16: 0.5, torch.float32: 0.5}
CANDIDATE_ROWS = (1, 16, 64, 256)
# n, k with more than 2^31 weights and ragged rows; and few columns with more than 2^31 results.
LARGE_WEIGHT = {"grouped": (131200, 33024), "other": (65536, 33000)}
LARGE_RESULT = Case(m=32768, n=66000, k=128)
TAIL = 256
POISONED_BLOCKS = 3


def poison(setting: Setting, rows: int, columns: int, dtype: torch.dtype) -> None:
    """Fills blocks that the allocator will hand out next with NaN."""
    held = [torch.full((rows, columns), torch.nan, device=setting.device, dtype=dtype) for _ in range(POISONED_BLOCKS)]
    del held


def distance(y: Tensor, wanted: Tensor) -> float:
    """||y - wanted|| / ||wanted||; infinite where y is not finite."""
    if not bool(y.isfinite().all()):
        return float("inf")
    return float((y.to(torch.float64) - wanted).norm() / wanted.norm().clamp_min(1e-30))


def bias_for(setting: Setting, n: int, dtype: torch.dtype) -> Tensor:
    """[n] random."""
    return torch.randn(n, device=setting.device, dtype=dtype)


def error_of(
    op: Op, case: Case, setting: Setting, *, dtype: torch.dtype, bias: bool = False, config: Config | None = None
) -> float:
    """The larger error of two runs on fresh inputs."""
    weight = candidates.make_weight(op, case, setting)
    worst = 0.0
    for _ in range(2):
        inputs = candidates.make_input(op, case, setting, dtype)
        added = bias_for(setting, case.n, dtype) if bias else None
        wanted = candidates.truth(op, inputs, weight, added)
        poison(setting, case.m, case.n, dtype)
        y = candidates.launch(op, inputs, weight, added, dtype, config)
        if y.dtype != dtype or y.shape != wanted.shape:
            raise TypeError(f"{y.dtype} {tuple(y.shape)} instead of {dtype} {tuple(wanted.shape)}")
        worst = max(worst, distance(y, wanted))
    return worst


def _judged(op: Op, case: Case, error: float, tolerance: float, **fields: object) -> list[Row]:
    # JSON has no infinity.
    shown = error if math.isfinite(error) else None
    row = {"op": op.name, "case": str(case), "error": shown, "tolerance": tolerance, "ok": error <= tolerance}
    return [row | fields]


def _plain(op: Op, case: Case, setting: Setting, dtype: torch.dtype, bias: bool) -> list[Row]:
    error = error_of(op, case, setting, dtype=dtype, bias=bias)
    return _judged(op, case, error, op.tolerance * ROUNDING[dtype], what="result", dtype=str(dtype), bias=bias)


def _exact(op: Op, case: Case, setting: Setting) -> list[Row]:
    """Scales of one: the result is the sum itself."""
    codes, scale, *rest = candidates.make_weight(op, case, setting)
    weight = (codes, torch.ones_like(scale), *rest)
    x, x_scale, *routes = candidates.make_input(op, case, setting)
    inputs = (x, torch.ones_like(x_scale), *routes)
    wanted = candidates.truth(op, inputs, weight, None)
    poison(setting, case.m, case.n, torch.float32)
    y = candidates.launch(op, inputs, weight, None, torch.float32)
    wrong = int((y.to(torch.float64) != wanted).sum())
    return [{"op": op.name, "case": str(case), "what": "exact sums", "wrong": wrong, "ok": wrong == 0}]


def _every_candidate(op: Op, case: Case, setting: Setting, notes: Notes) -> list[Row]:
    rows: list[Row] = []
    for config in op.family().fitting(op.problem(case)):
        note = f"{op.name} {config_label(config)}"
        if note in notes.poisoned:
            rows += _judged(
                op, case, float("inf"), op.tolerance, what="candidate", config=config_label(config), why="crashed"
            )
            continue
        notes.note(note)
        try:
            error, why = error_of(op, case, setting, dtype=setting.dtype, config=config), ""
        except Exception as raised:
            if setting.device == "cuda":
                torch.cuda.synchronize()
            error, why = float("inf"), f"{type(raised).__name__}: {raised}"[:300]
        rows += _judged(op, case, error, op.tolerance, what="candidate", config=config_label(config), why=why)
    return rows


def _graph(op: Op, case: Case, setting: Setting) -> list[Row]:
    weight = candidates.make_weight(op, case, setting)
    inputs = candidates.make_input(op, case, setting)
    candidates.launch(op, inputs, weight, None, setting.dtype)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = candidates.launch(op, inputs, weight, None, setting.dtype)
    for old, new in zip(inputs, candidates.make_input(op, case, setting), strict=True):
        old.copy_(new)
    y.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    eager = candidates.launch(op, inputs, weight, None, setting.dtype)
    equal = torch.equal(y, eager)
    (row,) = _judged(op, case, distance(y, candidates.truth(op, inputs, weight, None)), op.tolerance, what="graph")
    return [row | {"ok": row["ok"] and equal, "equal": equal}]


def _large(op: Op, case: Case, setting: Setting) -> list[Row]:
    """The last rows of w and of x alone are compared: the others are no different from smaller cases."""
    free, _ = torch.cuda.mem_get_info()
    wanted = case.n * case.k * op.bytes_per_weight() + 2 * case.m * case.n + (1 << 30)
    if wanted > free:
        raise MemoryError(f"{wanted / 1e9:.1f} GB wanted, {free / 1e9:.1f} GB free")
    weight, inputs = candidates.make_weight(op, case, setting), candidates.make_input(op, case, setting)
    y = candidates.launch(op, inputs, weight, None, setting.dtype)
    first, top = (case.n - TAIL) // candidates.BLOCK * candidates.BLOCK, max(0, case.m - TAIL)
    tail = candidates.weight_rows(op, weight, first, case.n)
    truth = candidates.truth(op, tuple(t[top:] for t in inputs), tail, None)
    return _judged(op, case, distance(y[top:, first:], truth), op.tolerance, what="past 2^31 elements")


def _cast(kind: str, case: Case, setting: Setting, dtype: torch.dtype) -> list[Row]:
    """Codes may differ by one step where x / scale lies between two; scales must be equal."""
    x = torch.randn(case.m, case.k, device=setting.device, dtype=dtype)
    poison(setting, case.m, case.k, dtype)
    codes, scale = candidates.fast_cast(kind)(x)
    wanted, wanted_scale = PLAIN_CASTS[kind](x)
    same = float((codes.to(torch.float32) == wanted.to(torch.float32)).to(torch.float64).mean())
    error = distance(codes.to(torch.float32), wanted.to(torch.float64))
    ok = torch.equal(scale, wanted_scale) and same > 0.999 and error < 1e-2
    return [{"op": f"cast-{kind}", "case": str(case), "what": "cast", "error": error, "equal": same, "ok": ok}]


def cases(op: Op, setting: Setting) -> Iterator[tuple[Case, torch.dtype, bool]]:
    """(case, dtype, bias): all numbers of rows on the regular shape, some of them on the ragged one."""
    other = torch.float16
    if op.experts:
        moe = setting.moe
        n, k = min(2 * moe.intermediate, 512), min(moe.hidden, 1024)
        for m in (1, moe.tokens, moe.tokens * moe.top_k):
            yield Case(m=m, n=n, k=k, experts=min(moe.experts, 32)), setting.dtype, False
        return
    n, k = setting.check_shape
    for i, m in enumerate(setting.check_rows):
        yield Case(m=m, n=n, k=k), setting.dtype, i % 2 == 1
    yield Case(m=64, n=n, k=k), other, True
    n, k = setting.ragged_shape
    k = k // op.group * op.group if op.group else k
    for m in sorted({setting.check_rows[0], *setting.check_rows[-2:]}):
        yield Case(m=m, n=n, k=k), setting.dtype, True


def _candidate_cases(op: Op, setting: Setting) -> Iterator[Case]:
    if op.experts:
        yield next(c for c, _, _ in cases(op, setting) if c.m == setting.moe.tokens)
        return
    n, k = setting.check_shape
    for m in CANDIDATE_ROWS[: 2 if setting.smoke else None]:
        yield Case(m=m, n=n, k=k)


def calls(setting: Setting) -> Iterator[Call]:
    """What has to be compiled."""
    for op in OPS:
        if op.missing() is not None:
            continue
        for case in _candidate_cases(op, setting):
            for config in op.family().fitting(op.problem(case)):
                yield Call(op=op.name, case=case, dtype=setting.dtype, config=config)
    for op in OPS:
        if op.missing() is None:
            for case, dtype, bias in cases(op, setting):
                yield Call(op=op.name, case=case, dtype=dtype, bias=bias)


def _missing(op: Op) -> Callable[[Notes], list[Row]]:
    def run(notes: Notes) -> list[Row]:
        raise LookupError(f"cannot be launched: {op.missing()}")

    return run


def items_of(op: Op, setting: Setting) -> Iterator[Item]:
    """One op's checks."""
    if op.missing() is not None:
        yield Item(key=op.name, run=_missing(op))
        return
    for case, dtype, bias in cases(op, setting):
        yield Item(
            key=f"{op.name} {case} {dtype} bias={bias}",
            run=lambda notes, c=case, d=dtype, b=bias: _plain(op, c, setting, d, b),
        )
    regular = next(case for case, _, _ in cases(op, setting) if case.m > 1)
    if op.integer():
        yield Item(key=f"{op.name} exact", run=lambda notes: _exact(op, regular, setting))
    for case in _candidate_cases(op, setting):
        yield Item(
            key=f"{op.name} candidates {case}", run=lambda notes, c=case: _every_candidate(op, c, setting, notes)
        )
    if setting.smoke:
        return
    yield Item(key=f"{op.name} graph", run=lambda notes: _graph(op, regular, setting))


def large_items(setting: Setting) -> Iterator[Item]:
    """Operands of more than 2^31 elements."""
    for op in OPS:
        if setting.smoke or op.experts or op.missing() is not None:
            continue
        n, k = LARGE_WEIGHT["grouped" if op.group else "other"]
        k = k // op.group * op.group if op.group else k
        case = Case(m=16, n=n, k=k)
        yield Item(key=f"{op.name} large weight", run=lambda notes, o=op, c=case: _large(o, c, setting))
        if op.main:
            yield Item(key=f"{op.name} large result", run=lambda notes, o=op: _large(o, LARGE_RESULT, setting))


def items(setting: Setting) -> list[Item]:
    """All checks."""
    found: list[Item] = []
    for kind in CASTS:
        for m, k in ((64, setting.check_shape[1]), (17, setting.ragged_shape[1])):
            case = Case(m=m, n=1, k=k)
            found.append(
                Item(
                    key=f"cast-{kind} {case}",
                    run=lambda notes, kind=kind, c=case: _cast(kind, c, setting, setting.dtype),
                )
            )
    for op in OPS:
        found += items_of(op, setting)
    return found


def shard(found: list[Item], number: int, count: int) -> list[Item]:
    """The items of every `count`-th op, so that a worker compiles what it launches."""
    names = sorted({item.key.split()[0] for item in found})
    return [item for item in found if names.index(item.key.split()[0]) % count == number]
