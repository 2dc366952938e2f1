"""Every kernel beside its peers: one comparison a shape and number of rows, all forms interleaved, weights cold.

A row gives p20 / p50 / p80 of a launch, the bytes that must move (weights, activations, results, once each) and the
operations, both per second and as shares of what `ceilings.py` measured, and the time relative to PyTorch's bfloat16
matmul of the same comparison. Peers that may compile or tune for long are compared apart, at the end, each with the
baseline and our kernels of the same kind.
"""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from bench.gpu import candidates
from bench.gpu.candidates import CASTS, OPS, Case, Op
from bench.gpu.clock import Clock, Graph, Launch, copies_for
from bench.gpu.journal import Item, Notes, Row, described
from bench.gpu.peers import BASELINE, PEERS, Peer
from bench.gpu.precompile import Call
from bench.gpu.setting import Setting, Shape
from bench.gpu.tune import Operands
from lowprec_kernels.timing import Timing

APART_ROWS = (1, 16, 64)
LARGEST_ROWS = 4096
# So many shapes are compared in all ops.
ALL_OPS_SHAPES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Something that is timed in a comparison."""

    name: str
    launch: Launch
    copies: int
    weight_bytes: float
    rate: str
    note: str = ""


class Bench:
    """Builds forms; the operands of the last shape are kept."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.clock = Clock(setting)
        self._operands = Operands(setting)
        self._peers = functools.lru_cache(maxsize=len(PEERS))(self._build)
        self._shape: tuple[int, int] | None = None

    def _build(self, peer: Peer, n: int, k: int, copies: int) -> object:
        return peer.build(n, k, copies, self.setting)

    def our_form(self, op: Op, case: Case) -> Form:
        """One of our kernels, with the configuration that it chooses itself."""
        weights = self._operands.weights(op, case)
        inputs = candidates.make_input(op, case, self.setting)
        return Form(
            name=op.name,
            launch=lambda copy: candidates.launch(op, inputs, weights[copy], None, self.setting.dtype),
            copies=len(weights),
            weight_bytes=op.bytes_per_weight() * case.n * case.k * case.experts,
            rate=op.rate,
        )

    def peer_form(self, peer: Peer, case: Case) -> Form:
        """One of the others."""
        if (case.n, case.k) != self._shape:
            self._peers.cache_clear()
            self._shape = (case.n, case.k)
        copies = peer.copies(case, self.setting)
        bound = self._peers(peer, case.n, case.k, copies)
        x = torch.randn(case.m, case.k, device=self.setting.device, dtype=self.setting.dtype)
        return Form(
            name=peer.name,
            launch=bound(x),  # type: ignore[operator]
            copies=copies,
            weight_bytes=peer.bytes_per_weight * case.n * case.k,
            rate=peer.rate,
        )

    def cast_form(self, kind: str, case: Case) -> Form:
        """A kernel that quantises activations [m, k]; its bytes are read and written once."""
        each = case.m * case.k * 2
        copies = copies_for(each, self.setting.rotate_bytes) if case.m > 64 else 1
        xs = [torch.randn(case.m, case.k, device=self.setting.device, dtype=self.setting.dtype) for _ in range(copies)]
        cast = candidates.fast_cast(kind)
        return Form(name=f"cast-{kind}", launch=lambda copy: cast(xs[copy]), copies=copies, weight_bytes=0.0, rate="")

    def timed(self, case: Case, forms: Iterable[Form], notes: Notes) -> tuple[dict[str, Timing], dict[str, str]]:
        """Timings of the forms that run, errors of the others."""
        graphs: dict[str, Graph] = {}
        timings: dict[str, Timing] = {}
        errors: dict[str, str] = {}
        for form in forms:
            note = f"{form.name} at {case}"
            if note in notes.poisoned:
                errors[form.name] = "crashed"
                continue
            notes.note(note)
            try:
                graph = self.clock.prepared(form.launch, form.copies)
                if graph is None:
                    timings |= self.clock.interleaved({form.name: (form.launch, form.copies)})
                else:
                    graphs[form.name] = graph
            except Exception as error:
                if self.setting.device == "cuda":
                    torch.cuda.synchronize()
                errors[form.name] = described(error)
        if graphs:
            timings |= self.clock.replayed(graphs, self.setting.sample_ms)
        return timings, errors

    def compared(self, shape: str, case: Case, forms: list[Form], errors: dict[str, str], notes: Notes) -> list[Row]:
        """A row for each form, with its ratio to the baseline where that is among them."""
        timings, failed = self.timed(case, forms, notes)
        base = timings.get(BASELINE.name)
        rows = [
            _row(shape, case, form, timings[form.name], base.p50_us / timings[form.name].p50_us if base else None)
            for form in forms
            if form.name in timings
        ]
        for name, why in (errors | failed).items():
            rows.append({"shape": shape, "case": str(case), "form": name, "error": why})
        return rows


def _row(shape: str, case: Case, form: Form, timing: Timing, ratio: float | None) -> Row:
    wide = form.rate in ("bf16", "")
    moved = form.weight_bytes + case.m * case.k * (2 if wide else 1) + 2.0 * case.m * case.n
    if not form.rate:
        moved = 3.0 * case.m * case.k
    flops = 2.0 * case.m * case.n * case.k if form.rate else 0.0
    return {
        "shape": shape,
        "case": str(case),
        "m": case.m,
        "n": case.n,
        "k": case.k,
        "experts": case.experts,
        "form": form.name,
        "rate": form.rate,
        "p20_us": timing.p20_us,
        "p50_us": timing.p50_us,
        "p80_us": timing.p80_us,
        "runs": timing.runs,
        "gb_per_s": moved / timing.p50_us / 1e3,
        "tflop_per_s": flops / timing.p50_us / 1e6,
        "over_bf16": ratio,
    }


def _forms(bench: Bench, case: Case, ops: Iterable[Op], others: Iterable[Peer]) -> tuple[list[Form], dict[str, str]]:
    """What can be built, and why the rest cannot."""
    forms: list[Form] = []
    errors: dict[str, str] = {}
    for peer in others:
        reason = peer.missing() or peer.refuses(case)
        try:
            if reason is None:
                forms.append(bench.peer_form(peer, case))
            else:
                errors[peer.name] = reason
        except Exception as error:
            errors[peer.name] = described(error)
    for op in ops:
        reason = op.missing() or (None if op.fits(case) else f"K = {case.k} is not made of groups of {op.group}")
        try:
            if reason is None:
                forms.append(bench.our_form(op, case))
            else:
                errors[op.name] = reason
        except Exception as error:
            errors[op.name] = described(error)
    return forms, errors


def _compare(
    bench: Bench, shape: str, case: Case, ops: Iterable[Op], others: Iterable[Peer], notes: Notes
) -> list[Row]:
    with torch.inference_mode():
        forms, errors = _forms(bench, case, ops, others)
        return bench.compared(shape, case, forms, errors, notes)


def _compare_casts(bench: Bench, case: Case, notes: Notes) -> list[Row]:
    with torch.inference_mode():
        return bench.compared("cast", case, [bench.cast_form(kind, case) for kind in CASTS], {}, notes)


def dense_ops() -> list[Op]:
    """Ours, of one matrix."""
    return [op for op in OPS if op.main]


def all_dense_ops() -> list[Op]:
    """With those of other groups and levels."""
    return [op for op in OPS if not op.experts]


def ops_for(shape: Shape, setting: Setting) -> list[Op]:
    """All at the first shapes, the main ones at the others."""
    return all_dense_ops() if shape in setting.compare_shapes[:ALL_OPS_SHAPES] else dense_ops()


def dense_cases(setting: Setting) -> Iterator[tuple[Shape, Case]]:
    """Numbers of rows in turn, so that what is left out when time is over is the least wanted of every shape."""
    for half in (setting.compare_rows[:4], setting.compare_rows[4:]):
        for shape in setting.compare_shapes:
            for m in half:
                # More rows than a prefill has are for the square problem that others publish.
                if m <= LARGEST_ROWS or (shape.n == shape.k == m):
                    yield shape, Case(m=m, n=shape.n, k=shape.k)


def moe_cases(setting: Setting) -> dict[str, Case]:
    """The two products of a layer of experts."""
    moe = setting.moe
    rows = moe.tokens * moe.top_k
    return {
        "moe gate_up": Case(m=rows, n=2 * moe.intermediate, k=moe.hidden, experts=moe.experts),
        "moe down": Case(m=rows, n=moe.hidden, k=moe.intermediate, experts=moe.experts),
    }


def cast_cases(setting: Setting) -> list[Case]:
    """Activations of a prefill, and of decoding."""
    hidden = setting.decoder.hidden
    return [Case(m=m, n=1, k=k) for m, k in setting.cast_shapes] + [Case(m=m, n=1, k=hidden) for m in (1, 64)]


def calls(setting: Setting) -> Iterator[Call]:
    """What has to be compiled where tuning has not compiled it: the first guess of every case."""
    for case in cast_cases(setting):
        for kind in CASTS:
            yield Call(op=f"cast-{kind}", case=case, dtype=setting.dtype)
    for op in OPS:
        if op.missing() is None:
            dense = (case for shape, case in dense_cases(setting) if op in ops_for(shape, setting))
            for case in moe_cases(setting).values() if op.experts else dense:
                if op.fits(case):
                    yield Call(op=op.name, case=case, dtype=setting.dtype)


def items(setting: Setting) -> list[Item]:
    """Comparisons, most wanted first; peers that may take long last."""
    bench = Bench(setting)
    together = [peer for peer in PEERS if not peer.apart]
    dense = [
        Item(
            key=f"{shape.name} {case}",
            run=lambda notes, s=shape, c=case: _compare(bench, s.name, c, ops_for(s, setting), together, notes),
        )
        for shape, case in dense_cases(setting)
    ]
    casts = [
        Item(key=f"cast {case}", run=lambda notes, c=case: _compare_casts(bench, c, notes))
        for case in cast_cases(setting)
    ]
    experts = [op for op in OPS if op.experts]
    moe = [
        Item(key=f"{name} {case}", run=lambda notes, s=name, c=case: _compare(bench, s, c, experts, (), notes))
        for name, case in moe_cases(setting).items()
    ]
    first = len(setting.compare_shapes) * 2
    return [*casts, *moe, *dense[:first], *dense[first:], *apart_items(bench, setting)]


def apart_items(bench: Bench, setting: Setting) -> list[Item]:
    """Peers compared one at a time."""
    ours = [candidates.BY_NAME["w4a16-g128"]]
    return [
        Item(
            key=f"{peer.name} {shape.name} {m}",
            run=lambda notes, p=peer, s=shape, m=m: _compare(
                bench, s.name, Case(m=m, n=s.n, k=s.k), ours, (BASELINE, p), notes
            ),
        )
        for peer in PEERS
        if peer.apart and peer.missing() is None
        for shape in setting.compare_shapes[:5]
        for m in APART_ROWS
    ]
