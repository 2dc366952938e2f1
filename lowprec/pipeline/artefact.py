"""Stage 5: writes the artefact and loads it back the way that a runtime would.

What the later stages are about is the artefact as it was loaded, not the model that was scored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lowprec.artifacts.card import model_card, write_card
from lowprec.artifacts.compressed_tensors import plan_artefact, write_artefact
from lowprec.artifacts.digests import write_digests
from lowprec.artifacts.loading import load_artefact, read_back
from lowprec.artifacts.probe import make_probe, save_probe
from lowprec.errors import UnsupportedError
from lowprec.formats import QuantizedWeight
from lowprec.pipeline.choose import Chosen
from lowprec.pipeline.prepare import example
from lowprec.results import CostResult, SchemeShare
from lowprec.steps.judge import Judgement
from lowprec.steps.measure import run_through
from lowprec.steps.solve import overlay_of
from lowprec.steps.stream import NOTHING, Overlay, Stream
from lowprec.steps.tokens import Batch

PROBE_WINDOWS, PROBE_TOKENS = 4, 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Artefact:
    """What lies on disk: its place, its codes and scales as read back, its size, and runtimes' limits with it."""

    path: Path
    solved: Mapping[str, QuantizedWeight]
    weight_bytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Loaded:
    """The artefact as a runtime loaded it: a stream, and what has to be laid over it."""

    artefact: Artefact
    stream: Stream
    overlay: Overlay


class _Scored(nn.Module):
    """The scored model as something that can be called with token ids."""

    def __init__(self, stream: Stream, overlay: Overlay) -> None:
        super().__init__()
        self.__dict__["_stream"], self.__dict__["_overlay"] = stream, overlay
        # Says which device token ids belong on.
        self.place = nn.Parameter(torch.empty(0, device=stream.device), requires_grad=False)

    def forward(self, input_ids: Tensor) -> Any:
        """[W, T] token ids -> logits."""
        stream, overlay = self.__dict__["_stream"], self.__dict__["_overlay"]
        batch = Batch(ids=input_ids, lengths=torch.full((len(input_ids),), input_ids.shape[1]), index=(0,))
        done = run_through(stream, [batch], overlay)
        with stream.outer(overlay):
            return transformers.modeling_outputs.CausalLMOutput(logits=stream.leave(done.hidden[0], batch))


def export(chosen: Chosen) -> Loaded:
    """Writes the artefact and loads it back."""
    context = chosen.prepared.context
    model = context.model
    with context.progress.step("export"):
        path = context.folder.path / "model"
        try:
            parts = _parts(chosen)
            plan_artefact(**parts)
        except UnsupportedError as error:
            return _own_form(chosen, str(error))
        written = write_artefact(
            path,
            **parts,
            tokenizer=model.tokenizer,
            generation_config=model.generation_config,
            finish=lambda folder: finish(chosen, folder),
        )
        module, _ = load_artefact(path)
    artefact = Artefact(
        path=path, solved=read_back(path), weight_bytes=written.weight_bytes, notes=written.runtime_notes
    )
    stream = Stream(module, model.forward, example(chosen.prepared.splits), device=context.settings.calibration_device)
    return Loaded(artefact=artefact, stream=stream, overlay=NOTHING)


def _parts(chosen: Chosen) -> dict[str, Any]:
    model = chosen.prepared.context.model
    if model.config is None or not getattr(model.config, "architectures", None):
        raise UnsupportedError(f"{model.name} has no transformers configuration with an architecture")
    return {
        "config": model.config,
        "tensors": model.tensors(),
        "solved": chosen.solved,
        "schemes": {layer: s for layer, s in chosen.scheme_of_layer.items() if s.weight is not None},
        "input_scales": {layer: float(scale) for layer, scale in input_scales(chosen).items()},
        "fused": [g.layers for g in chosen.prepared.groups if len(g.layers) > 1],
        "dtype": model.dtype,
    }


def input_scales(chosen: Chosen) -> dict[str, Tensor]:
    """Layer -> static scale of its input, of layers whose scheme has one."""
    scales: dict[str, Tensor] = {}
    schemes = chosen.schemes
    for group in chosen.prepared.groups:
        scale = chosen.scored.calibration.scale_of(group.name, schemes[group.name].activation)
        if scale is not None:
            scales |= dict.fromkeys(group.layers, scale)
    return scales


def _own_form(chosen: Chosen, reason: str) -> Loaded:
    """No checkpoint can hold this model: the solved files are the artefact, and are read back from disk."""
    prepared, folder = chosen.prepared, chosen.prepared.context.folder
    prepared.context.progress.note(f"no compressed-tensors checkpoint is written: {reason}")
    solved: dict[str, QuantizedWeight] = {}
    for group in prepared.groups:
        solved |= folder.read_solved(group.name, chosen.solved_inputs) or {}
    overlay = overlay_of(prepared.groups, chosen.schemes, solved, chosen.scored.calibration)
    artefact = Artefact(
        path=folder.path / "solved",
        solved=solved,
        weight_bytes=bytes_before(chosen) - round(sum(saved(chosen, *choice) for choice in chosen.plan.groups)),
        notes=(reason,),
    )
    return Loaded(artefact=artefact, stream=prepared.stream, overlay=overlay)


def saved(chosen: Chosen, group: str, scheme: str) -> float:
    """Bytes that `scheme` saves; negative for a tied head, whose codes come on top of the embedding."""
    costs = chosen.priced.costs
    return costs[group, "bf16"].bytes - costs[group, scheme].bytes


def bytes_before(chosen: Chosen) -> int:
    """Bytes of the model as it was loaded."""
    return sum(p.numel() * p.element_size() for p in chosen.prepared.context.model.module.parameters())


def shares(chosen: Chosen) -> tuple[SchemeShare, ...]:
    """Groups and parameters of each scheme."""
    parameters = {g.name: g.parameters for g in chosen.prepared.groups}
    found: dict[str, list[int]] = {}
    for group, scheme in chosen.plan.groups:
        found.setdefault(scheme, []).append(parameters[group])
    return tuple(
        SchemeShare(scheme=name, groups=len(sizes), parameters=sum(sizes)) for name, sizes in sorted(found.items())
    )


def finish(
    chosen: Chosen,
    folder: Path,
    judgement: Judgement | None = None,
    cost: CostResult | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Adds probe set, model card and digests to an artefact; again with the verdict, once there is one."""
    prepared = chosen.prepared
    decoder = prepared.context.model.kind == "decoder"
    if decoder and not (folder / "probe.safetensors").exists():
        windows = [ids[:PROBE_TOKENS] for ids in prepared.splits.tuning.ids if len(ids) >= PROBE_TOKENS]
        if windows:
            model = _Scored(prepared.stream, chosen.overlay)
            save_probe(folder, make_probe(model, torch.stack(windows[:PROBE_WINDOWS])))
    card = model_card(
        chosen.plan,
        verdict=judgement.verdict if judgement else None,
        loss=judgement.loss if judgement else None,
        cost=cost,
        schemes=shares(chosen),
        notes=notes,
        decoder=decoder,
    )
    write_card(folder, card)
    write_digests(folder)
