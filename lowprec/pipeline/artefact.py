"""Stage 5: writes the artefact and loads it back the way that a runtime would.

What the later stages are about is the artefact as it was loaded, not the model that was scored.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lowprec.artifacts.card import licence_of, model_card, write_card
from lowprec.artifacts.compressed_tensors import WrittenArtefact, plan_artefact, write_artefact
from lowprec.artifacts.digests import write_digests
from lowprec.artifacts.loading import apply_artefact, load_artefact, read_back
from lowprec.artifacts.own_form import form_of, write_own_form
from lowprec.artifacts.probe import make_probe, save_probe
from lowprec.artifacts.stored_cache import cache_notes, write_cache
from lowprec.errors import ModelError, UnsupportedError
from lowprec.formats import QuantizedWeight
from lowprec.pipeline.choose import Chosen
from lowprec.pipeline.deploy import deploy, deployed_path, loaded_by
from lowprec.pipeline.prepare import example
from lowprec.records import ArtefactForm, Deployed
from lowprec.results import CostResult, SchemeShare
from lowprec.runtime.convert import weight_of
from lowprec.steps.judge import Judgement
from lowprec.steps.measure import run_through
from lowprec.steps.memory import give_back_memory
from lowprec.steps.stream import Overlay, Override, Stream
from lowprec.steps.tokens import Batch

PROBE_WINDOWS, PROBE_TOKENS = 4, 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Artefact:
    """What lies on disk: its place, its codes and scales as read back, its size, and runtimes' limits with it.

    Attributes:
        deployed: the same model in the files of the target's runtime, where that has some of its own.
    """

    path: Path
    form: ArtefactForm
    solved: Mapping[str, QuantizedWeight]
    weight_bytes: int
    notes: tuple[str, ...]
    deployed: Deployed | None = None

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the weights that the target's runtime loads."""
        return self.weight_bytes if self.deployed is None else self.deployed.weight_bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Loaded:
    """The artefact, the model that a runtime loaded from it, and what is laid over that to save memory.

    Attributes:
        stream, overlay: the artefact in torch.
        served: in the target's own runtime, where it has files of its own; else None, and torch is that runtime.
    """

    artefact: Artefact
    stream: Stream
    overlay: Overlay
    served: nn.Module | None = None


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
    """Writes the artefact, and for a target with files of its own those, and loads them back."""
    context = chosen.prepared.context
    with context.progress.step("export"), chosen.in_model():
        path = context.folder.path / "model"
        written = write(chosen, path, lambda folder: finish(chosen, folder))
        artefact = Artefact(
            path=path,
            form=form_of(path),
            solved=read_back(path),
            weight_bytes=written.weight_bytes,
            notes=written.runtime_notes,
        )
        stream, overlay = _load(chosen, artefact)
    if context.runtime is None:
        return Loaded(artefact=artefact, stream=stream, overlay=overlay)
    artefact = dataclasses.replace(artefact, deployed=deploy(chosen, context.runtime, path))
    served = loaded_by(chosen, context.runtime, deployed_path(chosen, context.runtime))
    return Loaded(artefact=artefact, stream=stream, overlay=overlay, served=served)


def write(chosen: Chosen, path: Path, finishing: Callable[[Path], None]) -> WrittenArtefact:
    """Writes the codes as a checkpoint of compressed-tensors, or where none can hold them in lowprec's own form.

    Args:
        chosen: its scales are merged into the model already (`Chosen.in_model`).
        finishing: completes the folder before it is put in place.
    """
    model = chosen.prepared.context.model
    solved: dict[str, Any] = {
        "solved": chosen.solved,
        "schemes": {layer: s for layer, s in chosen.scheme_of_layer.items() if s.weight is not None},
        "input_scales": {layer: float(scale) for layer, scale in input_scales(chosen).items()},
    }
    added: dict[str, Any] = {
        "tokenizer": model.tokenizer,
        "generation_config": model.generation_config,
        "finish": finishing,
    }
    try:
        parts = solved | _checkpoint_parts(chosen)
        plan_artefact(**parts)
    except UnsupportedError as error:
        return _own_form(chosen, path, error, solved | added)
    return write_artefact(path, **parts, **added)


def _checkpoint_parts(chosen: Chosen) -> dict[str, Any]:
    """What a compressed-tensors checkpoint needs beyond codes and scales."""
    model = chosen.prepared.context.model
    if table := next((t for g in chosen.prepared.groups if g.layers[0] in chosen.solved for t in g.tables), None):
        raise UnsupportedError(f"{table} is an embedding in codes, which other runtimes do not read")
    if model.config is None or not getattr(model.config, "architectures", None):
        raise UnsupportedError(f"{model.name} has no transformers configuration with an architecture")
    return {
        "config": model.config,
        "tensors": model.tensors(),
        "fused": [g.layers for g in chosen.prepared.groups if len(g.layers) > 1],
        "dtype": model.dtype,
        "cache": chosen.cache,
    }


def _own_form(chosen: Chosen, path: Path, error: UnsupportedError, parts: Mapping[str, Any]) -> WrittenArtefact:
    """No checkpoint of compressed-tensors can hold this model; the notes say why."""
    context = chosen.prepared.context
    model, reason = context.model, str(error).partition("\n")[0]
    if error.reasons:
        more = f" (and {len(error.reasons) - 1} more)" if len(error.reasons) > 1 else ""
        reason += f": {error.reasons[0]}{more}"
    context.progress.note(f"the artefact is in lowprec's own form: {reason}")
    written = write_own_form(
        path,
        module=model.module,
        name=model.name,
        revision=model.revision,
        tables=tables_of(chosen),
        dtype=None if model.original is None else model.dtype,
        **parts,
    )
    notes = (f"no compressed-tensors checkpoint: {reason}", *cache_notes(chosen.cache))
    return dataclasses.replace(written, runtime_notes=notes)


def _load(chosen: Chosen, artefact: Artefact) -> tuple[Stream, Overlay]:
    """The artefact as its user loads it, in float32; layers alone go into a copy of the user's module."""
    context = chosen.prepared.context
    model, held = context.model, _HeldAsCodes(artefact.solved, tables_of(chosen))
    if artefact.form == "lowprec-layers":
        try:
            module = copy.deepcopy(model.module)
        except (TypeError, RuntimeError) as error:
            raise ModelError(
                f"{model.name} cannot be copied to load its artefact into ({error}); give it without locks, open files "
                "and tensors that carry gradients"
            ) from error
        apply_artefact(module, artefact.path, dtype=torch.float32, made=held.take)
    else:
        module, _ = load_artefact(artefact.path, made=held.take)
    give_back_memory()
    shown, device = example(chosen.prepared.splits), context.settings.calibration_device
    stream = Stream(module, model.forward, shown, device=device, overlay=held.overlay)
    if unused := [layer for layer in artefact.solved if not stream.calls[layer]]:
        # Else the original's answers would be judged in the place of the artefact's.
        raise ModelError(
            f"forward(module, batch) does not run {unused[0]} of the module that it is given; let it do so"
        )
    return stream, held.overlay


def tables_of(chosen: Chosen) -> dict[str, tuple[str, ...]]:
    """Layer -> the embeddings that share its codes; one that shares them with nothing has none."""
    shared = {layer: g.tables for g in chosen.prepared.groups if g.tables for layer in g.layers}
    return {layer: tuple(name for name in tables if name != layer) for layer, tables in shared.items()}


class _HeldAsCodes:
    """Drops each dense weight that is exactly what its codes say, and has the codes make it again when it is needed.

    A dense weight takes four bytes where its code takes one. One that differs stays, so that it is what is judged.
    """

    def __init__(self, solved: Mapping[str, QuantizedWeight], tables: Mapping[str, Sequence[str]]) -> None:
        self._solved, self._tables = solved, tables
        self.overlay: dict[str, Override] = {}

    def take(self, model: nn.Module, layer: str) -> None:
        """Looks at a layer whose weight has just been made."""
        # One maker, so that a head and its table are made once.
        make = self._solved[layer].dequantize
        found = make()
        for name in (layer, *self._tables.get(layer, ())):
            module: Any = model.get_submodule(name)
            if torch.equal(weight_of(module).float(), found):
                self.overlay[name] = Override(weight=make)
                module.weight = nn.Parameter(module.weight.new_zeros(()).expand_as(module.weight), requires_grad=False)


def input_scales(chosen: Chosen) -> dict[str, Tensor]:
    """Layer -> static scale of its input, of layers whose scheme has one."""
    scales: dict[str, Tensor] = {}
    schemes = chosen.schemes
    for group in chosen.prepared.groups:
        scale = chosen.scored.calibration.scale_of(group.name, schemes[group.name].activation)
        if scale is not None:
            scales |= dict.fromkeys(group.layers, scale)
    return scales


def saved(chosen: Chosen, group: str, scheme: str) -> float:
    """Bytes that `scheme` saves; negative for a tied head, whose codes come on top of the embedding."""
    costs = chosen.priced.costs
    return costs[group, "bf16"].bytes - costs[group, scheme].bytes


def bytes_before(chosen: Chosen) -> int:
    """Bytes of the model as it was loaded."""
    model = chosen.prepared.context.model
    return model.bytes if model.original is None else model.original.bytes


def bytes_unrounded(chosen: Chosen) -> int:
    """Bytes of what is loaded when nothing is rounded; a turned model has a table more where its head was tied."""
    context = chosen.prepared.context
    own = context.model.dtype.itemsize
    return context.model.bytes * context.target.dense_bytes(own) // own


def shares(chosen: Chosen) -> tuple[SchemeShare, ...]:
    """Groups and parameters of each scheme."""
    # Caches have none.
    parameters = dict.fromkeys(chosen.prepared.names, 0) | {g.name: g.parameters for g in chosen.prepared.groups}
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
    reused: bool = False,
    *,
    levels: bool = False,
) -> None:
    """Adds probe set, card, digests, and what is rounded of the KV cache; again with the verdict, once there is one.

    `levels` says that it gets a second plane (`lowprec.artifacts.nested`).
    """
    prepared = chosen.prepared
    model = prepared.context.model
    write_cache(folder, chosen.cache)
    if model.kind == "decoder" and not (folder / "probe.safetensors").exists():
        windows = [ids[:PROBE_TOKENS] for ids in prepared.splits.tuning.ids if len(ids) >= PROBE_TOKENS]
        if windows:
            scored = _Scored(prepared.as_stored, chosen.overlay)
            save_probe(folder, make_probe(scored, torch.stack(windows[:PROBE_WINDOWS])))
    card(chosen, folder, form_of(folder), judgement, cost, notes, reused, levels=levels)


def card(
    chosen: Chosen,
    folder: Path,
    form: ArtefactForm,
    judgement: Judgement | None,
    cost: CostResult | None,
    notes: Sequence[str],
    reused: bool,
    *,
    levels: bool = False,
) -> None:
    """Writes the model card of a folder of that form, and its digests."""
    model = chosen.prepared.context.model
    source = getattr(model.config, "_name_or_path", "")
    text = model_card(
        chosen.plan,
        verdict=judgement.verdict if judgement else None,
        reused=reused,
        loss=judgement.loss if judgement else None,
        cost=cost,
        schemes=shares(chosen),
        notes=notes,
        licence=licence_of(Path(source)) if source else None,
        decoder=model.kind == "decoder",
        form=form,
        turned=model.original is not None,
        levels=levels,
    )
    write_card(folder, text)
    write_digests(folder)
