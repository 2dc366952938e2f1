"""Running a quantised model with torch: kernel choice, the quantised linear layer, conversion of a model; and without
torch what moves precision while it runs: the controller, its money and its view of the load.

Names are imported when they are first used: the controller needs no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowprec.runtime.convert import convert_
    from lowprec.runtime.dispatch import KernelTable
    from lowprec.runtime.linear import QuantLinear

_HOME = {"KernelTable": "dispatch", "QuantLinear": "linear", "convert_": "convert"}

__all__ = ["KernelTable", "QuantLinear", "convert_"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lowprec.runtime' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"lowprec.runtime.{_HOME[name]}"), name)
