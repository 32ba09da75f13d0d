"""Trials of a device, each in a module of its name: ``run`` tries, and raises if it fails.

They are programs for a child that may crash or hang, and say before each step what is tried.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...children import tell
from ...device.base import Array, Device

NBYTES = (1 << 22) + 4096 + 64  # not a round number: ends are where mistakes show


class FailedError(Exception):
    """A trial came out wrong; the text says how."""


def say(step: str) -> None:
    """What is tried next; it may be the last that is heard."""
    tell(step=step)


def pattern(nbytes: int, seed: int) -> NDArray[np.uint8]:
    """Bytes that no other seed gives."""
    made: NDArray[np.uint8] = np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)
    return made


def up(device: Device, values: NDArray[Any]) -> Array:
    """A copy in the device's memory, there when this returns."""
    flat = values.view(np.uint8)
    pinned, memory = device.pinned(flat.shape[0]), device.empty(flat.shape[0])
    pinned[:] = flat
    put(device, memory, pinned)
    return memory.view(values.dtype)


def put(device: Device, memory: Array, pinned: NDArray[Any]) -> None:
    """Copy to the device, and wait until it is done."""
    stream = device.stream()
    stream.copy(memory, pinned)
    stream.synchronize()


def down(device: Device, memory: Array) -> NDArray[Any]:
    """A copy in host memory, after all work of the device's streams that the host waited for."""
    flat = memory.view(np.uint8)
    pinned = device.pinned(int(flat.shape[0]))
    pinned[:] = 0
    stream = device.stream()
    stream.copy(pinned, flat)
    stream.synchronize()
    found: NDArray[Any] = pinned.copy().view(memory.dtype)
    return found


def same(found: NDArray[Any], wanted: NDArray[Any], what: str) -> None:
    """Compare, bit for bit.

    Raises:
        FailedError: they differ.
    """
    wrong = np.flatnonzero(found.view(np.uint8) != wanted.view(np.uint8))
    if wrong.size:
        raise FailedError(f"{what}: {wrong.size} of {found.nbytes} bytes came out wrong")
