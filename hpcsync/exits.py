"""How a user's script ends on one rank, and what that means for the other ranks.

    exception that nobody catches, on any thread   ends the job, told once
    exit with a status that is not 0               ends the job, at once
    the end of the script, or an exit with 0       waits, asleep, for the other ranks

Without this a rank that ends early blocks in MPI_Finalize while the others wait for it.

Python shows the status of an exit to nobody before the process is gone: ``sys.excepthook`` does
not see SystemExit. So the ways to exit (``sys.exit``, ``exit``, ``quit``, and ``SystemExit`` by
name in the script itself) raise an exception that notices when the interpreter reads its status,
which it does only if nobody caught it.
"""

from __future__ import annotations

import atexit
import builtins
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from . import launch

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

_MOST_SLEEP_S = 0.05
_uncaught: list[int] = []  # the status of the exit that nobody caught, once there was one


class _Exit(SystemExit):
    """A SystemExit that notices when the interpreter, no Python code, asks for its status."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name == "code":
            try:
                sys._getframe(1)
            except ValueError:  # nobody calls: all frames have been left
                _uncaught[:] = [value & 0xFF if isinstance(value, int) else int(value is not None)]
        return value


def _exit(status: Any = None, /) -> NoReturn:
    """As ``sys.exit``."""
    raise _Exit(status)


class Exits:
    """Watches the end of this process; made by ``init``, undone by ``shutdown``. Collective.

    Args:
        comm: of all ranks; a copy of it is used here alone.
        before_end: called at the end of the script, before other ranks are waited for.
    """

    def __init__(self, comm: Intracomm, before_end: Callable[[], None]) -> None:
        self._comm = comm.Dup()
        self._before_end = before_end
        self._process = os.getpid()
        _uncaught.clear()
        self._undo: list[tuple[Any, str, Any, Any]] = []
        self._replace(sys, "excepthook", self._exception)
        self._replace(threading, "excepthook", self._thread_exception)
        self._replace(sys, "exit", _exit)
        for name in ("exit", "quit"):
            if hasattr(builtins, name):  # not under `python -S`
                self._replace(builtins, name, _exit)
        self._replace(sys.modules["__main__"], "SystemExit", _Exit)
        atexit.register(self._end)

    def close(self) -> None:
        """Put back what was there before; collective."""
        atexit.unregister(self._end)
        while self._undo:
            place, name, ours, before = self._undo.pop()
            if vars(place).get(name) is not ours:
                continue  # replaced by somebody else since
            if before is None:
                delattr(place, name)
            else:
                setattr(place, name, before)
        self._comm.Free()

    def _replace(self, place: Any, name: str, ours: Any) -> None:
        self._undo.append((place, name, ours, vars(place).get(name)))
        setattr(place, name, ours)

    def _before(self, place: Any, name: str) -> Any:
        return next(was for at, key, _, was in self._undo if at is place and key == name)

    def _exception(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if os.getpid() != self._process:  # a child's errors are its own
            self._before(sys, "excepthook")(kind, error, trace)
            return
        # From here this is the one way to set the status of the process.
        raise SystemExit(launch.fail(error))

    def _thread_exception(self, told: threading.ExceptHookArgs) -> None:
        if issubclass(told.exc_type, SystemExit):
            return  # ends a thread quietly, as it always does
        alone = os.getpid() != self._process or self._comm.Get_size() == 1
        if alone or told.exc_value is None:
            self._before(threading, "excepthook")(told)
            return
        launch.fail(told.exc_value)

    def _end(self) -> None:
        """At the end of the script, before mpi4py's own."""
        if os.getpid() != self._process:
            return
        status = _uncaught[0] if _uncaught else 0
        if status and self._comm.Get_size() > 1:
            launch.abort(status)
        self._before_end()
        # MPI_Finalize would wait as well, but spinning, on a core that the others need.
        request = self._comm.Ibarrier()
        pause = 1e-4
        while not request.Test():
            time.sleep(pause)
            pause = min(2 * pause, _MOST_SLEEP_S)
