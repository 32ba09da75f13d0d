"""The streams of a node's ranks wait for each other, in one program.

The hosts wait only for one another's word (``counters``) that an event was recorded, since a wait
for a foreign event means its last record.

    host      record, then tell       see that all have told        go on, far ahead of the device
    stream    ... -> event            wait for all events -> work
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..device import Stream
from .base import Region, Transport, Wait
from .counters import Counters
from .ipc_memory import IpcBuffer
from .signals import Signals


class Order:
    """In what order one program's stream and those of its peers work.

    Args:
        transport: whose ranks the peers are.

    Attributes:
        stream: that works on the region.
        others: the other ranks of the node.
    """

    def __init__(
        self, transport: Transport, signals: Signals, buffer: IpcBuffer, region: Region
    ) -> None:
        assert region.stream is not None, "a stream does the work on a region of a device"
        self.stream: Stream = region.stream
        self._buffer = buffer  # lives as long as views of its memories do
        self.others = [who for who in range(transport.size) if who != transport.rank]
        self._signals = signals
        self._counters = Counters(buffer.slots, transport.name, transport.ranks, transport.rank)
        # A peer that comes late finds an event of this program in place of one of the last on the
        # same line, which it then has to stand for.
        last = buffer.used.get(self._counters.slot, self.stream)
        self._after = [last.record()] if last is not self.stream else []

    def begin(self) -> None:
        self._counters.begin()
        self._follow()

    def _follow(self) -> None:
        while self._after:
            self.stream.wait(self._after.pop())

    def enter(self, step: int) -> None:
        """What was given so far comes before the step, for all who wait for it."""
        self._counters.enter(step, self._signals.record(self.stream))

    def leave(self, step: int) -> None:
        """What was given so far is the step, for all who wait for its end."""
        self._counters.leave(step, self._signals.record(self.stream))

    def entered(self, peers: Iterable[tuple[int, int]]) -> Iterator[Wait]:
        """Go on once each (rank, step) has entered its step."""
        return self._until(Counters.ENTERED, list(peers))

    def left(self, peers: Iterable[tuple[int, int]]) -> Iterator[Wait]:
        """Go on once each (rank, step) has left its step."""
        return self._until(Counters.LEFT, list(peers))

    def _until(self, which: int, peers: list[tuple[int, int]]) -> Iterator[Wait]:
        yield self._counters.until(which, peers)
        for who in dict(peers):
            self._signals.wait(self.stream, who, self._counters.note(which, who))

    def close(self) -> None:
        self._follow()  # it may never have run, and the next on the line waits for this stream
        self._buffer.used[self._counters.slot] = self.stream
        self._counters.close()
