"""OpenVINO: a plan's graph in its intermediate representation, for CPUs of x86 and Arm.

`form` makes it of the canonical ONNX graph, `deploy` writes it, `module` runs it, `layers` runs and times single
layers. All but this file need the packages of the extra `openvino`.
"""

import importlib.metadata

from packaging.version import Version

from lowprec.errors import ConfigError

OLDEST = "2025.1"
"""The first whose CPU plugin takes the precision of the KV cache from a model; pyproject.toml asks for the same."""


def require_extra() -> None:
    """Raises ConfigError, with the remedy, when OpenVINO is missing or too old."""
    try:
        found = importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError:
        wrong = "openvino is missing"
    else:
        if Version(found) >= Version(OLDEST):
            return
        wrong = f"openvino is {found}, {OLDEST} is needed"
    raise ConfigError(f"the target openvino needs more packages ({wrong}): pip install --upgrade 'lowprec[openvino]'")
