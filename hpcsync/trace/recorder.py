"""The recorder of a rank: its last spans, in a ring that was made beforehand.

    start = now()                          a clock read
    ...
    recorder.add(SPAN, start, now())       a clock read and a store

Nothing is allocated but short-lived integers, and nothing is written: whoever keeps traces reads
the ring, which may stand in memory that other processes of the node see. A span whose children are
recorded before it takes its number first (``number``) and hands it on as their parent.

The ring is a header of ``HEADER`` bytes and slots of ``events.EVENT``. The header counts the spans
that were ever stored (int64 at 0), the step in progress (int64 at 8) and the last step that is
over (int64 at 16). A reader takes what lies between two counts, and what the writer overwrote
meanwhile is lost: ``Ring.lost`` says how much.
"""

from __future__ import annotations

import itertools
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from time import perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .events import EVENT, LANE, NAMES, Events
from .events import Span as Span
from .later import Later, Timed

HEADER = 64
_EVENT = struct.Struct("<qqqqqiiHBBI")
now = perf_counter_ns
_pack = _EVENT.pack_into
_pack_count = struct.Struct("<q").pack_into
assert _EVENT.size == EVENT.itemsize

Bytes = NDArray[np.uint8]


def _span(name: str, lane: str) -> Span:
    return Span(NAMES.index((name, lane)), LANE[lane])


STEP = _span("step", "step")
DATA = _span("batch", "data")
FORWARD = _span("forward", "forward")
BACKWARD = _span("backward", "backward")
OPTIMIZER = _span("optimizer", "optimizer")
EXPOSED = _span("exposed", "wait")
DRIVEN = _span("driven", "wait")
AGREEMENT = _span("agreement", "wait")
FILL = _span("fill", "queue")
QUEUED = _span("queued", "queue")
BUCKET = _span("bucket", "bucket")
ENCODE = _span("encode", "encode")
COMBINE = _span("combine", "encode")
DECODE = _span("decode", "decode")
CHECKPOINT = _span("checkpoint", "checkpoint")
WIRE = {level: _span("transfer", f"wire.{level}") for level in ("node", "rail", "world")}


def room(events: int) -> int:
    """Bytes of memory for a ring of so many spans."""
    return HEADER + events * EVENT.itemsize


class Recorder:
    """Records spans of one rank; any thread may.

    Args:
        memory: zeroed, ``room(events)`` bytes; made here if not given.
        events: spans that the ring holds; at least 1.

    Attributes:
        step: of the spans that come; from 1.
        later: spans of a device, whose times are not known yet.
    """

    def __init__(self, events: int = 4096, memory: Bytes | None = None) -> None:
        if memory is None:
            memory = np.zeros(room(events), np.uint8)
        self.events = (memory.shape[0] - HEADER) // EVENT.itemsize
        self._memory = memory
        self._view = memory.data
        self._numbers = itertools.count(1)
        self._stored = 0
        self._lock = threading.Lock()
        self._main = threading.main_thread().ident
        self.step = 0
        self.parent = 0  # of spans that name none
        self.offset = 0  # what to add to times to get rank 0's, as it was measured last
        self.later = Later(self)
        # When a backward pass of this rank began to wait for others: a time, or a device's event.
        self.joined: Any = 0

    def move(self, memory: Bytes) -> None:
        """Record into other memory from now on, ``room(events)`` bytes and zeroed; no thread may
        record meanwhile."""
        self.events = (memory.shape[0] - HEADER) // EVENT.itemsize
        self._memory, self._view, self._stored = memory, memory.data, 0

    def number(self) -> int:
        """A span's number, for its children."""
        return next(self._numbers)

    def add(
        self,
        span: Span,
        start: int,
        end: int,
        nbytes: int = 0,
        bucket: int = -1,
        parent: int = 0,
        number: int = 0,
        step: int = -1,
    ) -> None:
        """Store a span.

        Args:
            start, end: of ``now()``.
            nbytes: that it moved or made.
            parent: number of the span that it is part of; ``self.parent`` if 0.
            number: its own, if ``number()`` was asked for it.
            step: that it belongs to, if it is not the one in progress.
        """
        thread = get_ident() != self._main
        number = number or next(self._numbers)
        if step < 0:
            step, parent = self.step, parent or self.parent
        with self._lock:
            place = self._stored
            at = HEADER + place % self.events * _EVENT.size
            name, lane, view = span[0], span[1], self._view
            _pack(view, at, number, parent, start, end, nbytes, step, bucket, name, lane, thread, 0)
            self._stored = place + 1
            _pack_count(self._view, 0, place + 1)

    @contextmanager
    def span(self, span: Span, nbytes: int = 0, bucket: int = -1) -> Iterator[int]:
        """Record the body of a ``with``; gives its number."""
        number, start = self.number(), now()
        try:
            yield number
        finally:
            self.add(span, start, now(), nbytes, bucket, 0, number)

    def begin_step(self, step: int) -> int:
        """Spans belong to ``step`` from now on; its number, which they have as parent."""
        self.step = step
        self.parent = self.number()
        _pack_count(self._view, 8, step)
        return self.parent

    def count_step(self) -> None:
        """Another step, where no training loop says when they begin and end."""
        if not self.parent:
            self.step += 1
            _pack_count(self._view, 8, self.step)

    def end_step(self, start: int) -> None:
        """The step that began at ``start`` is over."""
        number, self.parent = self.parent, 0
        self.add(STEP, start, now(), number=number)
        _pack_count(self._view, 16, self.step)

    def end_step_later(self, start: Timed, end: Timed) -> None:
        """All work of the step is given to a device, which does it between two events."""
        number, self.parent = self.parent, 0
        self.later.add(STEP, start, end, number=number)
        _pack_count(self._view, 16, self.step)

    def last(self) -> Events:
        """What the ring holds, oldest first: a copy."""
        return Ring(self._memory).last()

    def ring(self) -> Ring:
        """A reader of its own, of what comes from now on; of the memory that is in use now."""
        made = Ring(self._memory)
        made.take()
        return made


class Ring:
    """A reader of a recorder's memory, maybe from another process."""

    def __init__(self, memory: Bytes) -> None:
        self._counts = memory[:HEADER].view(np.int64)
        slots = (memory.shape[0] - HEADER) // EVENT.itemsize
        self._slots: Events = memory[HEADER : HEADER + slots * EVENT.itemsize].view(EVENT)
        self._taken = 0
        self.lost = 0

    @property
    def finished(self) -> int:
        """The last step that is over."""
        return int(self._counts[2])

    def take(self) -> Events:
        """What came since the last call: a copy; ``lost`` counts what was overwritten."""
        return self._between(self._taken)

    def last(self) -> Events:
        """All that it holds, oldest first: a copy. Not for who takes, too."""
        return self._between(0)

    def _between(self, first: int) -> Events:
        # The slot behind the newest may be half written.
        size, stop = self._slots.shape[0] - 1, int(self._counts[0])
        begin = max(first, stop - size)
        found: Events = self._slots[np.arange(begin, stop) % (size + 1)]
        # What was stored while we copied went over the oldest.
        spoilt = min(max(0, int(self._counts[0]) - size - begin), found.shape[0])
        self.lost += begin - first + spoilt
        self._taken = stop
        kept: Events = found[spoilt:]
        return kept
