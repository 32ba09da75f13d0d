"""When a checkpoint is due: by steps, by time, as often as pays, or because somebody asks.

Rank 0 decides, and the others hear of it with the step's agreement. Two files in the run's folder
ask for one: ``save-now``, and ``stop-after-save``, which ends the run as well. They are looked for
at most once a second, and removed when they have been obeyed.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import deque
from pathlib import Path

from ..intervals import Interval, best

SAVE_NOW, STOP_AFTER_SAVE = "save-now", "stop-after-save"
_LOOK_S = 1.0
_RETRY_S = 60.0  # from a save that failed to the next one for the same file
_FIRST_AUTO = 10  # steps of a process before a first checkpoint shows what one costs
_WINDOW = 64


class Triggers:
    """What is due, as rank 0 sees it.

    Args:
        folder: of the run.
        mtbf_s: mean seconds between failures, for automatic intervals.

    Attributes:
        stop: a file asks to stop after the checkpoint that is due.
    """

    def __init__(self, interval: Interval, folder: Path, mtbf_s: float) -> None:
        self._interval, self._folder, self._mtbf_s = interval, folder, mtbf_s
        self._taken_s = self._asked_s = time.monotonic()
        self._looked_s = self._retry_s = 0.0
        self._steps = 0
        self._idle: deque[float] = deque(maxlen=_WINDOW)
        self._busy: deque[float] = deque(maxlen=_WINDOW)
        self._wait_s: float | None = None
        self._asked: set[str] = set()  # by files, not obeyed yet
        self._obeying: set[str] = set()

    @property
    def stop(self) -> bool:
        return STOP_AFTER_SAVE in self._asked

    def due(self, step: int, *, writing: bool) -> bool:
        """Whether one is to be taken after this step; to be asked once a step.

        Args:
            writing: one was being written meanwhile.
        """
        now = time.monotonic()
        self._steps += 1
        (self._busy if writing else self._idle).append(now - self._asked_s)
        self._asked_s = now
        self._look(now)
        return bool(self._asked) or self._by_interval(step, now)

    def taken(self) -> None:
        """A snapshot was taken."""
        self._taken_s = self._asked_s = time.monotonic()
        self._busy.clear()
        self._obeying |= self._asked
        self._asked = set()

    def saved(self, stall_s: float, durable_s: float) -> None:
        """It is whole on disk.

        Args:
            stall_s: for which training stood still.
            durable_s: from the snapshot until it was whole.
        """
        slower = 0.0
        if self._busy and self._idle:
            slower = max(statistics.median(self._busy) - statistics.median(self._idle), 0.0)
        cost_s = stall_s + slower * len(self._busy)
        # Writing all the time would slow every step down.
        self._wait_s = max(best(cost_s, self._mtbf_s), 2 * durable_s)
        for name in self._obeying:
            with contextlib.suppress(OSError):
                (self._folder / name).unlink()
        self._obeying = set()

    def failed(self) -> None:
        """It was not saved: who asked by a file waits for another trial."""
        self._obeying = set()
        self._retry_s = time.monotonic() + _RETRY_S
        self._steps = 0

    def _look(self, now: float) -> None:
        if not self._obeying and now >= max(self._looked_s + _LOOK_S, self._retry_s):
            self._looked_s = now
            names = (SAVE_NOW, STOP_AFTER_SAVE)
            self._asked |= {name for name in names if (self._folder / name).exists()}

    def _by_interval(self, step: int, now: float) -> bool:
        interval, since = self._interval, now - self._taken_s
        if interval.auto:
            return self._steps == _FIRST_AUTO if self._wait_s is None else since >= self._wait_s
        if interval.seconds:
            return since >= interval.seconds
        return interval.steps > 0 and step % interval.steps == 0
