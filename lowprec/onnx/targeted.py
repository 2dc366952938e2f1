"""The folder of a form for one target: as `lowprec.onnx.folder` writes its own, and with what is known of that form.

Metadata beyond that of the canonical form: lowprec.target, .form, .deviation (measured on the probe text) and
.verified (what was, and what was not).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from torch import Tensor, nn

from lowprec.artifacts import digests
from lowprec.artifacts.compressed_tensors import write_folder
from lowprec.onnx.checks import check_file
from lowprec.onnx.folder import (
    DATA,
    MODEL,
    OnnxArtefact,
    Source,
    artefact_of,
    check_place,
    load_source,
    metadata_of,
    write_texts,
)
from lowprec.onnx.graph import Graph, graph_of
from lowprec.onnx.windows import Deviation
from lowprec.records import digest
from lowprec.version import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a target made of a graph.

    Attributes:
        layers: planned layers that are in codes.
        notes: what it does otherwise than the artefact, one sentence each.
        deviation: None where the form's own runtime alone could tell.
    """

    layers: int
    notes: tuple[str, ...]
    deviation: Deviation | None


Make = Callable[[Graph, Source, Path], Written]


def write_for(
    target: str,
    form: str,
    source: Path,
    out: Path,
    module: nn.Module | None,
    inputs: Mapping[str, Tensor] | None,
    *,
    make: Make,
    verified: str,
) -> OnnxArtefact:
    """Lets `make` write model.onnx, and model.onnx.data beside it if it likes, from a graph and its artefact.

    Args:
        verified: one sentence, what of this form was verified and what was not.
    """
    path = artefact_of(source)
    check_place(out, path)
    loaded = load_source(path, module, inputs)
    size = sum(p.numel() * p.element_size() for p in loaded.module.parameters())

    def fill(folder: Path) -> OnnxArtefact:
        graph = graph_of(loaded.module, inputs)
        written = make(graph, loaded, folder / MODEL)
        notes = (*written.notes, *loaded.notes, verified)
        facts = metadata_of(loaded, graph.kind, notes)
        facts |= {"lowprec.target": target, "lowprec.form": form, "lowprec.verified": verified}
        if written.deviation is not None:
            facts["lowprec.deviation"] = str(written.deviation)
            notes = (f"on the probe text against the artefact in float32: {written.deviation}", *notes)
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
            largest_error=written.deviation.largest if written.deviation else 0.0,
            notes=notes,
            digest=digest(*(digested[name] for name in files)),
        )

    return write_folder(out, size, fill)


def _stamp(file: Path, name: str, facts: dict[str, str]) -> None:
    """Metadata of the file, whose opset is that of the file itself; weights beside it stay untouched."""
    model = onnx.load(file, load_external_data=False)
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, facts | {"lowprec.opset": str(opset)})
    model.producer_name, model.producer_version, model.graph.name = "lowprec", __version__, name
    onnx.save(model, file)
