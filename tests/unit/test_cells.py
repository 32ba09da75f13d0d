"""A schedule in cells: everything is sent once, in an order in which ranks always meet."""

from __future__ import annotations

from collections import deque

import pytest

from hpcsync import schedules
from hpcsync.schedules import Action, Kind, Schedule
from hpcsync.schedules.base import chunk_bounds
from hpcsync.transports.cells import Cells, cut

STEPWISE = ("direct", "ring", "halving", "doubling")
KINDS = (Kind.ALLREDUCE, Kind.REDUCE_SCATTER, Kind.ALLGATHER)
SIZES = (2, 3, 4, 5, 7, 8)
COUNT = 100


def offsets_of(schedule: Schedule) -> list[int]:
    return chunk_bounds(COUNT, max(schedule.chunks, 1), 1)


def everyone(name: str, kind: Kind, size: int, grid: int) -> list[tuple[Schedule, Cells]]:
    every = schedules.everyone(name, kind, size)
    return [(each, cut(each, offsets_of(each), grid)) for each in every]


@pytest.mark.parametrize("grid", [1, 7, 16, 1000])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", STEPWISE)
def test_cells_cover_each_transfer_once(name: str, size: int, grid: int) -> None:
    for schedule, cells in everyone(name, Kind.ALLREDUCE, size, grid):
        offsets = offsets_of(schedule)
        for index, step in enumerate(schedule.steps):
            for moves, found in ((step.sends, cells.sends), (step.recvs, cells.receives)):
                wanted = sorted(
                    (move.peer, element)
                    for move in moves
                    for element in range(offsets[move.lo], offsets[move.hi])
                )
                got = sorted(
                    (cell.peer, element)
                    for cell in found
                    if cell.step == index
                    for element in range(cell.start, cell.stop)
                )
                assert got == wanted
        assert all(cell.stop - cell.start <= grid for cell in (*cells.sends, *cells.receives))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", STEPWISE)
def test_what_one_rank_sends_another_receives_in_that_order(name: str, size: int) -> None:
    ranks = [cells for _, cells in everyone(name, Kind.ALLREDUCE, size, 7)]
    for sender in range(size):
        for receiver in range(size):
            sent = [(c.start, c.stop) for c in ranks[sender].sends if c.peer == receiver]
            got = [(c.start, c.stop) for c in ranks[receiver].receives if c.peer == sender]
            assert sent == got


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", STEPWISE)
def test_order_within_a_rank(name: str, size: int, kind: Kind) -> None:
    """What is sent waits for what changes it before; what changes waits for what is sent before."""
    for _, cells in everyone(name, kind, size, 7):
        for index, cell in enumerate(cells.sends):
            for place, group in enumerate(cells.groups):
                if not (group.start < cell.stop and cell.start < group.stop):
                    continue
                if group.step < cell.step:
                    assert place in cell.needs
                else:
                    assert group.after >= index
        assert [cell.round for cell in cells.sends] == sorted(cell.round for cell in cells.sends)
        rounds = [cell.round for cell in cells.receives]
        assert rounds == sorted(rounds)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", STEPWISE)
def test_steps_change_elements_one_after_the_other(name: str, size: int, kind: Kind) -> None:
    for _, cells in everyone(name, kind, size, 7):
        for group in cells.groups:
            wanted = [
                index
                for index, other in enumerate(cells.groups)
                if other.step < group.step and other.start < group.stop and group.start < other.stop
            ]
            assert list(group.before) == wanted


class Runner:
    """One rank that passes cells on, its messages not buffered by anybody."""

    def __init__(self, cells: Cells, window: int) -> None:
        self.cells, self.window = cells, window
        self.sent = self.received = 0  # posted
        self.sending: list[int] = []
        self.receiving: list[int] = []
        self.missing = [set(group.peers) for group in cells.groups]
        self.given: set[int] = set()

    def post(self, sends: dict[int, deque[int]], receives: dict[int, deque[int]]) -> bool:
        """Post what may be: into the queues of the peers."""
        before = self.sent, self.received
        while self.received < len(self.cells.receives):
            cell = self.cells.receives[self.received]
            first = self.cells.receives[self.receiving[0]] if self.receiving else cell
            if cell.round >= first.round + self.window:
                break
            self.receiving.append(self.received)
            receives[cell.peer].append(self.received)
            self.received += 1
        while self.sent < len(self.cells.sends):
            cell = self.cells.sends[self.sent]
            first = self.cells.sends[self.sending[0]] if self.sending else cell
            if cell.round >= first.round + self.window or not self.given.issuperset(cell.needs):
                break
            self.sending.append(self.sent)
            sends[cell.peer].append(self.sent)
            self.sent += 1
        return before != (self.sent, self.received)

    def came(self, index: int) -> None:
        cell = self.cells.receives[index]
        self.missing[cell.group].discard(cell.peer)
        self.receiving.remove(index)

    def give(self) -> bool:
        """Add the groups that are complete and whose elements have been sent."""
        ready = [
            index
            for index, group in enumerate(self.cells.groups)
            if index not in self.given
            and not self.missing[index]
            and group.after < self.sent
            and self.given.issuperset(group.before)
        ]
        self.given.update(ready)
        return bool(ready)

    @property
    def over(self) -> bool:
        return (
            self.sent == len(self.cells.sends)
            and not self.sending
            and len(self.given) == len(self.cells.groups)
        )


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", STEPWISE)
def test_ranks_never_wait_for_each_other(name: str, size: int, window: int, kind: Kind) -> None:
    """A message is only complete once both sides are there: no memory of MPI's own helps."""
    runners = [Runner(cells, window) for _, cells in everyone(name, kind, size, 3)]
    sends = [{who: deque[int]() for who in range(size)} for _ in range(size)]
    receives = [{who: deque[int]() for who in range(size)} for _ in range(size)]
    moved = True
    while moved:
        moved = False
        for rank, runner in enumerate(runners):
            moved |= runner.post(sends[rank], receives[rank])
            moved |= runner.give()
        for rank, runner in enumerate(runners):
            for peer, queue in sends[rank].items():
                while queue and receives[peer][rank]:
                    runner.sending.remove(queue.popleft())
                    runners[peer].came(receives[peer][rank].popleft())
                    moved = True
    assert all(runner.over for runner in runners)


def test_a_stored_cell_comes_from_one_rank() -> None:
    for name in STEPWISE:
        for _, cells in everyone(name, Kind.ALLREDUCE, 4, 7):
            for group in cells.groups:
                assert group.action is Action.REDUCE or len(group.peers) == 1
