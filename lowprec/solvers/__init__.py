"""Rounding algorithms, one file each."""

from lowprec.solvers.base import SOLVERS, LayerStatistics, Solver

__all__ = ["SOLVERS", "LayerStatistics", "Solver"]
