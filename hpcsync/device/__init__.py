"""Where gradients live and who adds them: memory, streams and arithmetic, chosen once."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from . import kernels
from .base import Device, DType, Event, Stream, dtype_of
from .cpu import CpuDevice

__all__ = ["CpuDevice", "DType", "Device", "Event", "Stream", "dtype_of", "get", "host"]

DEVICES: Mapping[str, tuple[str, str]] = {"cuda": ("hpcsync.device.cuda", "CudaDevice")}


def host() -> CpuDevice:
    """The host's memory and processor."""
    return CpuDevice(kernels.load())


def get(name: str = "cpu", index: int = 0) -> Device:
    """The device of that name.

    Args:
        index: which of several, as torch counts them.

    Raises:
        ValueError: there is no such device.
        DeviceError: it cannot be used; the text says why, and what to do.
    """
    if name == "cpu":
        return host()
    if name not in DEVICES:
        raise ValueError(f"device: {name!r} is not one of: cpu, {', '.join(DEVICES)}")
    module, kind = DEVICES[name]
    made: Device = getattr(importlib.import_module(module), kind)(index)
    return made
