"""Point-to-point MPI messages between host buffers.

Every program has a tag of its own, so programs may be in flight together and in any order.
Requests are persistent: a bucket sends the same bytes to the same peers every step, and starting
a prepared request costs less than making a new one. Programs with very many messages make them
afresh instead, since each persistent request keeps memory in the MPI library.

Messages are cut at ``piece_bytes``, since classic MPI counts have 31 bits.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..device import Device
from ..device.base import Array
from ..schedules.base import Action, Kind, Schedule, Step
from .base import Mail, Parcel, Program, Region, Transport, Wait, chunk_offsets, final_sum

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm, Request

PIECE_BYTES = 1 << 30
_POLL_S = 20e-6  # within one round of the progress thread MPI is asked once
_MOST_PERSISTENT = 256  # requests a program


class MpiHost(Transport):
    """MPI between the ranks of ``comm``; the communicator must be used by nothing else.

    Args:
        piece_bytes: size at which messages are cut.
        completions: to share with the other transports that the same thread drives.
    """

    name = "mpi_host"

    def __init__(
        self,
        comm: Intracomm,
        ranks: Sequence[int],
        device: Device,
        piece_bytes: int = PIECE_BYTES,
        completions: Completions | None = None,
    ) -> None:
        from mpi4py import MPI

        super().__init__(ranks, comm.Get_rank(), device)
        self.comm = comm
        self.mpi = MPI
        self.piece_bytes = piece_bytes
        self.completions = completions or Completions()
        bound = comm.Get_attr(MPI.TAG_UB)
        self._tags = int(bound) if bound else 32767

    def bind(
        self,
        schedules: Sequence[Schedule],
        region: Region,
        tag: int,
        divisor: int = 1,
        released: bool = False,
    ) -> Program:
        schedule = schedules[self.rank]
        if schedule.name == "native":
            return _Native(self, schedule, region, divisor)
        return _Messages(self, schedule, region, tag % self._tags, divisor)

    def mail(self, sends: Sequence[Parcel], receives: Sequence[Parcel], tag: int) -> Mail:
        return _Mail(self, sends, receives, tag % self._tags)


class Completions:
    """Asks MPI for all messages in flight at once.

    Each call into MPI looks at every connection, whatever it asks for: one call for everything
    costs a fraction of one for each collective. Only the progress thread uses it.
    """

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._waits: list[_Arrived] = []
        self._asked_s = 0.0

    def watch(self, requests: Sequence[Request], wait: _Arrived) -> None:
        """Tell ``wait`` of each of the requests that completes."""
        self._requests.extend(requests)
        self._waits.extend([wait] * len(requests))
        self._asked_s = 0.0

    def poll(self) -> None:
        """Ask, unless that was done a moment ago."""
        now = time.perf_counter()
        if now - self._asked_s < _POLL_S:
            return
        self._asked_s = now
        done = self._requests[0].Testsome(self._requests)
        if not done:
            return
        for index in done:
            self._waits[index].missing -= 1
        over = set(done)
        kept = [index for index in range(len(self._waits)) if index not in over]
        self._requests = [self._requests[index] for index in kept]
        self._waits = [self._waits[index] for index in kept]
        self._asked_s = 0.0


class _Watched(Protocol):
    """Whose messages are waited for."""

    completions: Completions

    def describe(self, step: int, requests: Sequence[Request]) -> str: ...


class _Arrived(Wait):
    """Until all of a step's messages are complete."""

    __slots__ = ("_completions", "_program", "_requests", "_step", "missing")

    def __init__(self, requests: list[Request], step: int, program: _Watched) -> None:
        self.missing = len(requests)
        self._requests = requests
        self._step = step
        self._program = program
        self._completions = program.completions
        self._completions.watch(requests, self)

    def ready(self) -> bool:
        if self.missing:
            self._completions.poll()
        return not self.missing

    def describe(self) -> str:
        return self._program.describe(self._step, self._requests)


class _Messages(Program):
    """The steps of a schedule as messages."""

    def __init__(
        self, transport: MpiHost, schedule: Schedule, region: Region, tag: int, divisor: int
    ) -> None:
        self._transport = transport
        self._schedule = schedule
        self._region = region
        self._tag = tag
        self._divisor = divisor
        self._final = final_sum(schedule)
        self._offsets = chunk_offsets(schedule, region)
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
                yield _Arrived(requests, index, self)
            if step.action is Action.REDUCE:
                self._add(step, self._divisor if index == self._final else 1)

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
                pieces = list(itertools.islice(rest, -(-nbytes // width)))
                if not all(piece.Get_status() for piece in pieces):
                    rank = self._transport.ranks[move.peer]
                    missing.append(f"{nbytes} bytes {verb} rank {rank}")
        return (
            f"mpi_host: {self._schedule.name} waits at step {step} of "
            f"{len(self._schedule.steps)} for {', '.join(missing) or 'nothing more'}"
        )

    def _scratch_elements(self) -> int:
        return max(
            (
                sum(self._offsets[move.hi] - self._offsets[move.lo] for move in step.recvs)
                for step in self._schedule.steps
                if step.action is Action.REDUCE
            ),
            default=0,
        )

    def _incoming(self, step: Step) -> list[tuple[int, slice, Array]]:
        """For each receive: the peer, the elements of the region, and where they arrive."""
        arrivals: list[tuple[int, slice, Array]] = []
        start = 0
        for move in step.recvs:
            part = slice(self._offsets[move.lo], self._offsets[move.hi])
            if step.action is Action.COPY:
                arrivals.append((move.peer, part, self._region.array[part]))
                continue
            stop = start + part.stop - part.start
            arrivals.append((move.peer, part, self._scratch[start:stop]))
            start = stop
        return arrivals

    def _post(self, step: Step, *, persistent: bool) -> list[Request]:
        comm = self._transport.comm
        receive = comm.Recv_init if persistent else comm.Irecv
        send = comm.Send_init if persistent else comm.Isend
        requests: list[Request] = []
        for peer, _, target in self._incoming(step):
            requests += [receive(piece, peer, self._tag) for piece in self._pieces(target)]
        for move in step.sends:
            source = self._region.array[self._offsets[move.lo] : self._offsets[move.hi]]
            requests += [send(piece, move.peer, self._tag) for piece in self._pieces(source)]
        return requests

    def _pieces(self, values: Array) -> list[Any]:
        """The bytes of an array, cut so that each piece's count fits classic MPI."""
        memory = values.view(np.uint8)
        width = self._transport.piece_bytes
        byte = self._transport.mpi.BYTE
        return [[memory[start : start + width], byte] for start in range(0, memory.shape[0], width)]

    def _add(self, step: Step, divisor: int) -> None:
        parts: dict[tuple[int, int], dict[int, Array]] = {}
        for peer, part, arrived in self._incoming(step):
            parts.setdefault((part.start, part.stop), {})[peer] = arrived
        for (start, stop), sources in parts.items():
            own = self._region.array[start:stop]
            sources[self._transport.rank] = own
            self._transport.device.reduce(
                [own], [sources[who] for who in sorted(sources)], self._region.dtype, divisor
            )


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
        return _Arrived(list(requests), 0, self)

    def send(self, which: int, nbytes: int) -> Wait:
        parcel = self._sends[which]
        comm, byte = self._transport.comm, self._transport.mpi.BYTE
        request = comm.Isend([parcel.memory[:nbytes], byte], parcel.peer, self._tag)
        return _Arrived([request], 1, self)

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
            yield _Arrived(requests, 0, self)
        if self._divisor != 1:
            self._transport.device.reduce([array], [array], self._region.dtype, self._divisor)

    def describe(self, step: int, requests: Sequence[Request]) -> str:
        return f"mpi_host: MPI's own allreduce of {self._region.nbytes} bytes is not complete"

    def close(self) -> None:
        self._comm.Free()
