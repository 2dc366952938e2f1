"""Ladders for tests: made up, so that every figure is known."""

from lowprec.ladder import Ladder, PassTime, Rung

GROUPS = ("blocks.0.qkv", "blocks.0.down", "head")


def pass_time(tokens: int, us: float) -> PassTime:
    """A modelled time without spread."""
    return PassTime(tokens=tokens, p20_us=us, p50_us=us, p80_us=us, origin="modelled")


def ladder(
    rungs: int = 5, *, ratio: float = 0.6, bottom: float = 0.1, top: float = 0.005, step_ms: float = 20.0
) -> Ladder:
    """`rungs` rungs: decoding at the bottom takes `ratio` of the top's time; losses go from `bottom` to `top` nats."""
    made = []
    for index in range(rungs):
        height = index / (rungs - 1)
        pace = ratio + (1 - ratio) * height
        loss = bottom + (top - bottom) * height
        levels = ["int4", "int4", "int4"] if index < rungs - 1 else ["int8", "int8", "int8"]
        made.append(
            Rung(
                name=f"r{index}",
                levels=tuple(zip(GROUPS, levels, strict=True)),
                loss_nats=loss,
                loss_lower=0.9 * loss,
                loss_upper=1.1 * loss,
                loss_origin="modelled",
                prefill=tuple(pass_time(n, 1e3 * (10 + 0.2 * n)) for n in (16, 128, 512)),
                decode=tuple(pass_time(n, 1e3 * pace * step_ms * (0.7 + 0.3 * n / 16)) for n in (1, 4, 16)),
            )
        )
    return Ladder(
        model="made-up",
        model_digest="0123456789abcdef",
        device="nowhere",
        levels=("int4", "int8"),
        context_tokens=256,
        loss_tokens=10_000,
        confidence=0.95,
        rungs=tuple(made),
    )
