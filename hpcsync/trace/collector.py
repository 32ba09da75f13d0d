"""From the rings of a node's ranks to its file: a thread of the node's first rank.

    ring of each rank, in memory that the node shares
        -> every second: what came since, of all ranks
             -> durations of all steps into histograms
             -> events of every N-th step, kept
        -> now and then: the file (writer)

The other ranks do nothing for it but store their events. Flushes are as far apart as keeps their
cost below ``_SHARE`` of the time.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .events import BINS, LANES, MEMORY, Events, bins_of
from .recorder import STEP as _STEP
from .recorder import Recorder, Ring, now
from .writer import NodeFile

_COLLECT_S = 1.0
_FLUSH_S = 3.0
_SHARE = 0.002
_LONGEST_S = 60.0  # between flushes, whatever they cost: a killed run loses what came since
_PATIENCE_S = 30.0
_TRIALS = 2000


@dataclass(frozen=True, slots=True)
class Source:
    """A rank of the node: its ring, and its process for the size of its memory."""

    ring: Ring
    pid: int


class Collector:
    """Keeps a node's trace file up to date; ``start`` it, and ``stop`` it at the end.

    Args:
        file: of the node.
        sources: by rank.
        every: each so many steps one is written.

    Attributes:
        problem: why nothing is written any more, if so.
    """

    def __init__(self, file: NodeFile, sources: Mapping[int, Source], every: int) -> None:
        self._file, self._sources, self._every = file, sources, every
        self._wake = threading.Event()
        self._told: deque[Callable[[], None]] = deque()  # whoever tells does not wait for the file
        self._stopping = False
        self._seen_lost = dict.fromkeys(sources, 0)
        self._remembered = dict.fromkeys(sources, 0)
        self._thread = threading.Thread(target=self._main, name="hpcsync-trace", daemon=True)
        self.problem = ""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Whose events it keeps."""
        return tuple(self._sources)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def add_clock(self, rank: int, rows: NDArray[np.void]) -> None:
        """Keep measurements of a rank's clock; any thread may."""
        self._told.append(lambda: self._file.add_clock(rank, rows))

    def describe(self, run: Mapping[str, str]) -> None:
        """Other texts about the run; any thread may."""
        self._told.append(lambda: self._file.describe(run))

    def stop(self, *, complete: bool) -> None:
        """Write what is left.

        Args:
            complete: the run ended well.
        """
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout=_PATIENCE_S)
        if self._thread.is_alive():
            self.problem = f"the file system has not answered for {_PATIENCE_S:g} s"
        if not self.problem:
            try:
                self._collect()
                self._file.flush(complete=complete)
            except Exception as error:
                self.problem = _line(error)

    def _main(self) -> None:
        flushed, pause = time.perf_counter(), _FLUSH_S
        try:
            while not self._stopping:
                self._wake.wait(_COLLECT_S)
                self._collect()
                if time.perf_counter() - flushed > pause:
                    pause = min(max(_FLUSH_S, self._file.flush() / _SHARE), _LONGEST_S)
                    flushed = time.perf_counter()
        # A full disk, say, of which HDF5 makes many kinds of errors: the run goes on without.
        except Exception as error:
            self.problem = _line(error)

    def _collect(self) -> None:
        while self._told:
            self._told.popleft()()
        for rank, source in self._sources.items():
            found = source.ring.take()
            lost = source.ring.lost - self._seen_lost[rank]
            self._seen_lost[rank] += lost
            if found.shape[0]:
                self._file.count(rank, histogram(found), lost)
                self._file.add(rank, found[found["step"] % self._every == 0])
                self._remember(rank, source)

    def _remember(self, rank: int, source: Source) -> None:
        step = source.ring.finished
        if step > self._remembered[rank]:
            self._remembered[rank] = step
            self._file.add_memory(rank, np.array([(step, *memory_of(source.pid))], MEMORY))


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def histogram(found: Events) -> NDArray[np.uint64]:
    """Durations by (lane, bin) of events that belong to a step."""
    of_steps = found[found["step"] > 0]
    bins = bins_of(of_steps["end"] - of_steps["start"])
    flat = np.bincount(of_steps["lane"].astype(np.int64) * BINS + bins, minlength=len(LANES) * BINS)
    return flat.astype(np.uint64).reshape(len(LANES), BINS)


def memory_of(pid: int) -> tuple[int, int]:
    """Resident and peak bytes of a process; zeros where the system does not tell."""
    sizes = {"VmRSS": 0, "VmHWM": 0}
    try:
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(":")
            if key in sizes:
                sizes[key] = int(value.split()[0]) << 10
    except (OSError, ValueError):
        pass
    return sizes["VmRSS"], sizes["VmHWM"]


def event_cost_ns() -> float:
    """What recording one event takes here: the median of some hundreds."""
    recorder = Recorder(64)
    taken = np.empty(_TRIALS, np.int64)
    for index in range(_TRIALS):
        start = now()
        recorder.add(_STEP, start, now())
        taken[index] = now() - start
    return float(np.median(taken))
