"""Stage 6: is what was loaded what was scored (parity), and does it hold the budget on unread text (verdict)?"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowprec.pipeline.artefact import Loaded
from lowprec.pipeline.choose import Chosen
from lowprec.pipeline.parity import forwarded, outputs_of, parity_of
from lowprec.records import digest
from lowprec.results import ParityResult
from lowprec.steps.judge import Judgement, Looked, judge
from lowprec.steps.ledger import Ledger
from lowprec.steps.measure import compare, run_through
from lowprec.steps.stream import NOTHING
from lowprec.steps.tokens import Batch, TokenSet, batched, portions_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Proved:
    """The verdict, and whether its text had been read before for another purpose."""

    parity: ParityResult
    judgement: Judgement
    reused: bool


def prove(chosen: Chosen, loaded: Loaded) -> Proved:
    """Parity and verdict of the loaded artefact; one that is not what was scored is never `within`."""
    with chosen.in_model():
        parity = parity_of(chosen, loaded)
        judgement, reused = _judge(chosen, loaded)
    return Proved(parity=parity, judgement=_held_back(judgement, parity), reused=reused)


def _held_back(judgement: Judgement, parity: ParityResult) -> Judgement:
    if parity.holds or judgement.verdict != "within":
        return judgement
    reason = f"what was loaded is not what was scored ({parity}); {judgement.reason}"
    return dataclasses.replace(judgement, verdict="inconclusive", reason=reason)


def _judge(chosen: Chosen, loaded: Loaded) -> tuple[Judgement, bool]:
    """The verdict on the loaded artefact, and whether its text had been read before for another purpose."""
    prepared = chosen.prepared
    context = prepared.context
    looks, reused = _unread(chosen)
    taken: list[Looked] = []
    for data in looks:
        taken.append(_look(chosen, loaded, data))
        judgement = judge(
            taken,
            context.metric.budget,
            data.source_names,
            planned_looks=prepared.looks,
            seed=context.settings.seed,
        )
        if not judgement.look_again:
            break
    return judgement, reused


def _unread(chosen: Chosen) -> tuple[list[TokenSet], bool]:
    """Held-out sets no window of which was read for another purpose; all, marked reused, when there are none."""
    prepared = chosen.prepared
    ledger = Ledger(prepared.context.folder)
    ledger.note(prepared.splits.calibration, "decisions")
    ledger.note(prepared.tuning.data, "decisions")
    fresh = [data for data in prepared.held_out if ledger.unread(data, _purpose(chosen))]
    return (fresh, False) if fresh else (list(prepared.held_out), True)


def _purpose(chosen: Chosen) -> str:
    """What a look is for: this artefact, this budget."""
    prepared = chosen.prepared
    budget = prepared.context.metric.budget
    return digest(chosen.solved_inputs["codes"], repr(chosen.plan.groups), prepared.metric_key, repr(budget))


def _look(chosen: Chosen, loaded: Loaded, data: TokenSet) -> Looked:
    prepared, context = chosen.prepared, chosen.prepared.context
    inputs = {
        "artefact": _judged(chosen, loaded),
        "metric": prepared.metric_key,
        "data": data.digest,
        **prepared.inputs,
    }
    name, batches = f"look-{data.digest}", batched(data).batches
    stored: Any = context.folder.read_step(name, inputs)
    # Written before the data is seen, so that a run killed after the look cannot pass for unread.
    Ledger(context.folder).note(data, _purpose(chosen))
    if stored is None:
        stored = _compared(chosen, loaded, data, batches).tolist()
        context.folder.write_step(name, stored, inputs)
    return context.metric.looked(torch.tensor(stored, dtype=torch.float64), data, batches)


def _judged(chosen: Chosen, loaded: Loaded) -> str:
    """Digest of what is judged: the codes, or the files of a runtime that has its own, with its version."""
    deployed, target = loaded.artefact.deployed, chosen.prepared.context.target
    return chosen.solved_inputs["codes"] if deployed is None else f"{deployed.digest} {target.device}"


def _compared(chosen: Chosen, loaded: Loaded, data: TokenSet, batches: Sequence[Batch]) -> Tensor:
    """The metric's table, a row for each window: the original against what was loaded, in its runtime."""
    context, stream = chosen.prepared.context, chosen.prepared.stream
    by, depth = context.metric.compare(data), stream.depth
    tables, portions, done = [], portions_of(batches), itertools.count(1)
    if loaded.served is None:
        with context.progress.step("judge", 2 * depth * len(portions), "blocks") as step:
            for some in portions:
                runs = [
                    run_through(s, some, overlay, lambda _, __: step.report(next(done), 2 * depth * len(portions)))
                    for s, overlay in ((stream, NOTHING), (loaded.stream, loaded.overlay))
                ]
                tables.append(compare(runs[0], runs[1:], some, by)[0])
        return torch.cat(tables)
    total = depth * len(portions) + len(batches)
    with context.progress.step("judge", total, "blocks and batches") as step:
        for some in portions:
            reference = run_through(stream, some, progress=lambda _, __: step.report(next(done), total))
            found = forwarded(context, loaded.served, some)
            # One batch of logits at a time.
            for expected, output, batch in zip(outputs_of(reference, some), found, some, strict=True):
                tables.append(by(expected, output, batch).cpu())
                step.report(next(done), total)
    return torch.cat(tables)
