"""Point-to-point MPI messages between host buffers.

Requests are persistent: a bucket sends the same bytes to the same peers every step, and starting
a prepared request costs less than making a new one. Programs with very many messages make them
afresh instead, since each persistent request keeps memory in the MPI library.

Messages are cut at ``piece_bytes``, since classic MPI counts have 31 bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..device.base import Arithmetic, Stream
from ..schedules.base import Action, Kind, Schedule, Step
from .base import Mail, Parcel, Program, Region, Wait
from .messages import PIECE_BYTES, Arrived, pieces
from .point_to_point import PointToPoint
from .steps import Incoming, Steps

if TYPE_CHECKING:
    from mpi4py.MPI import Request

_MOST_PERSISTENT = 256  # requests a program


class MpiHost(PointToPoint[Arithmetic]):
    """MPI between the memory of hosts."""

    name = "mpi_host"

    def _program(self, schedule: Schedule, region: Region, tag: int, divisor: int) -> Program:
        if schedule.name == "native":
            return _Native(self, schedule, region, divisor)
        return _Messages(self, schedule, region, tag, divisor)

    def _mail(
        self,
        sends: Sequence[Parcel],
        receives: Sequence[Parcel],
        tag: int,
        stream: Stream | None,
    ) -> Mail:
        assert stream is None, "mpi_host is for host memory"
        return _Mail(self, sends, receives, tag)


class _Messages(Steps):
    """The steps of a schedule as messages."""

    def __init__(
        self, transport: MpiHost, schedule: Schedule, region: Region, tag: int, divisor: int
    ) -> None:
        super().__init__(transport.rank, schedule, region, divisor)
        self._transport, self._tag = transport, tag
        self._scratch = np.empty(self._scratch_elements(), region.dtype.storage)
        self.completions = transport.completions
        count = sum(len(step.sends) + len(step.recvs) for step in schedule.steps)
        self._persistent: list[list[Request]] | None = None
        if count <= _MOST_PERSISTENT:
            self._persistent = [self._post(step, persistent=True) for step in schedule.steps]

    def run(self) -> Iterator[Wait]:
        for index, step in enumerate(self._schedule.steps):
            if self._persistent is None:
                requests = self._post(step, persistent=False)
            else:
                requests = self._persistent[index]
                if requests:
                    self._transport.mpi.Prequest.Startall(requests)
            if requests:
                yield Arrived(requests, index, self)
            if step.action is Action.REDUCE:
                self._reduce(self._incoming(step), self._transport.device, index)

    def close(self) -> None:
        for requests in self._persistent or []:
            for request in requests:
                request.Free()
        self._persistent = []

    def describe(self, step: int, requests: Sequence[Request]) -> str:
        """Which peers' messages of ``step`` are missing."""
        moves = self._schedule.steps[step]
        width, size = self._transport.piece_bytes, self._region.dtype.itemsize
        missing: list[str] = []
        rest = iter(requests)
        for verb, moved in (("from", moves.recvs), ("to", moves.sends)):
            for move in moved:
                nbytes = (self._offsets[move.hi] - self._offsets[move.lo]) * size
                sent = list(itertools.islice(rest, -(-nbytes // width)))
                if not all(piece.Get_status() for piece in sent):
                    rank = self._transport.ranks[move.peer]
                    missing.append(f"{nbytes} bytes {verb} rank {rank}")
        return (
            f"mpi_host: {self._schedule.name} waits at step {step} of "
            f"{len(self._schedule.steps)} for {', '.join(missing) or 'nothing more'}"
        )

    def _scratch_elements(self) -> int:
        return max(
            (
                sum(part.stop - part.start for _, part in self._received(step))
                for step in self._schedule.steps
                if step.action is Action.REDUCE
            ),
            default=0,
        )

    def _incoming(self, step: Step) -> list[Incoming]:
        """What the step receives: in scratch memory, if it is to be added."""
        arrivals: list[Incoming] = []
        start = 0
        for peer, part in self._received(step):
            memory = self._array[part]
            if step.action is Action.REDUCE:
                stop = start + part.stop - part.start
                memory, start = self._scratch[start:stop], stop
            arrivals.append(Incoming(peer, part, memory))
        return arrivals

    def _post(self, step: Step, *, persistent: bool) -> list[Request]:
        comm = self._transport.comm
        receive = comm.Recv_init if persistent else comm.Irecv
        send = comm.Send_init if persistent else comm.Isend
        width, byte = self._transport.piece_bytes, self._transport.mpi.BYTE
        requests: list[Request] = []
        for peer, _, memory in self._incoming(step):
            requests += [receive(piece, peer, self._tag) for piece in pieces(memory, width, byte)]
        for peer, memory in self._sent(step):
            requests += [send(piece, peer, self._tag) for piece in pieces(memory, width, byte)]
        return requests


class _Mail(Mail):
    """Messages whose length is known only when they are sent; receives are persistent."""

    def __init__(
        self, transport: MpiHost, sends: Sequence[Parcel], receives: Sequence[Parcel], tag: int
    ) -> None:
        assert all(each.memory.shape[0] < PIECE_BYTES for each in (*sends, *receives))
        self.completions = transport.completions
        self._transport = transport
        self._tag = tag
        self._sends = sends
        self._receives = receives
        comm, byte = transport.comm, transport.mpi.BYTE
        self._prepared = [comm.Recv_init([each.memory, byte], each.peer, tag) for each in receives]

    def expect(self, which: Sequence[int]) -> Wait:
        requests = [self._prepared[index] for index in which]
        if requests:
            self._transport.mpi.Prequest.Startall(requests)
        return Arrived(list(requests), 0, self)

    def send(self, which: int, nbytes: int) -> Wait:
        parcel = self._sends[which]
        comm, byte = self._transport.comm, self._transport.mpi.BYTE
        request = comm.Isend([parcel.memory[:nbytes], byte], parcel.peer, self._tag)
        return Arrived([request], 1, self)

    def describe(self, step: int, requests: Sequence[Request]) -> str:
        """Which peers' messages are missing."""
        ranks = self._transport.ranks
        if step:
            return "mpi_host: a coded message has not been taken"
        late = [
            str(ranks[parcel.peer])
            for parcel, request in zip(self._receives, self._prepared, strict=True)
            if request in requests and not request.Get_status()
        ]
        return f"mpi_host: waits for coded messages from rank {', '.join(late) or 'none'}"

    def close(self) -> None:
        for request in self._prepared:
            request.Free()
        self._prepared = []


class _Native(Program):
    """MPI's own nonblocking allreduce, on a communicator of its own.

    Collectives on one communicator must start in the same order everywhere; programs may not,
    hence the duplicate.
    """

    def __init__(
        self, transport: MpiHost, schedule: Schedule, region: Region, divisor: int
    ) -> None:
        assert schedule.kind is Kind.ALLREDUCE, "native is an allreduce only"
        self._transport = transport
        self._region = region
        self._divisor = divisor
        self._comm = transport.comm.Dup()
        self.completions = transport.completions

    def run(self) -> Iterator[Wait]:
        mpi, array = self._transport.mpi, self._region.array
        width = self._transport.piece_bytes // self._region.dtype.itemsize
        requests = [
            self._comm.Iallreduce(mpi.IN_PLACE, array[start : start + width], mpi.SUM)
            for start in range(0, array.shape[0], width)
        ]
        if requests:
            yield Arrived(requests, 0, self)
        if self._divisor != 1:
            self._transport.device.reduce([array], [array], self._region.dtype, self._divisor)

    def describe(self, step: int, requests: Sequence[Request]) -> str:
        return f"mpi_host: MPI's own allreduce of {self._region.nbytes} bytes is not complete"

    def close(self) -> None:
        self._comm.Free()
