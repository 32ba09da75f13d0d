"""Messages between the devices of a node by NCCL, where a site prefers that to CUDA's IPC.

NCCL moves bytes only: schedules and sums are those of the other transports, so that results have
the same bits. It wants all ranks to start its operations in the same order, which programs have
not: rank 0 of the node gives each run a turn once all ranks have come to it, and every rank gives
its device the work of one run after the other.

It must not work on a GPU at once with an MPI that does: each could wait for the other's kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..device import Device
from ..device.base import Array
from ..errors import DeviceError
from ..schedules.base import Action, Schedule, Step
from .base import Program, Region, Transport, Wait
from .counters import Counters, Slots, header
from .mapped import Gather, SharedMemoryError, share
from .nccl_library import Communicator, Cupy, Library, Message
from .staging import Turns
from .steps import Incoming, Steps

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm, Request

_SLOTS = 1024  # programs that one map has counters for
_LINE = 64  # bytes of a message that is tried


class Nccl(Transport):
    """NCCL between the ranks of a node; making one is collective.

    Args:
        comm: the node's communicator; used for setting up only.
        device: of this rank; no other rank's.
        library: NCCL; CuPy's if not given.

    Attributes:
        stream: that all messages go through.
        given: runs whose work was given to the device.
        turns: runs that were given a turn, on rank 0 of the node.
        scratch: for what is to be added.

    Raises:
        DeviceError: on every rank, if one of them cannot take part.
    """

    name = "nccl"

    def __init__(
        self,
        comm: Intracomm,
        ranks: Sequence[int],
        device: Device,
        wait: Callable[[Request], None] | None = None,
        library: Library | None = None,
    ) -> None:
        super().__init__(ranks, comm.Get_rank())
        self.device = device
        self.stream = device.stream()
        self.given = self.turns = 0
        self.scratch = Turns(device.empty)
        self._gather = Gather(comm, wait)
        self._slots = self._more_slots()
        self._made = self._join(library) if self.size > 1 else None
        if self._made is not None:
            self._try()

    def _more_slots(self) -> Slots:
        try:
            maps = share(self._gather, header(_SLOTS))
        except SharedMemoryError as error:
            raise DeviceError(f"{error}; enlarge it (containers: --shm-size)") from error
        return Slots(maps, len(maps[0]))

    def _join(self, library: Library | None) -> Communicator:
        found, problem, identifier = library, "", ""
        # NCCL may hang with two ranks on one of them.
        gpus = self._gather.texts(self.device.identity)
        if gpus.count(self.device.identity) > 1:
            problem = "it shares its GPU with another rank"
        self._agree(problem)
        try:
            found = library or Cupy()
            if self.rank == 0:
                identifier = found.identifier()
        except (ImportError, RuntimeError) as error:
            problem = str(error) or type(error).__name__
        self._agree(problem)
        identifier = self._gather.texts(identifier)[0]
        assert found is not None
        made: Communicator | None = None
        try:
            with self.stream:
                made = found.join(self.size, identifier, self.rank)
        except RuntimeError as error:
            problem = str(error) or type(error).__name__
        self._agree(problem)
        assert made is not None
        return made

    def _agree(self, problem: str) -> None:
        """Raise on all ranks what one of them found."""
        for who, found in enumerate(self._gather.texts(problem)):
            if found:
                line = found.partition("\n")[0]
                raise DeviceError(
                    f"nccl: rank {self.ranks[who]} cannot take part ({line}); it needs CuPy with "
                    "NCCL and a GPU of its own for each rank; or use comm.transport.node=auto"
                )

    def _try(self) -> None:
        """Exchange a line with each rank, which also makes the connections."""
        device, stream, size = self.device, self.stream, self.size
        given, taken = device.empty(_LINE), device.empty(size * _LINE)
        found = device.pinned(size * _LINE)
        stream.wait(device.current().record())  # whose memory these two may have been
        stream.fill(given, self.rank % 255 + 1)
        lines = [taken[who * _LINE : (who + 1) * _LINE] for who in range(size)]
        stream.copy(lines[self.rank], given)
        others = [who for who in range(size) if who != self.rank]
        self.exchange([(who, given) for who in others], [(who, lines[who]) for who in others])
        stream.copy(found, taken)
        stream.synchronize()
        wanted = np.repeat((np.arange(size) % 255 + 1).astype(np.uint8), _LINE)
        self._agree("" if np.array_equal(found, wanted) else "messages came damaged")

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Send and receive in the order of ``stream``; in the order of turns."""
        assert self._made is not None, "a rank alone sends nothing"
        with self.stream:
            self._made.exchange(sends, receives)

    def bind(
        self,
        schedules: Sequence[Schedule],
        region: Region,
        tag: int,
        divisor: int = 1,
        released: bool = False,
    ) -> Program:
        schedule = schedules[self.rank]
        assert schedule.name != "native", "native is MPI's own"
        if not self._slots.left:
            self._slots = self._more_slots()
        counters = Counters(self._slots, self.name, self.ranks, self.rank)
        return _Messages(self, counters, schedule, region, divisor)


class _Turn(Wait):
    """Until it is this run's turn on this rank."""

    __slots__ = ("_transport", "_turn")

    def __init__(self, transport: Nccl, turn: int) -> None:
        self._transport, self._turn = transport, turn

    def ready(self) -> bool:
        return self._transport.given == self._turn

    def describe(self) -> str:
        return f"nccl: waits for {self._turn - self._transport.given} runs that come before it"


def _aligned(nbytes: int) -> int:
    """Bytes that a message takes in scratch memory, for kernels that load 16 at once."""
    return -(-nbytes // _LINE) * _LINE


class _Messages(Steps):
    """The steps of a schedule as messages."""

    def __init__(
        self,
        transport: Nccl,
        counters: Counters,
        schedule: Schedule,
        region: Region,
        divisor: int,
    ) -> None:
        assert region.stream is not None, "a stream does the work on a region of a device"
        super().__init__(transport.rank, schedule, region, divisor)
        self._stream = region.stream
        self._transport, self._counters = transport, counters
        most = max((self._scratch_bytes(step) for step in schedule.steps), default=0)
        transport.scratch.reserve(most)

    def run(self) -> Iterator[Wait]:
        self._counters.begin()
        self._counters.enter(0)
        turn = 0
        if self._transport.rank == 0:
            others = [(who, 0) for who in range(1, self._transport.size)]
            yield self._counters.until(Counters.ENTERED, others)
            turn, self._transport.turns = self._transport.turns, self._transport.turns + 1
            self._counters.leave(0, turn)
        else:
            yield self._counters.until(Counters.LEFT, [(0, 0)])
            turn = self._counters.note(Counters.LEFT, 0)
        yield _Turn(self._transport, turn)
        for index, step in enumerate(self._schedule.steps):
            self._step(index, step)
        self._transport.given += 1

    def close(self) -> None:
        self._counters.close()

    def _step(self, index: int, step: Step) -> None:
        if step.action is Action.COPY:
            received = self._received(step)
            self._exchange(step, [(peer, self._array[part]) for peer, part in received])
            return
        with self._transport.scratch as scratch:
            came = self._places(step, scratch.take(self._transport.stream))
            self._exchange(step, [(each.peer, each.memory) for each in came])
            self._reduce(came, self._stream, index)
            scratch.give(self._stream)

    def _places(self, step: Step, scratch: Array) -> list[Incoming]:
        """What a step that adds receives, and where in scratch memory."""
        found: list[Incoming] = []
        start = 0
        for peer, part in self._received(step):
            own = self._array[part]
            memory = scratch[start : start + own.nbytes].view(own.dtype)
            found.append(Incoming(peer, part, memory))
            start += _aligned(own.nbytes)
        return found

    def _exchange(self, step: Step, receives: Sequence[Message]) -> None:
        own, messages = self._stream, self._transport.stream
        messages.wait(own.record())
        self._transport.exchange(self._sent(step), receives)
        own.wait(messages.record())

    def _scratch_bytes(self, step: Step) -> int:
        if step.action is Action.COPY:
            return 0
        return sum(_aligned(self._array[part].nbytes) for _, part in self._received(step))
