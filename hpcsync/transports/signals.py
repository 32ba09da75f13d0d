"""Events of the ranks of a node that one another's streams wait for.

A driver has room for some thousands of events between processes, and a job may have that many
programs. So each stream of a rank has a few, recorded in turn. Who waits for a record that a later
one has replaced waits for the later one: on the same stream that is longer, never too little. And
nobody waits in a circle, since all that is waited for was given to its stream before.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..device import Device, Event, Stream
from ..device.base import SharedEvent
from ..errors import HpcsyncError

_STREAMS = 8
_EACH = 8  # events of a stream


class Signals:
    """The events of all ranks of a node."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._own: list[SharedEvent] = []
        self._every: list[list[Event]] = []
        self._streams: list[Stream] = []
        self._turns = [0] * _STREAMS

    def make(self) -> str:
        """Make this rank's events; what the ``open`` of all ranks needs.

        Raises:
            DeviceError: the device shares none.
        """
        self._own = [self._device.shared_event() for _ in range(_STREAMS * _EACH)]
        return json.dumps([event.handle.hex() for event in self._own])

    def open(self, handles: Sequence[str]) -> None:
        """Open the events of each rank, by rank.

        Raises:
            DeviceError: one cannot be opened.
        """
        for text in handles:
            self._every.append(
                [self._device.open_event(bytes.fromhex(handle)) for handle in json.loads(text)]
            )

    def record(self, stream: Stream) -> int:
        """The number of an event at the end of what was given to the stream."""
        lane = self._lane(stream)
        number = lane * _EACH + self._turns[lane]
        self._turns[lane] = (self._turns[lane] + 1) % _EACH
        stream.record(self._own[number])
        return number

    def wait(self, stream: Stream, rank: int, number: int) -> None:
        """Let the stream wait for the event of that number, which ``rank`` has recorded."""
        stream.wait(self._every[rank][number])

    def synchronize(self) -> None:
        """Sleep until all streams that were recorded are done with what was given to them."""
        for stream in self._streams:
            stream.synchronize()

    def _lane(self, stream: Stream) -> int:
        if stream not in self._streams:
            if len(self._streams) == _STREAMS:
                raise HpcsyncError(f"more than {_STREAMS} streams exchange with other processes")
            self._streams.append(stream)
        return self._streams.index(stream)
