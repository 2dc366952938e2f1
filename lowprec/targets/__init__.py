"""Runtimes that a plan is made for, one file each, and devices that can be planned for without having them."""

from lowprec.errors import UnsupportedError
from lowprec.targets.base import TARGETS, CacheTarget, ReadsAtOnce, RuntimeTarget, Target, weight_bytes
from lowprec.targets.roofline import DEVICES, device_target

__all__ = [
    "DEVICES",
    "TARGETS",
    "CacheTarget",
    "ReadsAtOnce",
    "RuntimeTarget",
    "Target",
    "device_target",
    "target_for",
    "weight_bytes",
]


def target_for(name: str, device: str | None = None) -> Target:
    """The target called `name`, or the model of `device` where that is not one of this machine's own ("cpu").

    Raises:
        ConfigError: unknown target or device, or packages of the target that are missing.
        UnsupportedError: a device of this machine whose kernels are not there yet, or that the target does not run on.
    """
    here = TARGETS[name]
    if device in (None, "cpu"):
        here.require()
        return here
    if isinstance(here, RuntimeTarget):
        raise UnsupportedError(
            f"target {name} cannot be planned for on device {device!r}", ("its times are measured on this CPU alone",)
        )
    if device == "cuda":
        from lowprec.targets.torch import TorchTarget

        return TorchTarget(device="cuda")
    assert device is not None
    return device_target(device)
