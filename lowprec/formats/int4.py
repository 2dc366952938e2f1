"""INT4 weights: symmetric, one bfloat16 scale for each row and group of 128, 64 or 32 columns.

    codes = clamp(round(w / s), -8, 7)        w ~ s * codes

Stored as eight codes to an int32 by the compressed-tensors packing. The scale is the one that minimises the
importance-weighted squared error over a fixed set of shrunken absolute maxima (the clipping search of OCTAV and AWQ,
arXiv 2306.00978, section 3): plain absolute maximum wastes levels on outliers. With zero points:
`lowprec.formats.asymmetric`.
"""

from lowprec.formats.base import WEIGHT_FORMATS
from lowprec.formats.integer import SymmetricInteger
from lowprec.formats.schemes import GROUP_SIZES

for _size in GROUP_SIZES:
    WEIGHT_FORMATS.register(f"int4-g{_size}", SymmetricInteger(name=f"int4-g{_size}", bits=4, group_size=_size))
