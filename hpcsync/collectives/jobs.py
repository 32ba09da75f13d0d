"""The collectives of a rank that are under way, and which may begin.

A collective is a coroutine that yields a Wait where another rank has to act first. A round asks
the Waits in order of priority and resumes what is ready, so the memory work of one bucket fills
the network time of another.

Collectives start in order of priority while their bytes fit the credit window: what is started
late can still be overtaken by something more urgent. Ranks need not agree on the order. A window
that several ranks fill with different collectives could lock them up, so a rank that sees nothing
move for a moment admits the next one although the window is full: in the end everything is
admitted, and everything admitted completes.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from ..transports.base import Wait


class Job(Protocol):
    """What rounds move on: one segment of a collective."""

    priority: int
    nbytes: int

    def run(self) -> Iterator[Wait]: ...

    def finished(self) -> None: ...

    def describe(self) -> str: ...

    def place(self) -> Place: ...


class Place(NamedTuple):
    """Where a job is.

    Attributes:
        label: of its collective, the same on all ranks.
        run: how many runs of the collective were started here.
        segment: of the collective.
        level: that it has come to.
        waits: for what, in words.
    """

    label: str
    run: int
    segment: int
    level: str
    waits: str = ""


class _Active:
    """A job under way and what it waits for."""

    __slots__ = ("job", "order", "steps", "wait")

    def __init__(self, job: Job, order: tuple[int, int]) -> None:
        self.job = job
        self.order = order
        self.steps = job.run()
        self.wait: Wait | None = None

    def advance(self) -> tuple[bool, bool]:
        """Go on as far as possible: (something moved, the job is over)."""
        moved = False
        while self.wait is None or self.wait.ready():
            moved = True
            self.wait = next(self.steps, None)
            if self.wait is None:
                return True, True
        return moved, False


class Jobs:
    """What was handed over and is not over yet; one thread at a time may call ``advance``.

    A job is always in one of three lists: who asks whether there is work takes no lock.

    Args:
        credit_bytes: bytes in flight up to which further jobs are admitted.

    Attributes:
        incoming: handed over since the last ``advance``; any thread may add to it.
    """

    def __init__(self, credit_bytes: int) -> None:
        self.incoming: deque[Job] = deque()
        self._credit = credit_bytes
        self._pending: list[tuple[int, int, Job]] = []
        self._active: list[_Active] = []
        self._order = itertools.count()
        self._opening = 1  # jobs that a starved rank admits; doubles while nothing else moves

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self._active or self._pending or self.incoming)

    @property
    def moving(self) -> bool:
        """Whether a job is under way."""
        return bool(self._active)

    def advance(self, *, starved: bool) -> bool:
        """Admit what may begin and move on what can; True if anything moved.

        Args:
            starved: nothing has moved for a while: admit more than the window allows.
        """
        moved = self._admit(starved=starved) | self._sweep()
        if moved and not starved:
            self._opening = 1
        return moved

    def standing(self) -> list[Place]:
        """Where all jobs are that are under way or wait to begin; any thread may ask."""
        moving = [
            each.job.place()._replace(waits=each.wait.describe() if each.wait else "")
            for each in list(self._active)
        ]
        waiting = [job for _, _, job in list(self._pending)] + list(self.incoming)
        return moving + [job.place() for job in waiting]

    def describe(self) -> str:
        """What the jobs under way wait for, the first few, and how many others there are."""
        stuck = [
            f"{each.job.describe()}: {each.wait.describe() if each.wait else 'running'}"
            for each in self._active
        ]
        shown = "; ".join(stuck[:4]) + (f"; and {len(stuck) - 4} more" if len(stuck) > 4 else "")
        return f"{shown}; {len(self._pending)} not started"

    def _admit(self, *, starved: bool) -> bool:
        while self.incoming:
            job = self.incoming[0]
            heapq.heappush(self._pending, (job.priority, next(self._order), job))
            self.incoming.popleft()
        if not self._pending:
            return False
        in_flight = sum(each.job.nbytes for each in self._active)
        extra = self._opening if starved else 0
        admitted = 0
        while self._pending and (in_flight < self._credit or not self._active or admitted < extra):
            priority, order, job = self._pending[0]
            in_flight += job.nbytes
            self._active.append(_Active(job, (priority, order)))
            heapq.heappop(self._pending)
            admitted += 1
        if admitted:
            self._active.sort(key=lambda each: each.order)
        if extra and admitted:
            self._opening *= 2
        return admitted > 0

    def _sweep(self) -> bool:
        """Ask every active job once; True if any moved."""
        any_moved = False
        over = False
        for each in self._active:
            moved, ended = each.advance()
            any_moved |= moved
            if ended:
                over = True
                each.job.finished()
        if over:
            self._active = [each for each in self._active if each.wait is not None]
        return any_moved
