"""Compiles the few kernels in C++ that torch has no operator for, when they are first asked for, once for a machine.

A library is kept in the user's cache under a digest of its source, flags, compiler and torch, so that another version
never meets it, and machines that share a home directory but not a processor do not either: the instructions are flags.
It is plain C to the outside and runs on torch's own threads. Where it cannot be built, NativeError has the reason,
which callers pass on: nothing slower is run unsaid.

    CXX             the compiler (default: the first of c++, g++, clang++)
    LOWPREC_CACHE   where libraries are kept (default: lowprec in the user's cache folder)

Left out: systems other than Linux.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

COMPILERS = ("c++", "g++", "clang++")
COMMON = ("-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-shared", "-fopenmp")
# Instruction sets, the best first: what torch calls the probe, and the compiler's flags.
VNNI = ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
AVX2 = ("-mavx2", "-mfma")
NEON = ("-march=armv8.2-a+dotprod",)
SECONDS = 300
# Lines of the compiler's complaint that are passed on.
COMPLAINT_LINES = 3


class NativeError(RuntimeError):
    """A library that cannot be had here; the message says why and what to do."""


def instructions() -> tuple[str, ...]:
    """Flags for the best instructions that this processor has and a kernel may use."""
    features = _features()
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"} <= features:
        return VNNI
    if {"avx2", "fma"} <= features:
        return AVX2
    return NEON if "asimddp" in features else ()


def _features(path: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What the processor says that it can do; empty where the system does not tell."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return set()
    return next(
        (set(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))), set()
    )


def cache_folder() -> Path:
    """Where libraries are kept."""
    if chosen := os.environ.get("LOWPREC_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowprec"


def compiler() -> str:
    """The C++ compiler.

    Raises:
        NativeError: there is none.
    """
    asked = os.environ.get("CXX")
    found = shutil.which(asked) if asked else next(filter(None, map(shutil.which, COMPILERS)), None)
    if found is None:
        looked = f"CXX={asked}" if asked else ", ".join(COMPILERS)
        raise NativeError(f"no C++ compiler was found ({looked}): install one, for example g++, or set CXX")
    return found


def library(source: Path, flags: tuple[str, ...] | None = None) -> ctypes.CDLL:
    """The loaded library of a source file; `flags` None asks for this processor's instructions.

    Raises:
        NativeError: it cannot be built here.
    """
    return _library(source, instructions() if flags is None else flags)


@functools.cache
def _library(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    if sys.platform != "linux":
        raise NativeError(f"kernels in C++ are built on Linux alone, this is {sys.platform}")
    cxx = compiler()
    path = cache_folder() / f"{source.stem}-{_key(source, flags, cxx)}.so"
    if not path.exists():
        _build(cxx, source, flags, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeError(f"{path} cannot be loaded ({error}): delete it, then run again") from error


def _key(source: Path, flags: tuple[str, ...], cxx: str) -> str:
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=False, timeout=SECONDS).stdout
    parts = (source.read_text(), *COMMON, *flags, cxx, version, torch.__version__)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _build(cxx: str, source: Path, flags: tuple[str, ...], path: Path) -> None:
    includes = [f"-isystem{folder}" for folder in cpp_extension.include_paths()]
    links = [f"-L{folder}" for folder in cpp_extension.library_paths()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".building")
        os.close(descriptor)
    except OSError as error:
        raise NativeError(f"{path.parent} cannot be written ({error}): set LOWPREC_CACHE to another folder") from error
    command = [cxx, *COMMON, *flags, *includes, str(source), *links, "-lc10", "-ltorch_cpu", "-o", temporary]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise NativeError(f"{cxx} cannot build {source.name}: {' / '.join(lines[:COMPLAINT_LINES])}")
        # Renamed when it is whole: another process that builds the same one at the same time does no harm.
        os.replace(temporary, path)
    except subprocess.TimeoutExpired as error:
        raise NativeError(f"{cxx} did not build {source.name} within {SECONDS} s: try again") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
