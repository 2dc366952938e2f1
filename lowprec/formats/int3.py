"""INT3 weights: symmetric, one bfloat16 scale for each row and group of 128, 64 or 32 columns.

    codes = clamp(round(w / s), -4, 3)        w ~ s * codes

Stored as 32 codes to three int32 words by the compressed-tensors packing. Scales are searched as INT4's are. For models
that stand it, or for the layers that do: eight levels cost several times the loss of sixteen, so this family is offered
when it is asked for.
"""

from lowprec.formats.base import WEIGHT_FORMATS
from lowprec.formats.integer import SymmetricInteger
from lowprec.formats.schemes import GROUP_SIZES

for _size in GROUP_SIZES:
    WEIGHT_FORMATS.register(f"int3-g{_size}", SymmetricInteger(name=f"int3-g{_size}", bits=3, group_size=_size))
