"""Hands freed memory back to the system between stages.

glibc keeps what was freed below its mapping threshold (up to 32 MB a piece, so nearly every weight) for later use, and
since stages allocate in other sizes, a run would hold the sum of what its stages need instead of the largest.
"""

import ctypes
import gc


def give_back_memory() -> None:
    """Collects garbage and lets the C library return free pages, where it can (`malloc_trim` of glibc)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
