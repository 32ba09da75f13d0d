"""A schedule that is run step by step, by messages: what is sent, and how what comes is added."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..device.base import Arithmetic, Array
from ..schedules.base import Schedule, Step, Transfer
from .base import Program, Region, chunk_offsets, final_sum


class Incoming(NamedTuple):
    """What comes from a rank of the group.

    Attributes:
        part: elements of the region that it is for.
        memory: where it arrives.
    """

    peer: int
    part: slice
    memory: Array


class Steps(Program):
    """Steps of a schedule on a region.

    Args:
        rank: of the group, whose steps these are.
    """

    def __init__(self, rank: int, schedule: Schedule, region: Region, divisor: int) -> None:
        self._rank, self._schedule, self._region = rank, schedule, region
        self._array = region.array
        self._offsets = chunk_offsets(schedule, region)
        self._final, self._divisor = final_sum(schedule), divisor

    def _part(self, move: Transfer) -> slice:
        """The elements that a transfer is about."""
        return slice(self._offsets[move.lo], self._offsets[move.hi])

    def _sent(self, step: Step) -> list[tuple[int, Array]]:
        """To whom the step sends what; nothing empty."""
        found = [(move.peer, self._array[self._part(move)]) for move in step.sends]
        return [each for each in found if each[1].nbytes]

    def _received(self, step: Step) -> list[tuple[int, slice]]:
        """From whom the step receives what; nothing empty."""
        found = [(move.peer, self._part(move)) for move in step.recvs]
        return [each for each in found if each[1].start < each[1].stop]

    def _reduce(self, came: Iterable[Incoming], worker: Arithmetic, step: int) -> None:
        """Add what has come in a step, in the order of ranks."""
        divisor = self._divisor if step == self._final else 1
        parts: dict[tuple[int, int], dict[int, Array]] = {}
        for each in came:
            parts.setdefault((each.part.start, each.part.stop), {})[each.peer] = each.memory
        for (start, stop), sources in parts.items():
            own = self._array[start:stop]
            sources[self._rank] = own
            ordered = [sources[who] for who in sorted(sources)]
            worker.reduce([own], ordered, self._region.dtype, divisor)
