"""What a run says that it held, and what it hands back."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from lowprec.steps import memory

MB = 1 << 20
LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


@LINUX
def test_the_peak_is_the_programs_own_and_not_that_of_who_started_it() -> None:
    held = bytearray(512 * MB)
    held[:: 4 * 1024] = bytes(len(held[:: 4 * 1024]))
    assert memory.peak_memory_bytes() > len(held)
    code = f"import runpy; print(runpy.run_path({memory.__file__!r})['peak_memory_bytes']())"
    found = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert 0 < found < len(held) / 2


def test_a_system_that_does_not_say_is_asked_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self: "Name: python\nVmRSS: 1 kB\n")
    assert memory.peak_memory_bytes() > 10 * MB


@LINUX
def test_what_is_free_between_small_tensors_goes_back() -> None:
    # Of a size that glibc does not map by itself once it has seen larger ones freed.
    torch.ones(16 * MB).sum()
    kept, passing = [], []
    for _ in range(256):
        passing.append(torch.ones(MB // 4))
        kept.append(torch.ones(64))
    before = psutil.Process().memory_info().rss
    passing.clear()
    memory.trim()
    assert before - psutil.Process().memory_info().rss > 128 * MB
    assert len(kept) == 256
