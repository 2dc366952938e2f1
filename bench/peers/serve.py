"""A contender as a process: reads requests, a JSON object a line, does the work and answers with the seconds.

Standard library alone, because each runtime has an environment of its own. Requests: {"prompt": 512, "tokens": 64}, so
many tokens to read and to make; answers: {"prefill": s, "decode": s, "made": [ids], ...}. Prefill ends with the first
token, decode is all others; "worked" are the seconds that processors spent on both.
"""

import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter, process_time

Made = Callable[[list[int], int], Iterator[int]]


def text(count: int, vocabulary: int) -> list[int]:
    """Token ids of no meaning, the same for all."""
    return [3 + (i * 7919) % (vocabulary - 3) for i in range(count)]


def peak() -> int:
    """Most bytes that this program has held. What getrusage says outlives exec: it may be those of who started it."""
    status = Path("/proc/self/status")
    # Some sandboxes have the file without this line.
    if status.exists() and (found := status.read_text().partition("VmHWM:")[2].split()):
        return int(found[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve(made: Made, vocabulary: int, versions: dict[str, str]) -> None:
    """Answers requests until there are none; `made` makes tokens one by one."""
    # What a runtime prints goes elsewhere: one line is one answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"versions": versions}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        tokens = made(text(asked["prompt"], vocabulary), asked["tokens"])
        start, worked = perf_counter(), process_time()
        found = [next(tokens)]
        first = perf_counter()
        found += tokens
        end = perf_counter()
        answer = {
            "prefill": first - start,
            "decode": end - first,
            "worked": process_time() - worked,
            "made": found,
            "peak_bytes": peak(),
        }
        print(json.dumps(answer), file=answers, flush=True)
