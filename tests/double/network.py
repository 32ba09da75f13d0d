"""MPI between the threads of one process, as hpcsync uses it, with every liberty that MPI has.

A message's bytes are read at some moment between the posting and the completion of its send, in
two parts; where it arrives anything may stand until the receive is complete. Messages from rank to
rank match in the order of posting; they complete in any.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import pickle
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tests.double.device import Machine
from tests.double.memory import DoubleArray, halves, raw_of
from tests.double.streams import LIMIT_S, Chance

BYTE, SUM, MAX, MIN, IN_PLACE, TAG_UB = "BYTE", "SUM", "MAX", "MIN", "IN_PLACE", "TAG_UB"
_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    SUM: np.add,
    MAX: np.maximum,
    MIN: np.minimum,
}


class JobEndedError(Exception):
    """Another rank failed."""


class Network:
    """The wires of a job.

    Args:
        aware: device memory may be handed to it.
    """

    def __init__(self, machine: Machine, size: int, *, aware: bool = True) -> None:
        self.machine, self.size, self.aware = machine, size, aware
        self.lock = threading.Condition()
        self.error: BaseException | None = None
        self._closed = False
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._groups: dict[object, object] = {}
        self._sent: dict[tuple[int, int, int], list[Message]] = {}
        self._wanted: dict[tuple[int, int, int], list[Request]] = {}
        self._rounds: dict[tuple[int, int], dict[int, tuple[Request, Any]]] = {}
        self._contexts = itertools.count()
        self._world = next(self._contexts)
        self.reseed()
        self._thread = threading.Thread(target=self._main, name="double-network", daemon=True)
        self._thread.start()

    def reseed(self) -> None:
        """Draw other delays, from the machine's seed."""
        self.chance = Chance((self.machine.seed, "network"))

    def comm(self, rank: int) -> Comm:
        """The communicator of all ranks, for one of them."""
        return Comm(self, self._world, tuple(range(self.size)), rank)

    def check(self) -> None:
        """Raise where the job has failed."""
        self.machine.check()
        if self.error is not None:
            raise JobEndedError(f"another rank failed: {self.error!r}")

    def abort(self, error: BaseException) -> None:
        with self.lock:
            self.error = self.error or error
            self.lock.notify_all()

    def close(self) -> None:
        with self.lock:
            self._closed = True
            self.lock.notify_all()
        self._thread.join(timeout=LIMIT_S)

    # ---- the thread ----------------------------------------------------------------------------

    def later(self, action: Callable[[], None]) -> None:
        """Have the wire do something at some moment from now on; with the lock."""
        due = time.monotonic() + self.chance.delay_s()
        heapq.heappush(self._due, (due, next(self._order), action))
        self.lock.notify_all()

    def _main(self) -> None:
        while True:
            with self.lock:
                while not self._closed and (not self._due or self._due[0][0] > time.monotonic()):
                    pause = self._due[0][0] - time.monotonic() if self._due else None
                    self.lock.wait(pause if pause is None else max(pause, 0.0))
                if self._closed:
                    return
                action = heapq.heappop(self._due)[2]
            try:
                action()
            except BaseException as error:
                self.abort(error)

    # ---- messages ------------------------------------------------------------------------------

    def post(self, request: Request) -> None:
        """A send or a receive begins."""
        with self.lock:
            self.check()
            request.begin()
            sent = self._sent.setdefault(request.lane, [])
            wanted = self._wanted.setdefault(request.lane, [])
            if request.sends:
                count = request.bytes.shape[0]
                parts = list(halves(count, self.chance.below(count + 1)))
                message = Message(request.tag, np.empty_like(request.bytes), parts)
                self.later(lambda: self._read(request, message))
                message.taker = _take(wanted, request.tag)
                if message.taker is None:
                    sent.append(message)
                return
            self.later(lambda: self._spoil(request))
            found = _take(sent, request.tag)
            if found is None:
                wanted.append(request)
                return
            found.taker = request
            if not found.parts:
                self.later(lambda: self._write(request, found))

    def _read(self, request: Request, message: Message) -> None:
        """Take a part of what is sent."""
        part = message.parts[0]
        message.data[part] = request.bytes[part]
        with self.lock:
            message.parts.pop(0)
            if message.parts:
                self.later(lambda: self._read(request, message))
                return
            self.later(request.end)
            if (taker := message.taker) is not None:
                self.later(lambda: self._write(taker, message))

    def _spoil(self, request: Request) -> None:
        """What is in a receive's memory is nobody's until it is complete."""
        with self.lock:
            if not request.written:
                request.bytes[:] = 0xEE

    def _write(self, request: Request, message: Message) -> None:
        length = message.data.shape[0]
        if length > request.bytes.shape[0]:
            raise AssertionError(f"a message of {length} bytes for {request.bytes.shape[0]}")
        with self.lock:
            request.bytes[:length] = message.data
            request.written = True
            self.later(request.end)

    # ---- collectives ---------------------------------------------------------------------------

    def meet(
        self, comm: Comm, given: Any, work: Callable[[dict[int, Any]], dict[int, Any]]
    ) -> Request:
        """A collective: once all ranks of the communicator have come, ``work`` is done with what
        each has given; what it returns by rank is each request's ``result``."""
        request = Request(comm, None, 0, 0)
        request.begin()
        with self.lock:
            self.check()
            key = comm.context, comm.next_round()
            came = self._rounds.setdefault(key, {})
            came[comm.rank] = request, given
            if len(came) == comm.size:
                del self._rounds[key]
                self.later(lambda: self._meeting(came, work))
        return request

    def _meeting(self, came: dict[int, tuple[Request, Any]], work: Any) -> None:
        found = work({rank: given for rank, (_, given) in sorted(came.items())})
        with self.lock:
            for rank, (request, _) in came.items():
                request.result = found.get(rank) if found else None
                self.later(request.end)

    def group(self, key: object) -> int:
        """The context of a new communicator; the same for all who give the same key."""
        with self.lock:
            if key not in self._groups:
                self._groups[key] = next(self._contexts)
            made = self._groups[key]
            assert isinstance(made, int)
            return made


@dataclass(eq=False)
class Message:
    """What is on its way; the request that sent it may be complete, and started again, before it
    arrives.

    Attributes:
        parts: of the memory that have not been read yet.
        taker: the receive that it matches.
    """

    tag: int
    data: NDArray[np.uint8]
    parts: list[slice]
    taker: Request | None = None


class Request:
    """A request; of a message, or of a collective (``memory`` is None)."""

    def __init__(
        self, comm: Comm, memory: NDArray[np.uint8] | None, peer: int, tag: int, **kind: bool
    ) -> None:
        self.comm, self.tag = comm, tag
        self.sends = kind.get("sends", False)
        self.persistent = kind.get("persistent", False)
        self.result: Any = None
        self.active = self.over = False
        if memory is not None:
            self.bytes = memory
            ends = (comm.rank, peer) if self.sends else (peer, comm.rank)
            self.lane = (comm.context, *ends)

    def begin(self) -> None:
        assert not self.active, "a request is started while it is active"
        self.active, self.over = True, False
        self.written = False

    def end(self) -> None:
        with self.comm.network.lock:
            self.over = True
            self.comm.network.lock.notify_all()

    def Start(self) -> None:  # noqa: N802
        self.comm.network.post(self)

    @staticmethod
    def Startall(requests: Sequence[Request]) -> None:  # noqa: N802
        for each in requests:
            assert each.persistent
            each.Start()

    def Get_status(self, status: Any = None) -> bool:  # noqa: N802
        self.comm.network.check()
        return self.over or not self.active

    def Test(self, status: Any = None) -> bool:  # noqa: N802
        self.comm.network.check()
        if self.active and not self.over:
            return False
        self.active = False
        return True

    @staticmethod
    def Testsome(requests: Sequence[Request], statuses: Any = None) -> list[int] | None:  # noqa: N802
        """Those that have completed since they were asked for last; None if none is active."""
        if not any(each.active for each in requests):
            return None
        requests[0].comm.network.check()
        done = [index for index, each in enumerate(requests) if each.active and each.over]
        for index in done:
            requests[index].active = False
        return done

    @staticmethod
    def Testall(requests: Sequence[Request], statuses: Any = None) -> bool:  # noqa: N802
        if not all(each.Get_status() for each in requests):
            return False
        for each in requests:
            each.active = False
        return True

    @staticmethod
    def Testany(requests: Sequence[Request], status: Any = None) -> tuple[int, bool]:  # noqa: N802
        for index, each in enumerate(requests):
            if each.active and each.Test():
                return index, True
        return -1, not any(each.active for each in requests)

    def Wait(self, status: Any = None) -> bool:  # noqa: N802
        network, limit = self.comm.network, time.monotonic() + LIMIT_S
        with network.lock:
            while not self.Test():
                network.lock.wait(0.2)
                assert time.monotonic() < limit, "a request is not complete"
        return True

    @staticmethod
    def Waitall(requests: Sequence[Request], statuses: Any = None) -> None:  # noqa: N802
        for each in requests:
            each.Wait()

    def Free(self) -> None:  # noqa: N802
        assert not self.active or self.comm.network.error, "a request is freed while it is active"


Posted = TypeVar("Posted", Message, Request)


def _take(posted: list[Posted], tag: int) -> Posted | None:
    """The first with the tag, taken out."""
    found = next((each for each in posted if each.tag == tag), None)
    if found is not None:
        posted.remove(found)
    return found


class Comm:
    """A communicator of one rank."""

    def __init__(self, network: Network, context: int, ranks: tuple[int, ...], rank: int) -> None:
        self.network, self.context, self.ranks, self.rank = network, context, ranks, rank
        self.size = len(ranks)
        self._rounds = itertools.count()
        self._free = False

    def next_round(self) -> int:
        assert not self._free, "a communicator is used after it was freed"
        return next(self._rounds)

    # ---- memory --------------------------------------------------------------------------------

    def _bytes(self, given: Any) -> NDArray[np.uint8]:
        """The bytes of a buffer as mpi4py takes it."""
        memory = given[0] if isinstance(given, (list, tuple)) else given
        if isinstance(memory, DoubleArray):
            assert self.network.aware, "device memory was handed to an MPI that cannot take it"
            return self.network.machine.pool.bare(raw_of(memory)).view(np.uint8)
        array = memory if isinstance(memory, np.ndarray) else np.frombuffer(memory, np.uint8)
        assert array.flags.c_contiguous, "messages are contiguous"
        return array.reshape(-1).view(np.uint8)

    # ---- messages ------------------------------------------------------------------------------

    def _message(self, given: Any, peer: int, tag: int, *, sends: bool, later: bool) -> Request:
        assert not self._free, "a communicator is used after it was freed"
        assert 0 <= peer < self.size, f"no rank {peer}"
        made = Request(self, self._bytes(given), peer, tag, sends=sends, persistent=later)
        if not later:
            made.Start()
        return made

    def Isend(self, given: Any, dest: int, tag: int = 0) -> Request:  # noqa: N802
        return self._message(given, dest, tag, sends=True, later=False)

    def Irecv(self, given: Any, source: int, tag: int = 0) -> Request:  # noqa: N802
        return self._message(given, source, tag, sends=False, later=False)

    def Send_init(self, given: Any, dest: int, tag: int = 0) -> Request:  # noqa: N802
        return self._message(given, dest, tag, sends=True, later=True)

    def Recv_init(self, given: Any, source: int, tag: int = 0) -> Request:  # noqa: N802
        return self._message(given, source, tag, sends=False, later=True)

    # ---- collectives ---------------------------------------------------------------------------

    def Ibarrier(self) -> Request:  # noqa: N802
        return self.network.meet(self, None, lambda _: {})

    def Ibcast(self, given: Any, root: int = 0) -> Request:  # noqa: N802
        def work(came: dict[int, Any]) -> dict[int, Any]:
            for rank, memory in came.items():
                if rank != root:
                    memory[:] = came[root]
            return {}

        return self.network.meet(self, self._bytes(given), work)

    def Iallgather(self, given: Any, out: Any) -> Request:  # noqa: N802
        def work(came: dict[int, Any]) -> dict[int, Any]:
            every = np.concatenate([sent for sent, _ in came.values()])
            for _, received in came.values():
                received[:] = every
            return {}

        return self.network.meet(self, (self._bytes(given), self._bytes(out)), work)

    def Iallgatherv(self, given: Any, out: Any) -> Request:  # noqa: N802
        return self._gatherv(given, out, None)

    def Igatherv(self, given: Any, out: Any, root: int = 0) -> Request:  # noqa: N802
        return self._gatherv(given, out, root)

    def _gatherv(self, given: Any, out: Any, root: int | None) -> Request:
        memory, counts, offsets, kind = out
        assert kind == BYTE

        def work(came: dict[int, Any]) -> dict[int, Any]:
            for rank, (_, received, lengths, starts) in came.items():
                if root in (None, rank):
                    for who, (sent, *_) in came.items():
                        assert lengths[who] == sent.shape[0]
                        received[starts[who] : starts[who] + lengths[who]] = sent
            return {}

        own = self._bytes(given), self._bytes(memory), counts, offsets
        return self.network.meet(self, own, work)

    def Iallreduce(self, given: Any, out: Any, op: str = SUM) -> Request:  # noqa: N802
        assert isinstance(out, np.ndarray), "reductions are made of host memory"
        assert out.flags.c_contiguous
        sent = out if given is IN_PLACE else given

        def work(came: dict[int, Any]) -> dict[int, Any]:
            values = [np.array(one) for one, _ in came.values()]
            total = values[0]
            for each in values[1:]:
                total = _OPERATIONS[op](total, each)
            for _, received in came.values():
                received[...] = total
            return {}

        return self.network.meet(self, (sent, out), work)

    def allgather(self, value: Any) -> list[Any]:
        def work(came: dict[int, Any]) -> dict[int, Any]:
            return {rank: list(came.values()) for rank in came}

        request = self.network.meet(self, pickle.dumps(value), work)
        request.Wait()
        return [pickle.loads(each) for each in request.result]

    def bcast(self, value: Any, root: int = 0) -> Any:
        return self.allgather(value if self.rank == root else None)[root]

    def allreduce(self, value: Any, op: str = SUM) -> Any:
        values = self.allgather(value)
        return {SUM: sum, MAX: max, MIN: min}[op](values)

    def Barrier(self) -> None:  # noqa: N802
        self.Ibarrier().Wait()

    barrier = Barrier

    # ---- groups --------------------------------------------------------------------------------

    def Split(self, color: int = 0, key: int = 0) -> Comm:  # noqa: N802
        number = next(self._rounds)
        told = self.allgather((color, key))
        members = sorted(
            (order, rank) for rank, (colour, order) in enumerate(told) if colour == color
        )
        places = [rank for _, rank in members]
        context = self.network.group((self.context, number, color))
        ranks = tuple(self.ranks[place] for place in places)
        return Comm(self.network, context, ranks, places.index(self.rank))

    def Dup(self) -> Comm:  # noqa: N802
        return self.Split(0, self.rank)

    def Free(self) -> None:  # noqa: N802
        assert not self._free, "a communicator is freed twice"
        self._free = True

    def Get_rank(self) -> int:  # noqa: N802
        return self.rank

    def Get_size(self) -> int:  # noqa: N802
        return self.size

    def Get_attr(self, key: str) -> int:  # noqa: N802
        assert key == TAG_UB
        return (1 << 20) - 1


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """While it lasts ``from mpi4py import MPI`` gives this module's."""
    import mpi4py

    fake = types.ModuleType("mpi4py.MPI")
    names = {name: name for name in (BYTE, SUM, MAX, MIN, IN_PLACE, TAG_UB)}
    kinds = {"Request": Request, "Prequest": Request, "Comm": Comm, "Intracomm": Comm}
    fake.__dict__.update({**names, **kinds})
    before = sys.modules.get("mpi4py.MPI"), mpi4py.__dict__.get("MPI")
    sys.modules["mpi4py.MPI"] = fake
    mpi4py.MPI = fake  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name, place, old in (
            ("mpi4py.MPI", sys.modules, before[0]),
            ("MPI", mpi4py.__dict__, before[1]),
        ):
            if old is None:
                place.pop(name, None)  # type: ignore[attr-defined]
            else:
                place[name] = old  # type: ignore[index]
