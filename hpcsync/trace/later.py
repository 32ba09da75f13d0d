"""Spans whose times a device tells once it has come to them.

later.add(SPAN, start, end)     events in place of times, when the work is given
later.settle()                  stores those whose ends have been reached
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from .events import Span


class Timed(Protocol):
    """An event that knows its time, by the clock of ``recorder.now``."""

    def ready(self) -> bool: ...

    def reached_ns(self) -> int: ...


class Store(Protocol):
    """Where spans go: a recorder."""

    step: int
    parent: int

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
    ) -> None: ...


class Latest:
    """When the last of several events was reached."""

    def __init__(self, events: Sequence[Timed]) -> None:
        self._events = tuple(events)

    def ready(self) -> bool:
        return all(each.ready() for each in self._events)

    def reached_ns(self) -> int:
        return max(each.reached_ns() for each in self._events)


class Earliest(Latest):
    """When the first of several events was reached, once all were."""

    def reached_ns(self) -> int:
        return min(each.reached_ns() for each in self._events)


class _Waiting(NamedTuple):
    span: Span
    start: Timed
    end: Timed
    nbytes: int
    bucket: int
    parent: int
    number: int
    step: int


class Later:
    """Keeps spans of a recorder until their times are known; any thread may add and settle."""

    def __init__(self, recorder: Store) -> None:
        self._recorder = recorder
        self._waiting: list[_Waiting] = []
        self._lock = threading.Lock()

    def add(
        self,
        span: Span,
        start: Timed,
        end: Timed,
        nbytes: int = 0,
        bucket: int = -1,
        parent: int = 0,
        number: int = 0,
    ) -> None:
        """As ``Recorder.add``; the span belongs to the step in progress now."""
        recorder = self._recorder
        parent = parent or recorder.parent
        found = _Waiting(span, start, end, nbytes, bucket, parent, number, recorder.step)
        with self._lock:
            self._waiting.append(found)

    def settle(self) -> None:
        """Store what has been reached, and keep the rest."""
        over: list[_Waiting] = []
        kept: list[_Waiting] = []
        with self._lock:
            for each in self._waiting:
                (over if each.end.ready() and each.start.ready() else kept).append(each)
            self._waiting = kept
        for span, start, end, *rest in over:
            self._recorder.add(span, start.reached_ns(), end.reached_ns(), *rest)
