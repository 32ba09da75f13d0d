"""A schedule's transfers cut into cells: messages short enough to pass on while others arrive.

Cells begin at multiples of a grid, so that ranks which meet cut alike. In a step the first cells
of all transfers go first, then the second ones, and so on: a round each. The rounds of one step
follow those of the step before it. A rank that begins a round before all earlier ones are
complete, but no more than a fixed number of them early, still meets every other rank: whatever it
waits for is no later than its own first open round.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..schedules.base import Action, Schedule, Transfer


class Cell(NamedTuple):
    """One message.

    Attributes:
        round: counts through all steps.
        peer: rank of the group at the other end.
        start, stop: elements of the region.
        group: of a received cell, its index in ``Cells.groups``; -1 if it is sent.
        needs: of a sent cell, the groups of earlier steps that must be stored before.
    """

    round: int
    step: int
    peer: int
    start: int
    stop: int
    group: int = -1
    needs: tuple[int, ...] = ()


@dataclass(slots=True)
class Group:
    """Received cells of the same elements, which are added at once, or the one that is stored.

    Attributes:
        step: in which they come.
        action: what is done with them.
        peers: that they come from.
        after: index of the last cell sent from these elements before they change; -1 for none.
        before: groups of earlier steps on some of these elements, which change them first: a late
            rank's cell may come after those of later steps.
    """

    step: int
    action: Action
    start: int
    stop: int
    peers: list[int]
    after: int = -1
    before: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Cells:
    """What a rank sends and receives in one run, each in the order in which it is posted."""

    sends: list[Cell]
    receives: list[Cell]
    groups: list[Group]


def cut(schedule: Schedule, offsets: Sequence[int], grid: int) -> Cells:
    """The cells of one rank's schedule.

    Args:
        offsets: element offset of each chunk.
        grid: elements of a cell, at most.
    """
    made = Cells([], [], [])
    places: dict[int, list[int]] = {}  # grid cell -> groups in it
    first = 0
    for index, step in enumerate(schedule.steps):
        sent, rounds_sent = _rounds(step.sends, offsets, grid)
        received, rounds = _rounds(step.recvs, offsets, grid)
        for at, peer, start, stop in sent:
            needs = _overlapping(made, places.get(start // grid, ()), start, stop)
            made.sends.append(Cell(first + at, index, peer, start, stop, -1, needs))
        mine: dict[int, int] = {}
        for at, peer, start, stop in received:
            if start not in mine:
                mine[start] = len(made.groups)
                before = _overlapping(made, places.get(start // grid, ()), start, stop)
                made.groups.append(Group(index, step.action, start, stop, [], -1, before))
            group = mine[start]
            made.groups[group].peers.append(peer)
            made.receives.append(Cell(first + at, index, peer, start, stop, group))
        for start, group in mine.items():
            places.setdefault(start // grid, []).append(group)
        first += max(rounds, rounds_sent)
    _order(made, grid)
    return made


def _overlapping(cells: Cells, near: Iterable[int], start: int, stop: int) -> tuple[int, ...]:
    """Which of the groups hold some of the elements."""
    groups = cells.groups
    return tuple(each for each in near if groups[each].start < stop and start < groups[each].stop)


def _rounds(
    moves: Iterable[Transfer], offsets: Sequence[int], grid: int
) -> tuple[list[tuple[int, int, int, int]], int]:
    """(round within the step, peer, start, stop) in order of posting; and how many rounds."""
    found: list[tuple[int, int, int, int, int]] = []
    most = 0
    for order, move in enumerate(moves):
        start, end, at = offsets[move.lo], offsets[move.hi], 0
        while start < end:
            stop = min(end, (start // grid + 1) * grid)
            found.append((at, order, move.peer, start, stop))
            start, at = stop, at + 1
        most = max(most, at)
    return [(at, peer, start, stop) for at, _, peer, start, stop in sorted(found)], most


def _order(cells: Cells, grid: int) -> None:
    """Find for each group the last cell that is sent from its elements before they change."""
    sends: dict[int, list[int]] = {}
    for index, cell in enumerate(cells.sends):
        sends.setdefault(cell.start // grid, []).append(index)
    for group in cells.groups:
        for index in sends.get(group.start // grid, ()):
            cell = cells.sends[index]
            if cell.step <= group.step and cell.start < group.stop and group.start < cell.stop:
                group.after = index
