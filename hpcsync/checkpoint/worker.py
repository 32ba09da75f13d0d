"""A thread that does one thing after the other, so that training need not wait for a disk."""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections import deque
from collections.abc import Callable


class Worker:
    """Does what it is given, in order; what raises is told, and the next is done."""

    def __init__(self, name: str) -> None:
        self._jobs: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None], *, first: bool = False) -> None:
        """Do this after all that was given before, or before what has not begun."""
        with self._changed:
            if first:
                self._jobs.appendleft(job)
            else:
                self._jobs.append(job)
            self._changed.notify()

    def close(self, timeout_s: float = 0.0) -> None:
        """End when all is done that was given; wait so long for it."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _main(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                job = self._jobs.popleft()
            try:
                job()
            except Exception:
                with contextlib.suppress(Exception):
                    traceback.print_exc()
