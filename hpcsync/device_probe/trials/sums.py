"""The kernels that add, and torch on the same memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...device.base import Device, DType, dtype_of
from . import down, same, say, up

_COUNT = 70_001  # odd, and more than a block of threads takes
_NARROW = ("bfloat16", "float16")


def run(device: Device, _spec: str, _index: int, _env: Mapping[str, str]) -> None:
    """Add three arrays of each type into two: numbers that every type holds without rounding, and
    the smallest that it has, which have the bits of small integers, as their sums do."""
    import torch

    values = [np.arange(_COUNT) % (13 + 2 * each) for each in range(3)]
    stream = device.stream()
    for name in ("float32", *_NARROW):
        say(f"compiling and running the kernel that adds {name}")
        kind, dtype = dtype_of(name), getattr(torch, name)
        tensors = [torch.from_numpy(each.astype(np.float32)).to(dtype) for each in values]
        raw = [each.view(torch.uint8).numpy().view(kind.storage) for each in tensors]
        total = torch.from_numpy(np.sum(values, axis=0).astype(np.float32)).to(dtype)
        wanted = total.view(torch.uint8).numpy().view(kind.storage)
        _add(device, kind, raw, wanted, f"a sum of {name}")
        bits = np.dtype(f"uint{8 * kind.itemsize}")
        tiny = [each.astype(bits).view(kind.storage) for each in values]
        total_bits = np.sum(values, axis=0).astype(bits).view(kind.storage)
        _add(device, kind, tiny, total_bits, f"a sum of subnormal {name}")
    say("torch's view of the device's memory")
    memory = up(device, values[0].astype(np.float32))
    tensor = torch.utils.dlpack.from_dlpack(memory)
    stream.apply(lambda: tensor.mul_(3))
    stream.synchronize()
    same(down(device, memory), values[0].astype(np.float32) * 3, "what torch multiplied")


def _add(
    device: Device,
    kind: DType,
    values: Sequence[NDArray[Any]],
    wanted: NDArray[Any],
    what: str,
) -> None:
    stream = device.stream()
    sources = [up(device, each) for each in values]
    outs = [up(device, np.zeros(_COUNT, kind.storage)), sources[0]]
    stream.reduce(outs, sources, kind)
    stream.synchronize()
    for out in outs:
        same(down(device, out), wanted, what)
