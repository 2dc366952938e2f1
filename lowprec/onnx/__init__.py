"""ONNX: one plan for every runtime that is not PyTorch, in a standard form, checked before it counts as written.

`graph` makes a graph of a model, `canonical` puts codes into the place of its planned weights, `runtime_form` does so
in the operators of onnxruntime, `folder` writes it, `checks` shows that it computes what the artefact does, `session`
runs it in onnxruntime. All but this file need the packages of the extra `onnx`.
"""

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.version import Version

from lowprec.errors import ConfigError
from lowprec.registry import closest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lowprec.onnx.folder import OnnxArtefact

EXPORT_TARGETS = ("onnx", "onnxruntime")
ACCURACIES = ("planned", "exact", "fast")
KEEP = "logits_to_keep"
"""Input of decoders for onnxruntime: of how many last tokens logits are wanted, 0, its default, for all."""
NEEDED = {"onnx": "1.20", "onnx-ir": "1.1", "onnxscript": "0.7", "onnxruntime": "1.23"}
"""Package -> the oldest version with what is used here; pyproject.toml asks for the same."""
RUNTIME_NEEDED = {**NEEDED, "onnxruntime": "1.32"}
"""The form for onnxruntime takes more: padding is told to GroupQueryAttention by an input that is new there."""


def check_target(name: str, accuracy: str = "planned", known: Sequence[str] = EXPORT_TARGETS) -> None:
    """Raises ConfigError when nothing can be exported for a target called `name` at such an accuracy."""
    if name not in known:
        raise ConfigError(f"unknown export target {name!r}: {closest(name, known)}")
    if accuracy not in ACCURACIES:
        raise ConfigError(f"unknown accuracy {accuracy!r}: {closest(accuracy, ACCURACIES)}")
    if name != "onnxruntime" and accuracy != "planned":
        raise ConfigError(
            f"the target {name} leaves it to the runtime how inputs are rounded: no accuracy {accuracy!r}"
        )


def require_extra(needed: Mapping[str, str] = NEEDED) -> None:
    """Raises ConfigError, with the remedy, when a package of the extra `onnx` is missing or too old."""
    wrong = []
    for name, oldest in needed.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
        else:
            if Version(found) < Version(oldest):
                wrong.append(f"{name} is {found}, {oldest} is needed")
    if wrong:
        raise ConfigError(f"ONNX needs more packages ({'; '.join(wrong)}): pip install --upgrade 'lowprec[onnx]'")


def export_onnx(
    source: str | Path,
    out: str | Path,
    *,
    module: "nn.Module | None" = None,
    inputs: "Mapping[str, Tensor] | None" = None,
    target: str = "onnx",
    accuracy: str = "planned",
) -> "OnnxArtefact":
    """Writes an artefact as ONNX; weights are what the artefact says, bit for bit.

    `target` "onnx": standard operators of opset 21, codes that DequantizeLinear reads. Inputs are rounded nowhere, in
    no scheme; embeddings in codes become float32, as all that is not quantised.

    `target` "onnxruntime": operators of onnxruntime for CPUs, embeddings in codes included (`lowprec.onnx.Session`
    runs it). How inputs meet integer weights is `accuracy`: "exact" in float32; "fast" rounded to INT8 block by block,
    which is another scheme than w4a16 and w8a16; "planned" as the scheme of each layer says.

    Args:
        source: the folder of a finished run, or that of its artefact.
        out: the folder to write; an existing one must be empty or an earlier ONNX export.
        module: the module of yours, with the weights it had, of an artefact that holds only its layers; not changed.
        inputs: name -> example, [batch, ...] with a batch of at least two, of such a module's forward.
        target, accuracy: see above; the accuracy of "onnx" is "planned" alone.

    Returns:
        Where it lies, how far its outputs were from the artefact's in torch, and what is to be known about it.

    Raises:
        ConfigError: the extra is not installed; arguments that do not go together.
        UnsupportedError: a model that cannot be made a graph, or a planned layer that is not found in it.
        ArtifactError: a damaged artefact, a folder that cannot be written, or a graph that computes something else.
    """
    check_target(target, accuracy)
    require_extra(NEEDED if target == "onnx" else RUNTIME_NEEDED)
    from lowprec.onnx.folder import write_onnx

    return write_onnx(Path(source), Path(out), module, inputs, target, accuracy)
