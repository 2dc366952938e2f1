"""Launchers run without a GPU, for what they compile: every variant lands in Triton's cache on disk.

Tensors are PyTorch's fake ones, so they say that they are on a CUDA device and own no memory, and Triton gets a driver
that names the target and launches nothing. What is compiled is thus what the launcher would have launched, with its own
specialisation of strides and sizes. `Target` describes the device; the defaults are an H100.

The small C module that passes the arguments is built as well where a CUDA driver is installed: Triton needs one for
each signature, and builds it with the C compiler at the first launch.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

VARIABLE = "LOWPREC_BENCH_TARGET"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A device as launchers ask for it."""

    name: str = "NVIDIA H100 80GB HBM3"
    arch: int = 90
    multi_processor_count: int = 132
    shared_memory_per_block_optin: int = 232448

    @classmethod
    def here(cls) -> "Target":
        """The device of this process."""
        p = torch.cuda.get_device_properties(0)
        return cls(
            name=p.name,
            arch=10 * p.major + p.minor,
            multi_processor_count=p.multi_processor_count,
            shared_memory_per_block_optin=p.shared_memory_per_block_optin,
        )

    @classmethod
    def asked(cls) -> "Target":
        """The one that the environment describes."""
        return cls(**json.loads(os.environ.get(VARIABLE, "{}")))

    def described(self) -> str:
        """What `asked` reads."""
        return json.dumps(asdict(self))


class _Driver:
    """A driver that knows the target alone."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._arch, 32)

    def get_device_interface(self) -> Any:
        return torch.cuda


def _properties(target: Target) -> SimpleNamespace:
    return SimpleNamespace(**asdict(target), major=target.arch // 10, minor=target.arch % 10)


def _warm(compiled: list[Any]) -> Any:
    """`JITFunction.run` that compiles, keeps the kernel in `compiled` and launches nothing."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def dry(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        # Where it is compiled in the background, this waits for it.
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        compiled.append(kernel)
        return kernel

    return dry


@contextlib.contextmanager
def dry(target: Target) -> Iterator[list[Any]]:
    """Within it tensors are fake, and launches only compile; yields the list of what was compiled."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled: list[Any] = []
    changes: list[tuple[Any, str, Any]] = [
        (JITFunction, "run", _warm(compiled)),
        (FakeTensor, "data_ptr", lambda self: 0),
        (torch.cuda, "get_device_properties", lambda *_: _properties(target)),
        (torch.cuda, "get_device_capability", lambda *_: divmod(target.arch, 10)),
        (torch.cuda, "get_device_name", lambda *_: target.name),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "device", lambda *_: contextlib.nullcontext()),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
    ]
    missing = object()
    saved = [(owner, name, owner.__dict__.get(name, missing)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    # Asking for the active driver would make one, which needs a device.
    before = driver._active
    driver.set_active(_Driver(target.arch))
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield compiled
    finally:
        driver.set_active(before)
        for owner, name, value in saved:
            if value is missing:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def build_launcher(kernel: Any) -> str | None:
    """Builds the C module that launches `kernel`; why it could not, where it could not (no CUDA driver to link)."""
    from triton.backends.nvidia.driver import CudaLauncher

    try:
        CudaLauncher(kernel.src, kernel.metadata)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
