"""Memory, pinned memory, copies and events of a device."""

from __future__ import annotations

from collections.abc import Mapping

from ...device.base import Device
from . import NBYTES, pattern, same, say


def run(device: Device, _spec: str, _index: int, _env: Mapping[str, str]) -> None:
    """Copy down one stream and up another, which waits for the first by an event."""
    say("copying to the device's memory and back")
    given, found = device.pinned(NBYTES), device.pinned(NBYTES)
    given[:], found[:] = pattern(NBYTES, 1), 0
    first, second = device.stream(), device.stream()
    memory, copy = device.empty(NBYTES), device.empty(NBYTES)
    first.fill(memory, 0xFF)
    first.copy(memory, given)
    made = first.record()
    second.wait(made)
    second.copy(copy, memory)
    second.copy(found, copy)
    second.record().synchronize()
    same(found, given, "a copy")
