"""One program of staged messages: a schedule in cells, and what moves them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..device import Event
from ..schedules.base import Action, Schedule
from .base import Program, Region, Wait, chunk_offsets, final_sum
from .cells import Cell, Group, cut
from .staging import Lanes, Piece

if TYPE_CHECKING:
    from mpi4py.MPI import Request

_WINDOW = 4  # rounds of cells that are on the way at once


class StagedProgram(Program):
    """A schedule in cells."""

    def __init__(
        self, lanes: Lanes, schedule: Schedule, region: Region, tag: int, divisor: int
    ) -> None:
        assert region.stream is not None, "mpi_staged is for device memory"
        self.lanes, self.schedule, self.region = lanes, schedule, region
        self.stream, self.tag, self.divisor = region.stream, tag, divisor
        self.final = final_sum(schedule)
        size = region.dtype.itemsize
        grid = max(1, lanes.piece_bytes // size)
        self.cells = cut(schedule, chunk_offsets(schedule, region), grid)
        self.array = region.array
        self.memory = region.buffer.own[region.offset : region.offset + region.nbytes]

    def run(self) -> Iterator[Wait]:
        run = _Run(self)
        while not run.over:
            yield run


@dataclass(slots=True)
class _Message:
    """A cell between MPI and a device.

    Attributes:
        missing: 1 until MPI has completed it.
        event: after which MPI may have it.
    """

    cell: Cell
    piece: Piece
    event: Event | None = None
    request: Request | None = None
    missing: int = 1


@dataclass(slots=True)
class _Came:
    """What has come of a group: scratch memory by rank, and the last copy's event."""

    group: Group
    pieces: dict[int, Piece] = field(default_factory=dict)
    event: Event | None = None


class _Run(Wait):
    """One run under way; asked whether it is ready, it moves on as far as it can.

    Attributes:
        over: all work is given, and all messages are complete.
    """

    __slots__ = (
        *("_came", "_device_event", "_downs", "_given", "_lanes", "_lowered", "_open"),
        *("_program", "_receiving", "_sending", "_tag", "over"),
    )

    def __init__(self, program: StagedProgram) -> None:
        self._program = program
        self._lanes = program.lanes
        self._downs: list[Event] = []  # of the cells that were copied down
        self._lowered: deque[_Message] = deque()  # copied down, not yet sent
        self._sending: list[_Message] = []
        self._receiving: list[_Message] = []
        self._open = 0  # cells of which the receive was posted
        self._came: dict[int, _Came] = {}
        self._given: set[int] = set()  # groups that were added or stored
        self._device_event: Event | None = None  # at the end of the region's stream
        cells = program.cells
        self.over = not cells.sends and not cells.receives

    def ready(self) -> bool:
        self._lanes.completions.poll()
        moved = self._receive()
        moved |= self._copy_up()
        moved |= self._add()
        moved |= self._copy_down()
        moved |= self._send()
        cells = self._program.cells
        self.over = (
            len(self._given) == len(cells.groups)
            and len(self._downs) == len(cells.sends)
            and not self._lowered
            and not self._sending
        )
        return moved or self.over

    def describe(self) -> str:
        ranks = self._lanes.ranks
        size = self._program.region.dtype.itemsize
        missing = [
            f"{(each.cell.stop - each.cell.start) * size} bytes {verb} rank {ranks[each.cell.peer]}"
            for verb, messages in (("from", self._receiving), ("to", self._sending))
            for each in messages
            if each.missing
        ]
        if not missing and self._lowered:
            missing = ["the device to copy to the host"]
        schedule = self._program.schedule
        at = min((each.cell.step for each in (*self._receiving, *self._sending)), default=0)
        return (
            f"mpi_staged: {schedule.name} waits at step {at} of {len(schedule.steps)} for "
            f"{', '.join(missing) or 'nothing more'}"
        )

    def _receive(self) -> bool:
        """Post receives."""
        cells, lanes, size = self._program.cells.receives, self._lanes, self._itemsize
        before = self._open
        while self._open < len(cells):
            cell = cells[self._open]
            if self._receiving and cell.round >= self._receiving[0].cell.round + _WINDOW:
                break
            piece = lanes.pinned.take((cell.stop - cell.start) * size)
            message = _Message(cell, piece)
            message.request = lanes.comm.Irecv(
                [piece.memory, lanes.byte], cell.peer, self._program.tag
            )
            lanes.completions.watch([message.request], message)
            self._receiving.append(message)
            self._open += 1
        return self._open > before

    def _copy_up(self) -> bool:
        """Copy to the device what has come."""
        left = [each for each in self._receiving if each.missing or not self._lift(each)]
        moved = len(left) < len(self._receiving)
        self._receiving = left
        return moved

    def _lift(self, message: _Message) -> bool:
        cell, lanes, size = message.cell, self._lanes, self._itemsize
        group = self._program.cells.groups[cell.group]
        came = self._came.setdefault(cell.group, _Came(group))
        if group.action is Action.REDUCE:
            scratch = lanes.scratch.take((cell.stop - cell.start) * size, lanes.up)
            lanes.up.copy(scratch.memory, message.piece.memory)
            came.pieces[cell.peer] = scratch
            came.event = lanes.up.record()
        else:
            if not self._due(group):
                return False
            lanes.up.wait(self._made())
            if group.after >= 0:
                lanes.up.wait(self._downs[group.after])
            target = self._program.memory[cell.start * size : cell.stop * size]
            lanes.up.copy(target, message.piece.memory)
            came.event = lanes.up.record()
            self._program.stream.wait(came.event)
            self._done(cell.group)
        lanes.pinned.give(message.piece, came.event)
        return True

    def _add(self) -> bool:
        """Add the groups that are complete."""
        complete = [
            index
            for index, came in self._came.items()
            if len(came.pieces) == len(came.group.peers) and self._due(came.group)
        ]
        for index in complete:
            self._add_group(self._came[index])
            self._done(index)
        return bool(complete)

    def _add_group(self, came: _Came) -> None:
        program, group = self._program, came.group
        stream, dtype = program.stream, program.region.dtype
        if group.after >= 0:
            stream.wait(self._downs[group.after])
        assert came.event is not None
        stream.wait(came.event)  # the last copy up, and so all of them
        own = program.array[group.start : group.stop]
        sources = {who: piece.memory.view(dtype.storage) for who, piece in came.pieces.items()}
        sources[self._lanes.rank] = own
        divisor = program.divisor if group.step == program.final else 1
        stream.reduce([own], [sources[who] for who in sorted(sources)], dtype, divisor)
        added = stream.record()
        for piece in came.pieces.values():
            self._lanes.scratch.give(piece, added)

    def _due(self, group: Group) -> bool:
        """Whether its elements may change: what comes before is copied down, and given."""
        return group.after < len(self._downs) and self._given.issuperset(group.before)

    def _done(self, index: int) -> None:
        del self._came[index]
        self._given.add(index)
        self._device_event = None

    def _made(self) -> Event:
        """An event after all that was given to the region's stream."""
        if self._device_event is None:
            self._device_event = self._program.stream.record()
        return self._device_event

    def _copy_down(self) -> bool:
        """Copy to the host what may be sent next."""
        cells, lanes, size = self._program.cells.sends, self._lanes, self._itemsize
        before = len(self._downs)
        while len(self._downs) < len(cells):
            cell = cells[len(self._downs)]
            first = next(iter((*self._sending, *self._lowered)), None)
            if first is not None and cell.round >= first.cell.round + _WINDOW:
                break
            if not self._given.issuperset(cell.needs):
                break
            piece = lanes.pinned.take((cell.stop - cell.start) * size)
            lanes.down.wait(self._made())
            lanes.down.copy(
                piece.memory, self._program.memory[cell.start * size : cell.stop * size]
            )
            event = lanes.down.record()
            self._downs.append(event)
            self._lowered.append(_Message(cell, piece, event))
        return len(self._downs) > before

    def _send(self) -> bool:
        """Send what has been copied down; take back what has been sent."""
        lanes = self._lanes
        sent = [each for each in self._sending if not each.missing]
        for each in sent:
            lanes.pinned.give(each.piece)
        self._sending = [each for each in self._sending if each.missing]
        posted = False
        while self._lowered and (event := self._lowered[0].event) is not None and event.ready():
            message = self._lowered.popleft()
            message.request = lanes.comm.Isend(
                [message.piece.memory, lanes.byte], message.cell.peer, self._program.tag
            )
            lanes.completions.watch([message.request], message)
            self._sending.append(message)
            posted = True
        return posted or bool(sent)

    @property
    def _itemsize(self) -> int:
        return self._program.region.dtype.itemsize
