"""INT6 weights: symmetric, one bfloat16 scale for each row.

    codes = clamp(round(w / s), -32, 31)        w ~ s * codes

Stored as 16 codes to three int32 words by the compressed-tensors packing; held as INT8, of which it uses a quarter of
the codes, while it runs. So it saves bytes in the file alone, and is offered where those are the objective: it loses
about a tenth of what INT4 in groups of 64 does, where a small budget would otherwise have to pay for INT8. Scales are
searched and errors compensated as INT4's are.
"""

from lowprec.formats.base import WEIGHT_FORMATS
from lowprec.formats.integer import SymmetricInteger

WEIGHT_FORMATS.register("int6", SymmetricInteger(name="int6", bits=6, group_size=None))
