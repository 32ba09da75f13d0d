"""What moves all of a rank's collectives on, and sleeps when none can move.

A collective is a coroutine that yields a Wait where another rank has to act first. A round asks
the Waits in order of priority and resumes what is ready, so the memory work of one bucket fills
the network time of another.

Who does the rounds. A thread does, beside the computation. Whoever waits for a collective does
them in its place: nothing is handed over at its end. And a caller that computes may ``drive``:
where no core is free, a round between two layers of the backward pass costs less than waking the
thread, which takes the interpreter and the caches from the computation. While somebody else does
the rounds the thread stands by, and takes over after ``_STANDBY_S`` without one.

Admission. Collectives start in order of priority while their bytes fit the credit window: what
is started late can still be overtaken by something more urgent. Ranks need not agree on the
order. A window that several ranks fill with different collectives could lock them up, so a rank
that sees nothing move for a moment admits the next one although the window is full: in the end
everything is admitted, and everything admitted completes.

Sleeping. Blocking MPI calls spin, and a spinning thread takes the core that computes. When
nothing is ready a thread sleeps for a fraction of the time that nothing has moved, up to
``MOST_SLEEP_S``: short waits are met at once, and a long one costs a few per cent of a core.
Where ranks outnumber cores both bounds grow with their ratio, or the ranks that wait would keep
those that work from a core. While the main thread computes and waits for nothing, sleeps may be
longer, ``PATIENT_SLEEPS_S``: there is other work to hide behind, and each waking takes time from
it.
"""

from __future__ import annotations

import contextlib
import ctypes
import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from ..errors import CollectiveTimeout, HpcsyncError
from ..transports.base import Wait

LEAST_SLEEP_S = 60e-6
MOST_SLEEP_S = 1e-3
PATIENT_SLEEPS_S = 1e-3, 4e-3
_SLEEP_SHARE = 0.4  # of the time that nothing has moved
_STARVED_S = 2e-3  # without movement: the window opens
_STANDBY_S = 20e-3  # without a round of somebody else: the thread takes over
_BREATH_S = 1e-3  # between two rounds of a caller that computes, at least
_PR_SET_TIMERSLACK = 29


class Job(Protocol):
    """What the thread drives: one segment of a collective."""

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


class Progress:
    """What moves the collectives of one rank.

    Args:
        credit_bytes: bytes in flight up to which further jobs are admitted.
        timeout_s: seconds without any movement after which waiting fails; 0 for never.
        crowding: ranks a core of this host.
    """

    def __init__(self, credit_bytes: int, timeout_s: float, crowding: float = 1.0) -> None:
        self._credit = credit_bytes
        self._timeout = timeout_s
        self._sleeps_s = LEAST_SLEEP_S * max(crowding, 1.0), MOST_SLEEP_S * max(crowding, 1.0)
        self._waiting = 0  # threads that do nothing else
        self._incoming: deque[Job] = deque()
        self._pending: list[tuple[int, int, Job]] = []
        self._active: list[_Active] = []
        self._order = itertools.count()
        self._wake = threading.Condition()
        self._opening = 1  # jobs that a starved rank admits; doubles while nothing else moves
        self._asleep = False
        self._stopping = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._turn = threading.Lock()  # held in a round
        self._owner = 0  # thread that holds it
        self._longest_nap_s = 2 * max(self._sleeps_s[1], PATIENT_SLEEPS_S[1], _STANDBY_S)
        self._moved_s = 0.0  # when something moved last,
        self._looked_s = 0.0  # when a round began last,
        self._in_vain = 0  # how many rounds since found nothing,
        self._driven_s = 0.0  # and when a thread other than ours did one

    def submit(self, jobs: list[Job]) -> None:
        """Hand jobs over; they start in order of (priority, submission).

        Raises:
            HpcsyncError: communication was closed.
            Exception: what ended it before.
        """
        if self._error is not None:
            raise self._error
        if not self._busy:
            self._moved_s = time.perf_counter()
        with self._wake:
            self._incoming.extend(jobs)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._main, name="hpcsync-progress", daemon=True
                )
                self._thread.start()
            elif self._asleep:
                self._wake.notify()

    def drive(self) -> bool:
        """A round of the calling thread, which has other work; often called, rarely more.

        Returns:
            Whether the round moved anything.

        Raises:
            Exception: whatever a job raised.
        """
        if self._incoming or (self._busy and time.perf_counter() - self._driven_s > _BREATH_S):
            self._driven_s = time.perf_counter()
            return self._try_round()
        return False

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Do rounds until ``condition``, which a job's end makes true.

        Raises:
            CollectiveTimeout: nothing moved for the time limit.
            Exception: whatever a job raised.
        """
        _wake_in_time()
        if self._owner == threading.get_ident():
            raise HpcsyncError("a signal handler waits for a collective that it has interrupted")
        self._waiting += 1
        try:
            while not condition():
                if self._error is not None:
                    raise self._error
                self._driven_s = time.perf_counter()
                if not self._try_round() and not condition():
                    self._doze()
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Stop the thread; jobs under way are dropped, and whoever waits for one is told."""
        if self._error is None:
            self._error = HpcsyncError("communication is closed; no collective can run any more")
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)

    def standing(self) -> list[Place]:
        """Where all jobs are that are under way or wait to begin; any thread may ask."""
        moving = [
            each.job.place()._replace(waits=each.wait.describe() if each.wait else "")
            for each in list(self._active)
        ]
        waiting = [job for _, _, job in list(self._pending)] + list(self._incoming)
        return moving + [job.place() for job in waiting]

    @property
    def _busy(self) -> bool:
        return bool(self._active or self._pending or self._incoming)

    def _main(self) -> None:
        _wake_in_time()
        # What a job raised is handed to whoever waits.
        with contextlib.suppress(BaseException):
            while not self._stopping and self._error is None:
                standby = self._driven_s + _STANDBY_S - time.perf_counter()
                if not self._busy:
                    self._rest()
                elif standby > 0:
                    time.sleep(standby)
                elif not self._try_round():
                    self._doze()

    def _rest(self) -> None:
        """Nothing to do: sleep until something is submitted."""
        with self._wake:
            while not self._busy and not self._stopping:
                self._asleep = True
                self._wake.wait()
            self._asleep = False

    def _doze(self) -> None:
        """Nothing moves: sleep for a moment."""
        idle = time.perf_counter() - self._moved_s
        least, most = self._sleeps_s if self._waiting else PATIENT_SLEEPS_S
        time.sleep(min(max(idle * _SLEEP_SHARE, least), most))

    def _try_round(self) -> bool:
        """A round, unless another thread is at it; True if anything moved."""
        if not self._turn.acquire(blocking=False):
            return False
        self._owner = threading.get_ident()
        try:
            return not self._stopping and self._error is None and self._round()
        except Exception as error:
            self._error = error
            raise
        except BaseException as error:  # from a signal handler: a collective ended half way
            self._error = HpcsyncError(f"{type(error).__name__} in a collective; none can go on")
            raise
        finally:
            self._owner = 0
            self._turn.release()

    def _round(self) -> bool:
        now = time.perf_counter()
        # Time in which nobody looked is not time in which nothing moved.
        unseen = now - max(self._looked_s, self._moved_s) - self._longest_nap_s
        self._moved_s += max(0.0, unseen)
        self._looked_s = now
        idle = now - self._moved_s
        starved = idle > _STARVED_S and self._in_vain > 1
        self._in_vain += 1
        if self._admit(starved=starved) | self._sweep():
            if not starved:
                self._opening = 1
            self._moved_s, self._in_vain = time.perf_counter(), 0
            return True
        if self._timeout and idle > self._timeout and self._active:
            raise CollectiveTimeout(self._report(idle))
        return False

    def _admit(self, *, starved: bool) -> bool:
        # A job is always in one of the lists: who asks whether there is work takes no lock.
        while self._incoming:
            job = self._incoming[0]
            heapq.heappush(self._pending, (job.priority, next(self._order), job))
            self._incoming.popleft()
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

    def _report(self, idle: float) -> str:
        stuck = [
            f"{each.job.describe()}: {each.wait.describe() if each.wait else 'running'}"
            for each in self._active
        ]
        shown = "; ".join(stuck[:4]) + (f"; and {len(stuck) - 4} more" if len(stuck) > 4 else "")
        return (
            f"no collective moved for {idle:.0f} s (comm.timeout_s = {self._timeout:g}); "
            f"stuck: {shown}; {len(self._pending)} not started"
        )


def _wake_in_time() -> None:
    """Let sleeps of this thread end when they should: with the default slack 20 us take 70."""
    if not getattr(_prompt, "told", False):
        _prompt.told = True
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)


_prompt = threading.local()
