"""Memory of the process: handed back to the system, and the most that there was.

glibc keeps what was freed below its mapping threshold (up to 32 MB a piece, so nearly every weight) for later use, and
since stages allocate in other sizes, a run would hold the sum of what its stages need instead of the largest. Within a
pass it is the same wherever small results are kept between large passing ones: of 5.8 GB that a run of the 135M
demo held behind such a pass 4.0 GB were free.
"""

import ctypes
import gc
import resource
import sys
from pathlib import Path


def give_back_memory() -> None:
    """Collects garbage and lets the C library return free pages: for the end of a stage."""
    gc.collect()
    trim()


def trim() -> None:
    """Lets the C library return free pages, where it can (`malloc_trim` of glibc).

    For the end of a block, of a pass, and of a batch that had logits.
    """
    found = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if found is not None:
        found(0)


def peak_memory_bytes() -> int:
    """The most that this program has held at a time.

    `getrusage` outlives exec on Linux: of a program that a larger one has started it gives that one's peak.
    """
    status = Path("/proc/self/status")
    # Some sandboxes have the file without this line.
    if status.exists() and (found := status.read_text().partition("VmHWM:")[2].split()):
        return int(found[0]) * 1024
    # In bytes on macOS, in KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
