"""The artefact in the files of a runtime that has its own, and the model that the runtime loads from them."""

from pathlib import Path

from torch import nn

from lowprec.artifacts.digests import FILE_NAME, verify_digests
from lowprec.pipeline.choose import Chosen
from lowprec.records import Deployed, digest
from lowprec.steps.memory import give_back_memory
from lowprec.targets import RuntimeTarget
from lowprec.version import __version__

LEAST_ROOM = 64


def deployed_path(chosen: Chosen, runtime: RuntimeTarget) -> Path:
    """Where the runtime's files lie."""
    return chosen.prepared.context.folder.path / runtime.form


def loaded_by(chosen: Chosen, runtime: RuntimeTarget, path: Path) -> nn.Module:
    """The model in the runtime's files at `path`, with room for an answer of the workload."""
    return runtime.load(path, max(LEAST_ROOM, chosen.prepared.context.settings.workload.output_tokens))


def deploy(chosen: Chosen, runtime: RuntimeTarget, artefact: Path) -> Deployed:
    """Writes the artefact in the runtime's files, unless an earlier run has: whole, and of this artefact."""
    context = chosen.prepared.context
    out = deployed_path(chosen, runtime)
    inputs = {
        "codes": chosen.solved_inputs["codes"],
        "plan": digest(repr(chosen.plan.groups)),
        "target": f"{runtime.name} by lowprec {__version__}",
    }
    earlier: Deployed | None = context.folder.read_step("deployed", inputs, Deployed)
    if earlier is not None and (out / FILE_NAME).exists() and not verify_digests(out):
        context.progress.skip("deploy", "written by an earlier run")
        return earlier
    with context.progress.step("deploy"):
        made = runtime.deploy(artefact, out)
    give_back_memory()
    context.folder.write_step("deployed", made, inputs)
    return made
