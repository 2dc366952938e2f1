"""Rewrites of a model that leave its function as it is and make it easier to round."""

from lowprec.transforms.merge import Merge, Smoothed, keys_of, merged, smoothed_of
from lowprec.transforms.smoothing import fit_exponents

__all__ = ["Merge", "Smoothed", "fit_exponents", "keys_of", "merged", "smoothed_of"]
