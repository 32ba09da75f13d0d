"""Where gradients live and who adds them: memory and arithmetic, chosen once."""

from __future__ import annotations

from .base import Device, DType, dtype_of

__all__ = ["DType", "Device", "dtype_of", "get"]


def get(name: str = "cpu") -> Device:
    """The device of that name.

    Raises:
        ValueError: there is no such device.
    """
    if name == "cpu":
        from . import kernels
        from .cpu import CpuDevice

        return CpuDevice(kernels.load())
    raise ValueError(f"device: {name!r} is not one of: cpu")
