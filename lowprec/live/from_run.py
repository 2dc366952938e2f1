"""A finished run's ladder, served: the model is loaded, and a controller is made for its rungs."""

from pathlib import Path

import torch

from lowprec.artifacts.nested import load_nested
from lowprec.errors import ArtifactError
from lowprec.ladder import read_ladder
from lowprec.live.server import LiveServer
from lowprec.runtime.controller import Controller, Objectives
from lowprec.runtime.spending import LossBudget

LADDER, NESTED = "ladder.json", "nested"


def serve(
    run: Path | str,
    *,
    ttft_s: float,
    tpot_s: float,
    nats_per_token: float,
    percentile: float = 0.95,
    burst_share: float = 0.2,
    request_budget: LossBudget | None = None,
    slots: int = 8,
    chunk: int = 512,
    dtype: torch.dtype = torch.bfloat16,
) -> LiveServer:
    """Loads what `lowprec calibrate --ladder` made and serves it along its ladder.

    Args:
        run: the run's folder: nested/ and ladder.json are read.
        ttft_s, tpot_s, percentile: objectives (`lowprec.Objectives`).
        nats_per_token, burst_share: the loss budget (`lowprec.LossBudget`).
        request_budget: of each request by itself (`lowprec.Controller`).
        slots, chunk: see `LiveServer`.

    Raises:
        ArtifactError: a run without a ladder, or damaged files.
        ConfigError: a ladder of other weights; objectives or a budget that no rung meets.
    """
    run = Path(run)
    if not (run / LADDER).exists():
        raise ArtifactError(run, f"has no {LADDER}: make it by lowprec calibrate --ladder")
    ladder = read_ladder(run / LADDER)
    objectives = Objectives(ttft_s=ttft_s, tpot_s=tpot_s, percentile=percentile)
    budget = LossBudget(nats_per_token=nats_per_token, burst_share=burst_share)
    # What cannot be is refused before anything is loaded.
    controller = Controller(
        ladder, objectives, budget, slots=slots, longest_prompt=chunk, request_budget=request_budget
    )
    model, tokenizer, switch = load_nested(run / NESTED, dtype, ladder=ladder)
    return LiveServer(model, tokenizer, switch, controller, slots=slots, chunk=chunk)
