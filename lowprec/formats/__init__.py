"""Number formats, one file each, and the schemes that combine a weight format with an activation format."""

from lowprec.formats.base import (
    ACTIVATION_FORMATS,
    CACHE_FORMATS,
    WEIGHT_FORMATS,
    ActivationFormat,
    CacheFormat,
    QuantizedWeight,
    WeightFormat,
    held_bits,
)
from lowprec.formats.schemes import (
    SCHEMES,
    for_tables,
    per_block,
    resolve,
    scheme_named,
    schemes_named,
    schemes_of_family,
)

__all__ = [
    "ACTIVATION_FORMATS",
    "CACHE_FORMATS",
    "SCHEMES",
    "WEIGHT_FORMATS",
    "ActivationFormat",
    "CacheFormat",
    "QuantizedWeight",
    "WeightFormat",
    "for_tables",
    "held_bits",
    "per_block",
    "resolve",
    "scheme_named",
    "schemes_named",
    "schemes_of_family",
]
