"""A thread that brings logs to the disk now and then, and deletes those that have served."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path


class Background:
    """Flushes and deletes files beside the training.

    Args:
        files: gives the descriptors to be flushed.
        every_s: between flushes.
    """

    def __init__(self, files: Callable[[], Iterable[int]], every_s: float = 10.0) -> None:
        self._files = files
        self._every_s = every_s
        self._doomed: list[Path] = []
        self._wake = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._run, name="hpcsync-replay", daemon=True)
        self._thread.start()

    def remove(self, paths: Iterable[Path]) -> None:
        """Delete files soon."""
        with self._wake:
            self._doomed += paths
            self._wake.notify()

    def close(self) -> None:
        """Delete what is left, and stop."""
        with self._wake:
            self._open = False
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                if self._open and not self._doomed:
                    self._wake.wait(self._every_s)
                doomed, self._doomed = self._doomed, []
                going = self._open
            for path in doomed:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            if not going:
                return
            if not doomed:
                for fd in self._files():
                    _flush(fd)


def _flush(fd: int) -> None:
    """On a descriptor of its own: the log may close its own meanwhile."""
    with contextlib.suppress(OSError):  # what is amiss with the disk shows when the log writes
        own = os.dup(fd)
        try:
            os.fdatasync(own)
        finally:
            os.close(own)
