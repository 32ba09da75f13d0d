"""Streams and events of the test double: threads that empty queues, late by chance."""

from __future__ import annotations

import functools
import queue
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpcsync.device import DType, Event, Stream
from hpcsync.device.base import SharedEvent
from hpcsync.trace.recorder import now
from tests.double.memory import halves, raw_of

if TYPE_CHECKING:
    from tests.double.device import DoubleDevice, Machine

LIMIT_S = 60.0  # for what must come; a test that waits so long has failed
PACES = (
    # how likely work is late, and by how many seconds at most
    (0.0, 0.0),
    (0.3, 2e-4),
    (0.15, 2e-3),
    (1.0, 3e-4),
    (0.02, 1e-2),
)


SLOW = 250  # once in so many times a host gives work, it is late
SLOW_S = 0.02  # by so many seconds at most


class Chance:
    """Delays drawn from a seed; each user draws for itself.

    Args:
        pace: one of ``PACES``; drawn if not given.
    """

    def __init__(self, seed: object, pace: int | None = None) -> None:
        self._random = random.Random(repr(seed))
        drawn = self._random.randrange(len(PACES))
        self._often, self._most_s = PACES[drawn if pace is None else pace]

    def sleep(self) -> None:
        """Be late, or not."""
        if self._often and self._random.random() < self._often:
            time.sleep(self._random.random() * self._most_s)

    def delay_s(self) -> float:
        if self._random.random() < self._often:
            return self._random.random() * self._most_s
        return 0.0

    def below(self, count: int) -> int:
        return self._random.randrange(count) if count > 0 else 0

    def cut(self, count: int) -> int:
        """Where to cut a range in two, on a cache line."""
        return self.below(count // 64 + 1) * 64


class Mark:
    """One record of an event: a lock that is held until the stream has come there."""

    __slots__ = ("_held", "at_ns")

    def __init__(self) -> None:
        self._held = threading.Lock()
        self._held.acquire()
        self.at_ns = 0

    def reach(self) -> None:
        self.at_ns = now()
        self._held.release()

    @property
    def reached(self) -> bool:
        return bool(self.at_ns)

    def wait(self, machine: Machine) -> None:
        limit = time.monotonic() + LIMIT_S
        while not self._held.acquire(timeout=0.2):
            if machine.closed or machine.error is not None:
                return
            assert time.monotonic() < limit, "an event was not reached"
        self._held.release()


class DoubleEvent(Event):
    """An event as the stream recorded it."""

    __slots__ = ("_machine", "_timed", "mark")

    def __init__(self, machine: Machine, mark: Mark | None, timed: bool = False) -> None:
        self._machine, self.mark, self._timed = machine, mark, timed

    def last(self) -> Mark | None:
        """The last record; None before any."""
        return self.mark

    def ready(self) -> bool:
        self._machine.check()
        mark = self.last()
        return mark is None or mark.reached

    def synchronize(self) -> None:
        mark = self.last()
        if mark is not None:
            mark.wait(self._machine)
        self._machine.check()

    def reached_ns(self) -> int:
        assert self._timed, "the event was not recorded with timed=True"
        mark = self.last()
        assert mark is not None, "the event was not recorded"
        assert mark.reached, "the event is not ready"
        return mark.at_ns


class DoubleShared(DoubleEvent, SharedEvent):
    """An event that the others can open."""

    __slots__ = ("device", "handle")

    def __init__(self, device: DoubleDevice, handle: bytes) -> None:
        super().__init__(device.machine, None)
        self.device, self.handle = device, handle


class Foreign(DoubleEvent):
    """Another rank's event."""

    __slots__ = ("_of",)

    def __init__(self, of: DoubleShared) -> None:
        super().__init__(of.device.machine, None)
        self._of = of

    def last(self) -> Mark | None:
        return self._of.mark


class DoubleStream(Stream):
    """A queue and the thread that empties it."""

    def __init__(self, device: DoubleDevice, name: str) -> None:
        self.device: DoubleDevice = device
        self.name = name
        self._machine = device.machine
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self.reseed()

    def reseed(self) -> None:
        seed = self._machine.seed, self.device.number, self.name
        self.chance, self._host = Chance(seed), Chance((*seed, "host"))

    # ---- the thread ----------------------------------------------------------------------------

    def give(self, work: Callable[[], object]) -> None:
        """Put work at the end of the queue."""
        self._machine.check()
        assert not self._machine.closed, "work for a stream whose machine is closed"
        if self._host.below(SLOW) == 0:
            time.sleep(self._host.below(1000) / 1000 * SLOW_S)
        self._queue.put(work)
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    title = f"double-{self.device.number}-{self.name}"
                    self._thread = threading.Thread(target=self._main, name=title, daemon=True)
                    self._thread.start()

    def _main(self) -> None:
        while True:
            work = self._queue.get()
            if work is None or self._machine.closed:
                return
            try:
                self.chance.sleep()
                work()
            except BaseException as error:
                self._machine.error = self._machine.error or error
            del work

    def close(self) -> None:
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(timeout=LIMIT_S)

    # ---- work ----------------------------------------------------------------------------------

    def bare(self, *arrays: Any) -> list[NDArray[Any]]:
        pool = self._machine.pool
        made = [pool.bare(raw_of(array)) for array in arrays]
        first = made[0]
        for each in made:
            assert each.ndim == 1, "streams take flat arrays"
            assert each.shape == first.shape, "arrays of different lengths"
            assert each.dtype == first.dtype, "arrays of different types"
        return made

    def reduce(
        self, outs: Sequence[Any], sources: Sequence[Any], dtype: DType, divisor: int = 1
    ) -> None:
        bare = self.bare(*outs, *sources)
        assert bare[0].dtype == dtype.storage, f"{bare[0].dtype} is not the storage of {dtype.name}"
        to, of = bare[: len(outs)], bare[len(outs) :]
        chance, cpu = self.chance, self.device.cpu

        def work() -> None:
            for part in halves(of[0].shape[0], chance.cut(of[0].shape[0])):
                if part.start < part.stop:
                    cpu.reduce([out[part] for out in to], [one[part] for one in of], dtype, divisor)
                chance.sleep()

        self.give(work)

    def copy(self, out: Any, source: Any) -> None:
        to, of = self.bare(out, source)
        chance = self.chance

        def work() -> None:
            for part in halves(to.shape[0], chance.cut(to.shape[0])):
                to[part] = of[part]
                chance.sleep()

        self.give(work)

    def fill(self, out: Any, byte: int) -> None:
        (to,) = self.bare(out)
        self.give(lambda: to.view(np.uint8).fill(byte))

    def apply(self, operation: Callable[[], object]) -> None:
        torch = sys.modules.get("torch")
        if torch is None:
            self.give(operation)
            return
        enabled = torch.is_grad_enabled()

        def work() -> None:
            with torch.set_grad_enabled(enabled):
                operation()

        self.give(work)

    # ---- order ---------------------------------------------------------------------------------

    def record(self, event: Event | None = None, *, timed: bool = False) -> Event:
        mark = Mark()
        if event is None:
            made: Event = DoubleEvent(self._machine, mark, timed)
        else:
            assert isinstance(event, DoubleShared), "only shared events are recorded anew"
            assert event.device is self.device, "an event of another process is recorded"
            event.mark = mark
            made = event
        self.give(mark.reach)
        return made

    def wait(self, event: Event) -> None:
        assert isinstance(event, DoubleEvent), f"not an event of this device: {event!r}"
        mark = event.last()
        if mark is not None:
            self.give(functools.partial(mark.wait, self._machine))

    def __enter__(self) -> DoubleStream:
        self.device.stack.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        popped = self.device.stack.pop()
        assert popped is self

    def __repr__(self) -> str:
        return f"<stream {self.name} of {self.device.identity}>"
