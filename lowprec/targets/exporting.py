"""Targets whose runtime is not here: each writes a form that its documentation describes, checked as far as it can be.

What every one of them does: planned layers that are not found in the graph, and operators that the runtime does not
list, are errors; ONNX's checker and shape inference pass over what was written; how far its outputs are from the
artefact's is measured on the artefact's probe text, and more than 1e-3 of the largest is an error where a form rounds
nothing; and what was not verified on hardware says so, in the metadata of the file and in the notes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowprec.errors import ConfigError
from lowprec.onnx import require_extra
from lowprec.registry import Registry, closest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lowprec.onnx.fixed import Sizes
    from lowprec.onnx.folder import OnnxArtefact, Source
    from lowprec.onnx.graph import Graph
    from lowprec.onnx.targeted import Written
    from lowprec.onnx.windows import Text


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """What is to be written.

    Attributes:
        source: the folder of a finished run, or that of its artefact.
        form: one of the exporter's.
        sequence, past: tokens of a call and of the cache before it, where sizes are fixed; None for the target's own.
        module, inputs: as for `lowprec.onnx.export_onnx`.
    """

    source: Path
    out: Path
    form: str
    sequence: int | None = None
    past: int | None = None
    module: "nn.Module | None" = None
    inputs: "Mapping[str, Tensor] | None" = None

    @property
    def sizes(self) -> "Sizes":
        """Those of a form of fixed sizes; ConfigError for ones that cannot be."""
        require_extra()
        from lowprec.onnx.fixed import sizes_of

        return sizes_of(self.sequence, self.past)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Exporter:
    """A target and the forms that it can be given.

    Attributes:
        forms: names; the first is written when none is asked for.
        write: writes one.
        fixed: forms of fixed sizes.
        whole: forms of models that are whole in their artefact, so that no module of the user's goes into them.
    """

    name: str
    forms: tuple[str, ...]
    write: "Callable[[Request], OnnxArtefact]"
    fixed: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()


def names(text: str) -> frozenset[str]:
    """The words of a text: a list of operators as it stands in a target's file."""
    return frozenset(text.split())


def through_graph(
    target: str, request: Request, make: "Callable[[Graph, Source, Text, Path], Written]", verified: str
) -> "OnnxArtefact":
    """Writes what `make` makes of the model's traced graph in the file that it is given, with all that is said above.

    Args:
        target: a name of `EXPORTERS`.
        make: its last two arguments are the text that ranges are measured on, and the file to write.
        verified: how far the form was verified, for the metadata.
    """
    require_extra()
    from lowprec.onnx.targeted import write_for

    return write_for(
        target,
        request.form,
        request.source,
        request.out,
        request.module,
        request.inputs,
        request.sizes if request.form in EXPORTERS[target].fixed else None,
        make=make,
        verified=verified,
    )


EXPORTERS: Registry[Exporter] = Registry("export target", "lowprec.targets")


def export_for(
    target: str,
    source: str | Path,
    out: str | Path,
    *,
    form: str | None = None,
    sequence: int | None = None,
    past: int | None = None,
    module: "nn.Module | None" = None,
    inputs: "Mapping[str, Tensor] | None" = None,
) -> "OnnxArtefact":
    """Writes an artefact for a runtime that is not on this machine.

    Args:
        target: a name of `EXPORTERS`.
        source: the folder of a finished run, or that of its artefact.
        out: the folder to write; an existing one must be empty or an earlier export.
        form: one of the target's; None for its first.
        sequence, past: tokens of a call and of the cache before it, for forms of fixed sizes; None for the default.
        module, inputs: as for `lowprec.onnx.export_onnx`.

    Raises:
        ConfigError: an unknown target or form; sizes, or a module, for a form that takes none.
        UnsupportedError: the model, or a layer of it, has no form there; reasons.
        ArtifactError: a damaged artefact, or a folder that cannot be written.
    """
    found = EXPORTERS[target]
    chosen = found.forms[0] if form is None else form
    if chosen not in found.forms:
        raise ConfigError(f"unknown form {chosen!r} of {target}: {closest(chosen, found.forms)}")
    if chosen not in found.fixed and (sequence is not None or past is not None):
        raise ConfigError(f"sizes are free in the form {chosen} of {target}: give neither sequence nor past")
    if chosen in found.whole and (module is not None or inputs is not None):
        others = ", ".join(name for name in found.forms if name not in found.whole)
        raise ConfigError(
            f"the form {chosen} of {target} is that of a model that is whole in its artefact: give neither module nor "
            "inputs" + (f", or take another form: {others}" if others else "")
        )
    return found.write(
        Request(
            source=Path(source), out=Path(out), form=chosen, sequence=sequence, past=past, module=module, inputs=inputs
        )
    )
