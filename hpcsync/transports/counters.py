"""Counters in mapped memory, by which the ranks of a node see how far each has come.

A pair a rank and program. ``entered`` says that the rank has reached a step: what it offers there
is final, and what it will receive may be written. ``left`` says that it has read and written all
that the step asks for.

A counter is one aligned 8-byte word with one writer. Processors that reorder stores get a full
fence from a lock's release and acquire.
"""

from __future__ import annotations

import mmap
import platform
import threading
from collections.abc import Sequence

from ..errors import HpcsyncError
from .base import Wait

_LINE = 8  # words of 8 bytes a program: a cache line, so that ranks do not share one
_STRIDE = 1 << 20  # steps a run may have; runs are told apart by multiples of it
_ORDERED = platform.machine() in ("x86_64", "AMD64", "i686")
_FENCE = threading.Lock()


def header(slots: int) -> int:
    """Bytes of each rank's map that the counters of ``slots`` programs take: whole pages."""
    return -(-slots * _LINE * 8 // mmap.PAGESIZE) * mmap.PAGESIZE


def fence() -> None:
    """Order this thread's memory accesses before and after the call."""
    if not _ORDERED:
        with _FENCE:
            pass


class Slots:
    """The lines of counters of a buffer.

    Args:
        maps: of each rank, which begin with ``nbytes`` of counters.

    Attributes:
        words: of each rank, 64 bits each.
        runs: how often each line has been used, the same on every rank.
    """

    def __init__(self, maps: Sequence[mmap.mmap], nbytes: int) -> None:
        self.words = [memoryview(each)[:nbytes].cast("Q") for each in maps]
        self.runs = [0] * (nbytes // (8 * _LINE))
        self._free = list(reversed(range(len(self.runs))))

    @property
    def left(self) -> int:
        """How many are free."""
        return len(self._free)

    def take(self) -> int:
        """A free line; calls come in the same order on all ranks.

        Raises:
            HpcsyncError: all are taken; ``Collectives.buffer`` was told of too few bindings.
        """
        if not self._free:
            raise HpcsyncError(
                f"a shared buffer has counters for {len(self.runs)} programs, and all are in use; "
                "close collectives that are not needed, or make it for more bindings"
            )
        return self._free.pop()

    def give(self, slot: int) -> None:
        """Take back the line of a program that will not run again.

        Its values stay, and so does the number of runs: the next program counts on from it.
        """
        self._free.append(slot)


class Counters:
    """The counters of one program, on a free line of ``slots``.

    Args:
        name: of the transport, for reports.
        ranks: job-wide, of the group.
        rank: of this process in the group.

    Attributes:
        slot: its line.
        run: number of the last run; it goes on where the line's last program has ended.
    """

    ENTERED, LEFT = 0, 1

    def __init__(self, slots: Slots, name: str, ranks: Sequence[int], rank: int) -> None:
        self.words = slots.words
        self.ranks = ranks
        self.name = name
        self.run = 0
        self._slots = slots
        self.slot = slots.take()
        self._base = self.slot * _LINE
        self._rank = rank

    def begin(self) -> None:
        """A new run."""
        self._slots.runs[self.slot] += 1
        self.run = self._slots.runs[self.slot]

    def close(self) -> None:
        """The program will not run again."""
        self._slots.give(self.slot)

    def enter(self, step: int, note: int = 0) -> None:
        """This rank has reached a step; ``note`` goes with it."""
        self._set(self.ENTERED, step, note)

    def leave(self, step: int, note: int = 0) -> None:
        """This rank has done a step; ``note`` goes with it."""
        self._set(self.LEFT, step, note)

    def _set(self, which: int, step: int, note: int) -> None:
        words = self.words[self._rank]
        words[self._base + which + 2] = note
        fence()
        words[self._base + which] = self.run * _STRIDE + step + 1

    def note(self, which: int, rank: int) -> int:
        """What a rank gave with the step that it was seen to have come to, or with a later one."""
        return self.words[rank][self._base + which + 2]

    def at(self, which: int, rank: int) -> int:
        """How far a rank has come."""
        return self.words[rank][self._base + which]

    def until(self, which: int, peers: Sequence[tuple[int, int]]) -> Counted:
        """Until each (rank, step) of ``peers`` has entered or left its step."""
        return Counted(self, which, [(who, self.run * _STRIDE + at + 1) for who, at in peers])


class Counted(Wait):
    """Waits until counters of other ranks have come up to given values."""

    __slots__ = ("_counters", "_missing", "_which")

    def __init__(self, counters: Counters, which: int, missing: list[tuple[int, int]]) -> None:
        self._counters = counters
        self._which = which
        self._missing = missing

    def ready(self) -> bool:
        counters, missing = self._counters, self._missing
        while missing:
            who, value = missing[-1]
            if counters.at(self._which, who) < value:
                return False
            missing.pop()
        fence()
        return True

    def describe(self) -> str:
        counters = self._counters
        verb = "reach" if self._which == Counters.ENTERED else "leave"
        places = [
            f"rank {counters.ranks[who]} to {verb} {_place(value)} "
            f"(it is at {_place(counters.at(self._which, who))})"
            for who, value in reversed(self._missing)
            if counters.at(self._which, who) < value
        ]
        return f"{counters.name}: waits for {', '.join(places) or 'nothing more'}"


def _place(word: int) -> str:
    """A counter's value in words."""
    run, step = divmod(word - 1, _STRIDE)
    return f"step {step} of run {run}" if word else "its start"
