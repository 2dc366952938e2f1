"""A finished INT4 artefact to one of two levels: `nest_artefact`.

The folder is copied as it is, so its INT4 model stays the same byte for byte; residual.safetensors is added, and
digests.json lists it. What it takes is the model that the artefact was made from, whose weights level 8 comes close to,
and text to sum Hessians over.
"""

import dataclasses
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lowprec.artifacts.compressed_tensors import write_folder
from lowprec.artifacts.digests import write_digests
from lowprec.artifacts.folder import RunFolder
from lowprec.artifacts.loading import read_back
from lowprec.artifacts.nested import RESIDUAL, add_residual, stored_bits_per_weight
from lowprec.errors import ArtifactError, ModelError
from lowprec.formats import QuantizedWeight
from lowprec.pipeline.context import context_of
from lowprec.pipeline.prepare import prepare
from lowprec.records import digest
from lowprec.report import RunProgress
from lowprec.settings import Settings, effort_named
from lowprec.steps.data import MINIMUM_TOKENS
from lowprec.steps.linear import weight_of
from lowprec.steps.load import Model, load
from lowprec.steps.nest import nest
from lowprec.steps.scratch import Scratch
from lowprec.steps.stream import Stream

# Of a weight's norm: more than this is lost by no INT4 rounding of the very weight.
LARGEST_LOSS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class NestedArtefact:
    """What was written: the folder, its layers of two levels and of one, and a nested weight's bits in its files."""

    path: Path
    layers: tuple[str, ...]
    single: tuple[str, ...]
    bits_per_weight: float


def nest_artefact(
    artefact: Path | str,
    model: Model | str | Path,
    out: Path | str,
    *,
    data: Sequence[str | Path] = (),
    calibration_tokens: int = 18_432,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: RunProgress | None = None,
) -> NestedArtefact:
    """Writes a copy of an artefact that has a second level.

    Args:
        artefact: the folder of a finished one, in either form; layers of other schemes than INT4 in groups keep theirs.
        model: what it was made from: a Hugging Face name or folder, a GGUF file, or what `load` or `wrap` returned.
        out: the folder to write; an earlier artefact there is replaced, only after success.
        data: text, as for `optimize`; empty for the offline default.
        calibration_tokens: how many tokens Hessians are summed over.

    Raises:
        ArtifactError: a missing or damaged artefact, one that has two levels, or a folder that cannot be written.
        UnsupportedError: no layer is INT4 in groups.
        ModelError: the artefact was made from other weights.
        LowprecError: a model or text that cannot be used.
    """
    artefact, out = Path(artefact), Path(out)
    if (artefact / RESIDUAL).exists():
        raise ArtifactError(artefact, f"has two levels already ({RESIDUAL}); give an artefact of one")
    solved = read_back(artefact)
    # Nothing is judged here: the other splits are as small as they may be.
    effort = dataclasses.replace(
        effort_named("fast"), name="nest", calibration_tokens=calibration_tokens, sensitivity_tokens=MINIMUM_TOKENS,
        tuning_tokens=MINIMUM_TOKENS, held_out_tokens=MINIMUM_TOKENS,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as place, progress or RunProgress() as shown:
        settings = Settings(
            out=Path(place), effort=effort, smooth=False, embeddings=True, data=tuple(map(str, data)), seed=seed
        )
        with RunFolder(place) as folder:
            with shown.step("load"):
                loaded = model if isinstance(model, Model) else load(model, trust_remote_code=trust_remote_code)
            prepared = prepare(context_of(loaded, settings, folder, shown))
            _check_belongs(prepared.stream, solved, artefact)
            scratch = Scratch(Path(place) / "work", digest(*prepared.inputs.values()))
            with shown.step("nest", prepared.stream.depth + 1, "blocks") as step:
                nested = nest(
                    prepared.stream, prepared.groups, solved, prepared.statistics_batches, loaded.outcome, scratch,
                    step.report,
                )  # fmt: skip

        def fill(fresh: Path) -> None:
            shutil.copytree(artefact, fresh, dirs_exist_ok=True)
            add_residual(fresh, nested)
            write_digests(fresh)

        write_folder(out, sum(file.stat().st_size for file in artefact.rglob("*") if file.is_file()), fill)
    return NestedArtefact(
        path=out,
        layers=tuple(nested),
        single=tuple(layer for layer in solved if layer not in nested),
        bits_per_weight=stored_bits_per_weight(out),
    )


def _check_belongs(stream: Stream, solved: Mapping[str, QuantizedWeight], artefact: Path) -> None:
    """Refuses a model that these codes are not of, or that was changed before it was rounded (turned, merged)."""
    for layer, weight in solved.items():
        if layer not in stream.weighted:
            raise ModelError(f"{artefact} has codes for {layer}, which this model does not have; give its own model")
        dense = weight_of(stream.weighted[layer]).float()
        if dense.shape != weight.codes.shape:
            raise ModelError(f"{layer}: codes are {tuple(weight.codes.shape)}, the weight is {tuple(dense.shape)}")
        distance, norm = (float(torch.linalg.vector_norm(x)) for x in (weight.dequantize() - dense, dense))
        # Of a layer of zeros nothing is lost by codes of zeros, and by others more than all.
        lost = distance / norm if norm else math.inf if distance else 0.0
        if not lost <= LARGEST_LOSS:
            raise ModelError(
                f"{layer}: the codes in {artefact} are {lost:.0%} of the weight's norm away from it: they were made "
                "from another model, or from this one in another basis (--rotate) or with merged scales (--smooth)"
            )
