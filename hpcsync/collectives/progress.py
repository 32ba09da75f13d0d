"""What moves all of a rank's collectives on, and sleeps when none can move.

A round asks every collective under way once; see ``jobs``. A thread does rounds, beside the
computation. Whoever waits for a collective does them in its place: nothing is handed over at its
end. And a caller that computes may ``drive``: where no core is free, a round between two layers of
the backward pass costs less than waking the thread, which takes the interpreter and the caches
from the computation. While somebody else does the rounds the thread stands by, and takes over
after ``Naps.standby_s`` without one.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from ..device import Event
from ..errors import CollectiveTimeout, HpcsyncError
from .jobs import Job, Jobs, Place
from .naps import MOST_SLEEP_S, Naps, wake_in_time

_STARVED_S = 2e-3  # without movement: the window opens
_BREATH_S = 1e-3  # between two rounds of a caller that computes, at least


class Progress:
    """What moves the collectives of one rank.

    Args:
        credit_bytes: bytes in flight up to which further jobs are admitted.
        timeout_s: seconds without any movement after which waiting fails; 0 for never.
        crowding: ranks a core of this host.
        patient: the host computes, so that rounds take time from it.
    """

    def __init__(
        self, credit_bytes: int, timeout_s: float, crowding: float = 1.0, *, patient: bool = True
    ) -> None:
        self._jobs = Jobs(credit_bytes)
        self._naps = Naps(crowding, patient=patient)
        self._timeout = timeout_s
        self._waiting = 0  # threads that do nothing else
        self._wake = threading.Condition()
        self._asleep = False
        self._stopping = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._turn = threading.Lock()  # held in a round
        self._owner = 0  # thread that holds it
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
        if not self._jobs.busy:
            self._moved_s = time.perf_counter()
        with self._wake:
            self._jobs.incoming.extend(jobs)
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
        jobs = self._jobs
        if jobs.incoming or (jobs.busy and time.perf_counter() - self._driven_s > _BREATH_S):
            self._driven_s = time.perf_counter()
            return self._try_round()
        return False

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Do rounds until ``condition``, which a job's end makes true.

        Raises:
            CollectiveTimeout: nothing moved for the time limit.
            Exception: whatever a job raised.
        """
        wake_in_time()
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
        return self._jobs.standing()

    @property
    def sound(self) -> bool:
        """Whether nothing has failed, nothing is under way, and more can be."""
        return self._error is None and not self._jobs.busy

    @property
    def works(self) -> bool:
        """Whether collectives can run: nothing has failed, and it was not closed."""
        return self._error is None

    @property
    def failed(self) -> bool:
        """Whether an error has ended it, not ``close``."""
        return self._error is not None and not self._stopping

    def settle(self, event: Event) -> None:
        """Sleep until a device has come to an event.

        Raises:
            CollectiveTimeout: it has not within the time limit.
        """
        start = time.perf_counter()
        while not event.ready():
            if self._timeout and time.perf_counter() - start > self._timeout:
                raise CollectiveTimeout(
                    f"the device is not done with a closed collective after {self._timeout:g} s "
                    "(comm.timeout_s): a rank is missing"
                )
            time.sleep(MOST_SLEEP_S)

    def _main(self) -> None:
        wake_in_time()
        # What a job raised is handed to whoever waits.
        with contextlib.suppress(BaseException):
            while not self._stopping and self._error is None:
                standby = self._driven_s + self._naps.standby_s - time.perf_counter()
                if not self._jobs.busy:
                    self._rest()
                elif standby > 0:
                    time.sleep(standby)
                elif not self._try_round():
                    self._doze()

    def _rest(self) -> None:
        """Nothing to do: sleep until something is submitted."""
        with self._wake:
            while not self._jobs.busy and not self._stopping:
                self._asleep = True
                self._wake.wait()
            self._asleep = False

    def _doze(self) -> None:
        """Nothing moves: sleep for a moment."""
        idle = time.perf_counter() - self._moved_s
        time.sleep(self._naps.length_s(idle, awaited=bool(self._waiting)))

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
        unseen = now - max(self._looked_s, self._moved_s) - self._naps.longest_s
        self._moved_s += max(0.0, unseen)
        self._looked_s = now
        idle = now - self._moved_s
        starved = idle > _STARVED_S and self._in_vain > 1
        self._in_vain += 1
        if self._jobs.advance(starved=starved):
            self._moved_s, self._in_vain = time.perf_counter(), 0
            return True
        if self._timeout and idle > self._timeout and self._jobs.moving:
            raise CollectiveTimeout(
                f"no collective moved for {idle:.0f} s (comm.timeout_s = {self._timeout:g}); "
                f"stuck: {self._jobs.describe()}"
            )
        return False
