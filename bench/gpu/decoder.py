"""A whole decoder, step by step under a CUDA graph: what a token costs as claimed, as measured, and at the ceiling.

    claimed    sum of the linear layers' times, each measured alone, plus the rest
    measured   one step (or prefill) as one graph, interleaved with that of the bfloat16 decoder
    ceiling    the roofline of the measured rates (`lowprec.targets.roofline`) for the linear layers, plus the rest
    rest       the same decoder with its linear layers left out, measured

Llama-3-8B's sizes (`model.py`). A step is that of the token after the prompt: every sequence has `prompt` tokens in the
cache. Left out: sampling, paging, anything that overlaps.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.gpu import candidates, ceilings
from bench.gpu.candidates import BY_NAME, Case
from bench.gpu.clock import Clock, Graph
from bench.gpu.journal import Item, Notes, Row
from bench.gpu.model import BF16, KINDS, PLANS, Codes, Context, Model, Phase, Plan, Run, phases, sizes
from bench.gpu.precompile import Call
from bench.gpu.setting import Setting
from lowprec.formats import resolve, scheme_named
from lowprec.targets.roofline import TERA, Device, RooflineTarget

REST, REST_BF16 = "rest", "rest bf16"
SAMPLE_MS = 80.0


class Bench:
    """Measures plans; the bfloat16 model and its graphs stay, of the others one at a time."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.clock = Clock(setting)
        self._model: Model | None = None
        self._graphs: dict[str, Graph] = {}

    @functools.cached_property
    def context(self) -> Context:
        """Made when first needed."""
        return Context(self.setting)

    @functools.cached_property
    def base(self) -> Model:
        """The bfloat16 model."""
        return Model(PLANS[0], self.setting)

    @functools.cached_property
    def device(self) -> Device:
        """The roofline of this device, as measured."""
        found = {name: ceilings.measured(name, self.setting) for name in ceilings.WORK}
        bandwidth = max(found["copy"], found["read"])
        rates = {name: found[name] * TERA for name in ("bf16", "fp8", "int8")}
        return Device(name="measured", bandwidth=bandwidth * TERA, rates=rates)

    def model(self, plan: Plan) -> Model:
        """The plan's model."""
        if plan == PLANS[0]:
            return self.base
        if self._model is None or self._model.plan != plan:
            self._model = None
            self._model = Model(plan, self.setting)
        return self._model

    def _step(self, model: Model, phase: Phase) -> Callable[[int], Tensor]:
        run = Run(self.context, phase, model.plan)

        def compute(kind: str, layer: int, x: Tensor | Codes) -> Tensor:
            return (model.head if kind == "head" else model.layers[layer][kind])(x)

        return lambda copy: run.forward(compute)

    def _rest(self, plan: Plan, phase: Phase) -> Callable[[int], Tensor]:
        """The forward pass with linear layers that give what is there already."""
        run = Run(self.context, phase, plan)
        like: dict[str, Any] = {"device": self.setting.device, "dtype": self.setting.dtype}
        rows = phase.rows
        outputs = {kind: torch.randn(rows, n, **like) for kind, (n, _) in sizes(self.context.d).items()}
        outputs["head"] = outputs["head"][:1] if phase.prefill else outputs["head"]
        return lambda copy: run.forward(lambda kind, layer, x: outputs[kind])

    def _linears_us(self, model: Model, phase: Phase) -> dict[str, float]:
        """By kind: all layers of it, each measured with the casts that it does itself."""
        found: dict[str, float] = {}
        for kind, (_, k) in sizes(self.context.d).items():
            rows = 1 if kind == "head" and phase.prefill else phase.rows
            x = torch.randn(rows, k, device=self.setting.device, dtype=self.setting.dtype)
            linears = model.all_of(kind)
            # What attention gives is quantised by the layer itself.
            fused = linears[0].op is not None and model.plan.fused and kind != "o"
            given = Codes(tensors=candidates.fast_cast(linears[0].op.cast)(x)) if fused else x  # type: ignore[union-attr]
            launch = lambda copy, linears=linears, given=given: linears[copy](given)  # noqa: E731
            timing = self.clock.interleaved({kind: (launch, len(linears))}, sample_ms=8.0)[kind]
            found[kind] = timing.p50_us * len(linears)
        return found

    def _ceiling_us(self, plan: Plan, phase: Phase) -> float:
        """The roofline of all linear layers."""
        target, total = RooflineTarget(self.device), 0.0
        for kind, (n, k) in sizes(self.context.d).items():
            name = plan.op(kind)
            scheme = scheme_named(BF16 if name == BF16 else BY_NAME[name].scheme or name)
            rows = 1 if kind == "head" and phase.prefill else phase.rows
            total += target.microseconds(resolve(scheme, k), n, k, rows) * (
                1 if kind == "head" else self.context.d.layers
            )
        return total

    def measure(self, plan: Plan, phase: Phase) -> list[Row]:
        """One row."""
        with torch.inference_mode():
            base, model = self.base, self.model(plan)
            steps = {
                BF16: self._step(base, phase),
                REST_BF16: self._rest(PLANS[0], phase),
                plan.name: self._step(model, phase),
                REST: self._rest(plan, phase),
            }
            if self.setting.smoke:
                times = self.clock.interleaved({name: (step, 1) for name, step in steps.items()})
            else:
                graphs = {name: self._graph(name, phase, step) for name, step in steps.items()}
                times = self.clock.replayed(graphs, SAMPLE_MS)
            linears, before = self._linears_us(model, phase), self._linears_us(base, phase)
            ceiling, ceiling_before = self._ceiling_us(plan, phase), self._ceiling_us(PLANS[0], phase)
        rest, rest_before, whole, whole_before = (times[name].p50_us for name in (REST, REST_BF16, plan.name, BF16))
        claimed, claimed_before = sum(linears.values()) + rest, sum(before.values()) + rest_before
        return [
            {
                "plan": plan.name,
                "phase": phase.name,
                "rows": phase.rows,
                "weight_bytes": model.bytes(),
                "measured_us": whole,
                "p20_us": times[plan.name].p20_us,
                "p80_us": times[plan.name].p80_us,
                "bf16_us": whole_before,
                "rest_us": rest,
                "linears_us": linears,
                "claimed_us": claimed,
                "ceiling_us": ceiling + rest,
                "tokens_per_s": phase.rows / whole * 1e6,
                "saving_measured": 1 - whole / whole_before,
                "saving_claimed": 1 - claimed / claimed_before,
                "saving_ceiling": 1 - (ceiling + rest) / (ceiling_before + rest_before),
            }
        ]

    def _graph(self, name: str, phase: Phase, step: Callable[[int], Tensor]) -> Graph:
        """The captured step; that of the bfloat16 model is kept."""
        key = f"{name} {phase.name}" if name in (BF16, REST_BF16) else ""
        if key in self._graphs:
            return self._graphs[key]
        graph = self.clock.prepared(step, 1)
        assert graph is not None
        if key:
            self._graphs[key] = graph
        return graph


def calls(setting: Setting) -> Iterator[Call]:
    """What has to be compiled: every op at the decoder's shapes."""
    for name in dict.fromkeys(plan.op(kind) for plan in PLANS for kind in KINDS):
        if name == BF16 or BY_NAME[name].missing() is not None:
            continue
        for n, k in sizes(setting.decoder).values():
            for phase in phases(setting.decoder):
                yield Call(op=name, case=Case(m=phase.rows, n=n, k=k), dtype=setting.dtype)


def items(setting: Setting) -> list[Item]:
    """Every plan in every phase."""
    bench = Bench(setting)

    def item(plan: Plan, phase: Phase) -> Item:
        def run(notes: Notes) -> list[Row]:
            return bench.measure(plan, phase)

        return Item(key=f"{plan.name} / {phase.name}", run=run)

    return [item(plan, phase) for plan in PLANS for phase in phases(setting.decoder)]
