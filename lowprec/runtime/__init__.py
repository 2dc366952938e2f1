"""Running a quantised model with torch: kernel choice, the quantised linear layer, and conversion of a model."""

from lowprec.runtime.convert import convert_
from lowprec.runtime.dispatch import KernelTable
from lowprec.runtime.linear import QuantLinear

__all__ = ["KernelTable", "QuantLinear", "convert_"]
