"""The folder of a form for one target: as `lowprec.onnx.folder` writes its own, and with what is known of that form.

Metadata beyond that of the canonical form: lowprec.target, .form, .deviation (measured on the probe text) and
.verified (what was, and what was not).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from torch import Tensor, nn

from lowprec.artifacts import digests
from lowprec.artifacts.compressed_tensors import write_folder
from lowprec.artifacts.own_form import form_of
from lowprec.errors import ArtifactError
from lowprec.onnx.checks import LIMIT, check_file, check_outputs
from lowprec.onnx.fixed import Sizes
from lowprec.onnx.folder import (
    DATA,
    MODEL,
    OnnxArtefact,
    Source,
    artefact_of,
    check_place,
    load_source,
    metadata_of,
    tokens_of,
    write_texts,
)
from lowprec.onnx.graph import Graph, graph_of
from lowprec.onnx.runtime_form import positions_of
from lowprec.onnx.windows import Deviation, Text, deviation, windows_of
from lowprec.records import digest
from lowprec.version import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a target made of a graph.

    Attributes:
        layers: planned layers that are in codes.
        notes: what it does otherwise than the artefact, one sentence each.
        rounds: whether anything is rounded that the artefact in float32 does not round: then how far its outputs are
            off is told, and else held to `LIMIT`.
    """

    layers: int
    notes: tuple[str, ...]
    rounds: bool


Make = Callable[[Graph, Source, Text, Path], Written]


def write_for(
    target: str,
    form: str,
    source: Path,
    out: Path,
    module: nn.Module | None,
    inputs: Mapping[str, Tensor] | None,
    sizes: Sizes | None,
    *,
    make: Make,
    verified: str,
) -> OnnxArtefact:
    """Lets `make` write model.onnx, and model.onnx.data beside it if it likes, from a graph, its artefact and a text.

    Args:
        sizes: of a form of fixed sizes.
        verified: one sentence, what of this form was verified and what was not.

    Raises:
        ConfigError: sizes that the text does not fill, or that the model has no positions for.
        ArtifactError: no such text; or outputs that are no numbers, or, of a form that rounds nothing, off by more than
            `LIMIT` of the largest.
    """
    path = artefact_of(source)
    check_place(out, path)
    # Layers of a module of the user's have no text: without example inputs `load_source` refuses them.
    windows = None if inputs is not None or form_of(path) == "lowprec-layers" else windows_of(path, sizes)
    loaded = load_source(path, module, inputs)
    size = sum(p.numel() * p.element_size() for p in loaded.module.parameters())

    def fill(folder: Path) -> OnnxArtefact:
        graph = graph_of(loaded.module, inputs)
        if sizes is not None:
            sizes.require_room(graph.kind, positions_of(loaded.module))
        text = Text(kind=graph.kind, windows=windows, inputs=inputs, sizes=sizes)
        written = make(graph, loaded, text, folder / MODEL)
        off = _deviation(folder / MODEL, out, loaded, text, rounds=written.rounds)
        notes = (*written.notes, *loaded.notes, verified)
        facts = metadata_of(loaded, graph.kind, notes)
        facts |= {"lowprec.target": target, "lowprec.form": form, "lowprec.verified": verified}
        facts["lowprec.deviation"] = str(off)
        notes = (f"on the probe text against the artefact in float32: {off}", *notes)
        _stamp(folder / MODEL, type(loaded.module).__name__, facts)
        check_file(folder / MODEL, out)
        write_texts(folder, loaded, graph)
        digested = digests.write_digests(folder)
        files = [name for name in (MODEL, DATA) if name in digested]
        return OnnxArtefact(
            path=out,
            kind=graph.kind,
            layers=written.layers,
            bytes=sum((folder / name).stat().st_size for name in files),
            largest_error=off.largest,
            notes=notes,
            digest=digest(*(digested[name] for name in files)),
        )

    return write_folder(out, size, fill)


def _deviation(file: Path, out: Path, source: Source, text: Text, *, rounds: bool) -> Deviation:
    """How far the outputs are off, on the text; padded, too, where sizes are free and nothing is rounded."""
    off = deviation(file, source.module, text)
    if not math.isfinite(off.largest):
        raise ArtifactError(out, "gives outputs that are no numbers on the probe text; nothing was written")
    if rounds:
        return off
    if off.largest > LIMIT:
        raise ArtifactError(
            out,
            f"computes something else than the artefact, {off.largest:.2g} of the largest output off on the probe text "
            "(this is a bug of lowprec); nothing was written",
        )
    if text.sizes is None:
        check_outputs(file, out, text.kind, source.module, text.inputs, tokens_of(source))
    return off


def _stamp(file: Path, name: str, facts: dict[str, str]) -> None:
    """Metadata of the file, whose opset is that of the file itself; weights beside it stay untouched."""
    model = onnx.load(file, load_external_data=False)
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, facts | {"lowprec.opset": str(opset)})
    model.producer_name, model.producer_version, model.graph.name = "lowprec", __version__, name
    onnx.save(model, file)
