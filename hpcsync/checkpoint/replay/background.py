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
        self._deleting: Path | None = None
        self._wake = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._run, name="hpcsync-replay", daemon=True)
        self._thread.start()

    def remove(self, paths: Iterable[Path]) -> None:
        """Delete files soon."""
        with self._wake:
            self._doomed += paths
            self._wake.notify_all()

    def spare(self, path: Path) -> None:
        """Delete a file no more, since another is about to have its name; waits if it is being
        deleted."""
        with self._wake:
            self._doomed = [each for each in self._doomed if each != path]
            self._wake.wait_for(lambda: self._deleting != path)

    def close(self) -> None:
        """Delete what is left, and stop."""
        with self._wake:
            self._open = False
            self._wake.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                if self._open and not self._doomed:
                    self._wake.wait(self._every_s)
                self._deleting = path = self._doomed.pop(0) if self._doomed else None
                going = self._open
            if path is not None:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
                with self._wake:
                    self._deleting = None
                    self._wake.notify_all()
            elif not going:
                return
            else:
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
