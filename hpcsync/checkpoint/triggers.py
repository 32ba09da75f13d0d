"""When a checkpoint is due: by steps, by time, as often as pays, or because somebody asks.

Rank 0 decides, and the others hear of it with the step's agreement. Two files in the run's folder
ask for one: ``save-now``, and ``stop-after-save``, which ends the run as well. They are looked for
at most once a second, and removed when they have been obeyed.
"""

from __future__ import annotations

import contextlib
import os
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
        self._obeying: dict[int, set[str]] = {}  # by the step of the checkpoint under way

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

    def taken(self, step: int) -> None:
        """A snapshot of this step was taken."""
        self._taken_s = self._asked_s = time.monotonic()
        self._busy.clear()
        self._obeying[step], self._asked = self._asked, set()

    def saved(self, step: int, stall_s: float, durable_s: float) -> None:
        """That of this step is whole on disk.

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
        for name in self._obeying.pop(step, ()):
            with contextlib.suppress(OSError):
                (self._folder / name).unlink()

    def failed(self, step: int) -> None:
        """That of this step was not saved: who asked for it by a file waits for another trial."""
        self._obeying.pop(step, None)
        self._retry_s = time.monotonic() + _RETRY_S
        self._steps = 0

    def _look(self, now: float) -> None:
        if now >= max(self._looked_s + _LOOK_S, self._retry_s):
            self._looked_s = now
            names = {SAVE_NOW, STOP_AFTER_SAVE}.difference(*self._obeying.values())
            # Of a sick disk this is false; ``Path.exists`` would raise.
            self._asked |= {name for name in names if os.path.exists(self._folder / name)}

    def _by_interval(self, step: int, now: float) -> bool:
        interval, since = self._interval, now - self._taken_s
        if interval.auto:
            return self._steps == _FIRST_AUTO if self._wait_s is None else since >= self._wait_s
        if interval.seconds:
            return since >= interval.seconds
        return interval.steps > 0 and step % interval.steps == 0
