"""A made-up but consistent report of a 30-block decoder: what the tests of the report layer render."""

import dataclasses
import math
import random
from typing import Any

from lowprec.records import Budget, PrecisionPlan, Workload
from lowprec.results import (
    CheckedPair,
    CostResult,
    FrontierPoint,
    GroupChoice,
    LadderResult,
    LossResult,
    ParityResult,
    Report,
    RungResult,
    SchemeShare,
    SensitivityResult,
    SourceLoss,
    StruckOut,
    Unquantised,
)

ROLES = {"qkv": 960 * 576, "o": 576 * 576, "gate_up": 3072 * 576, "down": 576 * 1536}
BITS = {"w4a16-g64": 4.25, "w8a8-int8": 8.03, "bf16": 16.0}
BUDGETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.10)


def make_groups(blocks: int = 30, seed: int = 0) -> tuple[GroupChoice, ...]:
    """Blocks x roles plus lm_head: late blocks in INT4, early ones in INT8, three left in bf16."""
    rng = random.Random(seed)
    groups = []
    for block in range(blocks):
        for role, parameters in ROLES.items():
            late = block > blocks * 0.3 + rng.random() * blocks * 0.4
            scheme = "w4a16-g64" if late and role != "o" else "w8a8-int8"
            if (block, role) in ((0, "down"), (1, "down"), (blocks - 1, "down")):
                scheme = "bf16"
            kl = 0.0 if scheme == "bf16" else (1.3e-3 if "4" in scheme else 2e-5) * math.exp(rng.gauss(0, 0.8))
            groups.append(_choice(f"model.layers.{block}.{role}", block, role, scheme, parameters, kl))
    groups.append(_choice("lm_head", None, "lm_head", "w8a8-int8", 49152 * 576, 4.8e-4))
    return tuple(groups)


def _choice(name: str, block: int | None, role: str, scheme: str, parameters: int, kl: float) -> GroupChoice:
    return GroupChoice(
        group=name,
        block=block,
        role=role,
        scheme=scheme,
        parameters=parameters,
        predicted_kl_nats=kl,
        cost=parameters * BITS[scheme] / 8 / 30e3,
    )


def make_loss(**changes: Any) -> LossResult:
    sources = (
        SourceLoss(
            source="python-topics", relative=0.0342, lower=0.0281, upper=0.0407, kl_nats=0.0431, units=41, tokens=21904
        ),
        SourceLoss(
            source="docstrings", relative=0.0226, lower=0.0160, upper=0.0295, kl_nats=0.0377, units=88, tokens=20512
        ),
    )
    values: dict[str, Any] = {
        "metric": "perplexity",
        "budget": 0.05,
        "relative": 0.0287,
        "lower": 0.0241,
        "upper": 0.0334,
        "confidence": 0.975,
        "looks": 1,
        "units": 129,
        "tokens": 42416,
        "kl_nats": 0.0405,
        "top1_agreement": 0.9187,
        "perplexity_before": 18.42,
        "perplexity_after": 18.95,
        "per_source": sources,
    }
    return LossResult(**(values | changes))


def make_cost(**changes: Any) -> CostResult:
    values: dict[str, Any] = {
        "workload": Workload(),
        "objective": "time",
        "unit": "us",
        "origin": "measured",
        "device": "2-core x86-64 CPU",
        "baseline": "torch bf16",
        "before": 3_012_000.0,
        "after": 1_268_000.0,
        "reduction_predicted": 0.604,
        "reduction_measured": 0.579,
        "effective_bits": 7.41,
        "weight_bytes_before": 269_030_016,
        "weight_bytes_after": 128_700_000,
        "decode_tokens_per_s_before": 48.2,
        "decode_tokens_per_s_after": 121.6,
        "prefill_tokens_per_s_before": 1545.0,
        "prefill_tokens_per_s_after": 2380.0,
    }
    return CostResult(**(values | changes))


def _pairs(groups: tuple[GroupChoice, ...], seed: int) -> tuple[CheckedPair, ...]:
    rng = random.Random(seed)
    chosen = rng.sample([g for g in groups if g.predicted_kl_nats > 0], 24)
    return tuple(
        CheckedPair(
            group=g.group,
            scheme=g.scheme,
            predicted_kl_nats=g.predicted_kl_nats,
            measured_kl_nats=g.predicted_kl_nats * math.exp(rng.gauss(0.05, 0.22)),
        )
        for g in chosen
    )


def _frontier() -> tuple[FrontierPoint, ...]:
    points = []
    for budget in BUDGETS:
        share = min(0.82, 0.11 + 0.23 * math.log1p(budget / 0.004))
        bf16 = max(0.0, 0.12 - budget)
        points.append(
            FrontierPoint(
                budget=budget,
                predicted_loss=budget * 0.88,
                cost=1_268_000.0 * (1.28 - 0.33 * share / 0.7),
                effective_bits=8.03 - 3.78 * share + 8 * bf16,
                bytes=int(160e6 - 60e6 * share),
                scheme_shares=(("w4a16-g64", share), ("w8a8-int8", 1 - share - bf16), ("bf16", bf16)),
            )
        )
    return tuple(points)


def _plan(groups: tuple[GroupChoice, ...]) -> PrecisionPlan:
    return PrecisionPlan(
        model="SmolLM2-135M-Instruct",
        revision="9f3a6c01",
        groups=tuple((g.group, g.scheme) for g in groups),
        budget=Budget(),
        workload=Workload(),
        target="torch",
        objective="time",
        solver="gptq",
        predicted_loss=0.044,
        predicted_cost=_frontier()[4].cost,
        input_digests=(("sensitivity", "41b0e7d2a9c35f18"), ("cost", "c07d1e5fb26a9834"), ("data", "5ae2f0916bd47c3e")),
    )


def make_ladder(rungs: int = 7) -> LadderResult:
    """From INT4 to INT8 in equal steps of time."""
    made = []
    for index in range(rungs):
        height = index / (rungs - 1)
        loss = 0.21 * (0.004 / 0.21) ** height
        made.append(
            RungResult(
                name={0: "INT4", rungs - 1: "INT8"}.get(index, f"{100 * (1 - height):.0f}% INT4"),
                low_groups=round(121 * (1 - height)),
                low_share=1 - height,
                loss_nats=loss,
                loss_lower=0.94 * loss,
                loss_upper=1.07 * loss,
                alone_us=14_100 + 5_300 * height,
                full_us=41_000 + 17_000 * height,
            )
        )
    return LadderResult(
        path="out/ladder.json",
        artefact="out/nested",
        model_digest="5f1d0c6ae2b94873",
        groups=121,
        bits_per_weight=8.29,
        slots=8,
        tokens=24_576,
        confidence=0.95,
        rungs=tuple(made),
        notes=(("times", "whole passes, processor time of one thread"),),
    )


def make_report(blocks: int = 30, seed: int = 0, **changes: Any) -> Report:
    """The report; `changes` replace its fields."""
    groups = make_groups(blocks, seed)
    shares = tuple(
        SchemeShare(
            scheme=scheme,
            groups=sum(g.scheme == scheme for g in groups),
            parameters=sum(g.parameters for g in groups if g.scheme == scheme),
        )
        for scheme in BITS
    )
    report = Report(
        model="SmolLM2-135M-Instruct",
        target="torch",
        objective="time",
        effort="fast",
        verdict="within",
        verdict_reason="the upper bound of the perplexity increase, +3.34 %, is at most the budget of 5 %",
        unread_data=True,
        reused=False,
        plan=_plan(groups),
        loss=make_loss(),
        cost=make_cost(),
        parity=ParityResult(
            codes_equal=True,
            max_layer_error=0.41,
            kl_nats=1.3e-3,
            noise_kl_nats=1.2e-3,
            runtime_kl_nats=1.4e-3,
            plain_kl_nats=1.6e-3,
        ),
        sensitivity=SensitivityResult(
            spearman=0.968,
            spearman_within=(("fp8", 0.91), ("int4", 0.941), ("int8", 0.933)),
            predicted_kl_nats=0.0431,
            measured_kl_nats=0.0408,
            pairs=_pairs(groups, seed),
        ),
        schemes=shares,
        groups=groups,
        unquantised=(
            Unquantised(
                name="model.embed_tokens",
                reason="tied to lm_head; the target cannot share its codes, so both are stored",
                bytes=56_623_104,
                share=0.2105,
            ),
            Unquantised(
                name="61 norm weights", reason="vectors, not matrices: nothing to gain", bytes=70_272, share=2.6e-4
            ),
        ),
        struck_out=(
            StruckOut(scheme="w4a16-g128", n=960, k=576, reason="group size 128 does not divide K = 576; g64 is used"),
            StruckOut(
                scheme="w8a8-fp8", n=3072, k=576, reason="no FP8 kernel on this CPU is faster than bf16 (16 ms to 0.3)"
            ),
        ),
        frontier=_frontier(),
        rounds=((0.0472, 0.0561), (0.0421, 0.0436)),
        environment={
            "python": "3.11.9",
            "torch": "2.13.0+cpu",
            "transformers": "5.23.0",
            "compressed-tensors": "0.20.0",
            "cpu": "x86-64, 2 cores, AVX512-VNNI",
            "seed": "0",
        },
        seconds={
            "load": 3.1,
            "data": 6.4,
            "graph": 0.2,
            "calibrate": 148.9,
            "sensitivity": 41.7,
            "cost": 38.0,
            "allocate": 0.6,
            "solve": 96.3,
            "verify": 52.8,
            "export": 7.7,
            "judge": 73.5,
        },
        peak_memory_bytes=1_910_000_000,
        artefact="out/artefact",
        ladder=make_ladder(),
    )
    return dataclasses.replace(report, **changes)
