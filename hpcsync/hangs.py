"""What a job tells of itself when it stands still: dumps of all ranks, and one report.

    a collective did not move for comm.timeout_s, or SIGQUIT came
        -> this rank dumps where it stands, and asks the others to by a file in RUN/trace
             -> a thread of each rank sees it, and dumps, too
        -> the lowest rank that has dumped prints the report; the job ends

Threads dump, not the main one, so that a rank that is stuck in a library dumps, too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

from . import launch
from .collectives import Collectives
from .errors import CollectiveTimeout
from .trace import hang
from .trace.analysis import stuck
from .trace.hang import Dump, Under

SIGNAL = signal.SIGQUIT
STATUS = 128 + SIGNAL
_REQUEST = "hang-request"
_LOOK_S = 2.0  # between two looks for a request
_PATIENCE_S = 6.0  # for the dumps of the other ranks
_EVENTS = 200  # of the ring, in a dump


class Hangs:
    """Dumps this rank when it is asked to.

    Args:
        folder: RUN/trace.
        run_id: of the run.
    """

    def __init__(self, collectives: Collectives, folder: Path, run_id: str) -> None:
        self._collectives, self._folder, self._run_id = collectives, folder, run_id
        self._runtime = collectives.runtime
        self._lock = threading.Lock()
        self._dumped = False
        self._over = threading.Event()
        threading.Thread(target=self._look, name="hpcsync-hangs", daemon=True).start()

    def close(self) -> None:
        """Look for requests no more."""
        self._over.set()

    def timed_out(self, error: CollectiveTimeout) -> None:
        """A collective of this rank is stuck: tell, before the error of it ends the job."""
        if self._dump("timeout", error.__traceback__):
            self._tell()
        else:  # the rank that asked for our dump has to speak first
            time.sleep(_PATIENCE_S + 1.0)

    def signalled(self) -> None:
        """SIGQUIT came: tell, and end the job, unless another rank asked for it and will."""
        asked = self._request().exists()
        if self._dump("request" if asked else "SIGQUIT") and not asked:
            self._tell()
            self._end()

    def _end(self) -> NoReturn:
        if self._runtime.size == 1:
            os._exit(STATUS)
        launch.abort(STATUS)

    def _dump(self, reason: str, where: TracebackType | None = None) -> bool:
        """Leave this rank's dump; False if that was done before.

        Args:
            where: this thread stood when it gave up; where it stands now if not given.
        """
        with self._lock:
            if self._dumped:
                return False
            self._dumped = True
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._request().touch()
            hang.save(self._standing(reason, where or sys._getframe()), self._folder)
        except Exception as error:  # the job must end all the same
            rank, text = self._runtime.rank, f"{type(error).__name__}: {error}"
            print(f"hpcsync: warning: rank {rank} cannot leave a dump: {text}", file=sys.stderr)
        return True

    def _standing(self, reason: str, where: FrameType | TracebackType) -> Dump:
        runtime, recorder = self._runtime, self._collectives.recorder
        active = [
            Under(
                collective=each.label,
                sequence=each.run,
                segment=each.segment,
                level=each.level,
                waits=each.waits,
            )
            for each in self._collectives.progress.standing()
        ]
        return Dump(
            rank=runtime.rank,
            ranks=runtime.size,
            node=runtime.topology.node_of(runtime.rank),
            host=runtime.host,
            pid=os.getpid(),
            time=time.time(),
            reason=reason,
            step=recorder.step,
            run_id=self._run_id,
            clock_ns=time.perf_counter_ns(),
            offset_ns=recorder.offset,
            events=recorder.last()[-_EVENTS:],
            active=tuple(active),
            reached=self._collectives.reached(),
            stacks=hang.stacks(where),
        )

    def _tell(self) -> None:
        """Wait for the other ranks' dumps, and print the report if no lower rank will."""
        until = time.monotonic() + _PATIENCE_S
        while self._left() < self._runtime.size and time.monotonic() < until:
            time.sleep(0.2)
        if not self._speaks():
            return
        dumps: Sequence[Dump] = ()
        with contextlib.suppress(Exception):
            dumps = [dump for dump in hang.load(self._folder).dumps if dump.run_id == self._run_id]
        if dumps:
            lines = stuck.render(stuck.report(dumps, self._runtime.size))
            text = "\n".join(f"hpcsync: {line}" if line else "hpcsync:" for line in lines)
            print(text, file=sys.stderr, flush=True)

    def _left(self) -> int:
        """How many ranks have left a dump."""
        try:
            return sum(path.name.startswith("hang-") for path in self._folder.iterdir())
        except OSError:
            return 0

    def _speaks(self) -> bool:
        """Whether no lower rank will: those that were asked by another leave it to that one."""
        for rank in range(self._runtime.rank):
            with contextlib.suppress(OSError, ValueError):
                text = (self._folder / f"hang-{rank}.json").read_text(encoding="utf-8")
                if Dump.from_json(text).reason != "request":
                    return False
        return True

    def _request(self) -> Path:
        return self._folder / f".{_REQUEST}-{self._run_id}"

    def _look(self) -> None:
        while not self._over.wait(_LOOK_S):
            if self._request().exists():
                self._dump("request")
                return
