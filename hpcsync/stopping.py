"""Signals that stop a run: remembered until a step boundary, where the ranks agree to stop.

mpirun answers Ctrl-C by SIGTERM to every rank and, a quarter of a second later, SIGKILL, while a
step may take seconds and Python runs signal handlers only between two steps of the interpreter.
So a thread is woken through a pipe the moment the signal comes; it has the summary written at
once, and ends the process if no step boundary is reached in time. The same thread answers SIGQUIT.

SIGUSR2 is the patient one: the end of the time limit is near, so save at the next boundary and
leave, with the status that says "to be resumed". Nothing is given up for it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from .errors import HpcsyncError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds from the signal to the end of the process, if the step does not end before. Batch systems
# give 30 s or more from SIGTERM to SIGKILL; a step that takes longer than this is not waited for.
GRACE_S = 5.0
# Exit status of a run that saved and left for SIGUSR2: EX_TEMPFAIL of sysexits.h, "try again".
LEFT = 75


class StoppedError(HpcsyncError):
    """The ranks agreed to stop for a signal.

    Attributes:
        status: exit status of the job, as a shell would tell it.
    """

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name
        left = number == signal.SIGUSR2
        super().__init__(f"stopped by {name}, to be resumed" if left else f"stopped by {name}")
        self.number = number
        self.status = LEFT if left else 128 + number

    def __reduce__(self) -> tuple[type[StoppedError], tuple[int]]:
        return type(self), (self.number,)


class StopSignals:
    """A context in which SIGINT and SIGTERM ask for a stop instead of killing.

    Must be entered on the main thread.

    Attributes:
        received: number of the first signal that came, 0 before.
        leave: SIGUSR2 has come.
        on_quit: called from the thread when SIGQUIT comes; without it the process ends.
    """

    def __init__(
        self,
        on_signal: Callable[[str], None],
        give_up: Callable[[int], None],
        grace_s: float = GRACE_S,
    ) -> None:
        """``on_signal(name)`` and ``give_up(status)`` are called from the thread."""
        self.received = 0
        self.leave = False
        self.on_quit: Callable[[], None] | None = None
        self._on_save: Callable[[], None] | None = None
        self._save = False
        self._on_signal = on_signal
        self._give_up = give_up
        self._grace_s = grace_s
        self._over = threading.Event()
        self._until = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._remember)
        self._before[signal.SIGQUIT] = signal.signal(signal.SIGQUIT, _leave_to_thread)
        self._before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._ask)
        self._before[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, self._leave)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="hpcsync-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._write)  # the thread reads the end of the file
        self._thread.join()
        os.close(self._read)

    def allow(self, seconds: float) -> None:
        """The boundary after a signal has been reached: what is left to do may take so long, also
        from a signal that comes while it is done."""
        self._grace_s = seconds
        self._until = time.monotonic() + seconds

    def asks_to_save(self, action: Callable[[], None]) -> None:
        """Have ``action`` called on the main thread whenever SIGUSR1 comes, or has come before."""
        self._on_save = action
        if self._save:
            action()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._save = True
        if self._on_save is not None:
            self._on_save()

    def _leave(self, number: int, frame: FrameType | None) -> None:
        self.leave = True

    def _quit(self) -> None:
        if self.on_quit is None:  # nobody has more to tell than where all threads stand
            faulthandler.dump_traceback(all_threads=True)
            os._exit(128 + signal.SIGQUIT)
        with contextlib.suppress(Exception):
            self.on_quit()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number

    def _watch(self) -> None:
        number = 0
        while number not in SIGNALS:
            data = os.read(self._read, 1)
            if not data:
                return
            number = data[0]
            if number == signal.SIGQUIT:
                self._quit()
        self.received = self.received or number
        with contextlib.suppress(Exception):  # say, a full disk: the job must end all the same
            self._on_signal(signal.Signals(number).name)
        self._until = max(self._until, time.monotonic() + self._grace_s)
        while (left := self._until - time.monotonic()) > 0:
            if self._over.wait(left):
                return
        self._give_up(128 + number)


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    """The thread has been woken: a handler would wait for the main thread."""
