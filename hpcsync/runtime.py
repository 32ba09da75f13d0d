"""One rank's view of a running job, and control messages between ranks.

Control messages (a few scalars, small objects) never spin while they wait.
"""

from __future__ import annotations

import itertools
import pickle
import socket
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from .errors import (
    CheckpointError,
    CollectiveTimeout,
    ConfigError,
    DataError,
    DeviceError,
    LaunchError,
    ModelError,
    UserError,
)
from .topology import Topology

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm, Request
    from numpy.typing import NDArray

T = TypeVar("T")

_PIECE_BYTES = 1 << 30  # classic MPI counts have 31 bits
_MOST_SLEEP_S = 1e-3
_KINDS: tuple[type[UserError], ...] = (
    CheckpointError,
    ConfigError,
    DataError,
    DeviceError,
    ModelError,
    LaunchError,
)


class AgreedError(UserError):
    """A user's error that every rank knows of: rank 0 tells it, nobody needs to be killed."""


class Runtime:
    """One rank's view of a running job.

    Attributes:
        rank, size: of this process among all.
        local_rank, local_size: within its node.
        host: host name.
        topology: the grouping of all ranks.
        crowding: ranks a core of this host.
        comm: a communicator of all ranks for control messages.
    """

    def __init__(
        self, comm: Intracomm, topology: Topology, timeout_s: float, crowding: float = 1.0
    ) -> None:
        self.comm = comm
        self.topology = topology
        self.timeout_s = timeout_s
        self.crowding = crowding
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self.local_rank = topology.local_rank(self.rank)
        self.local_size = topology.local_size(self.rank)
        self.host = socket.gethostname()
        self._closers: list[Callable[[], None]] = []
        self._open = True

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or isinstance(error, AgreedError):
            self.close()

    def close(self) -> None:
        """Stop what runs in the background and free communicators; collective."""
        if self._open:
            self._open = False
            while self._closers:
                self._closers.pop()()
            self.comm.Free()

    def on_close(self, action: Callable[[], None]) -> None:
        """Have ``action`` called by ``close``; the last one added goes first."""
        self._closers.append(action)

    def group(self, ranks: Sequence[int]) -> Intracomm:
        """A communicator of ``ranks``, in that order; collective over the job.

        Every rank calls it with the ranks of its own group; a rank in no group passes none and
        gets a communicator of itself.
        """
        colour = min(ranks) if ranks else self.rank
        place = ranks.index(self.rank) if ranks else 0
        return cast("Intracomm", self.comm.Split(colour, place))

    def wait(self, request: Request) -> None:
        """Sleep until a request is complete.

        Raises:
            CollectiveTimeout: it was not within ``comm.timeout_s`` seconds.
        """
        start = time.perf_counter()
        while not request.Test():
            waited = time.perf_counter() - start
            if self.timeout_s and waited > self.timeout_s:
                raise CollectiveTimeout(
                    f"a control message of rank {self.rank} is not complete after "
                    f"{waited:.0f} s (comm.timeout_s = {self.timeout_s:g}): a rank is missing"
                )
            time.sleep(min(max(waited * 0.1, 20e-6), _MOST_SLEEP_S) * max(self.crowding, 1.0))

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.wait(self.comm.Ibarrier())

    def allreduce_scalar(self, values: Sequence[float], op: str = "sum") -> list[float]:
        """Element-wise ``sum``, ``max`` or ``min`` of a few float64 numbers over all ranks."""
        import numpy as np

        array = np.array(values, np.float64)
        self.allreduce_array(array, op)
        return [float(value) for value in array]

    def allreduce_array(self, array: NDArray[Any], op: str) -> None:
        """MPI's own ``sum``, ``max`` or ``min`` of a contiguous array, in place."""
        import numpy as np
        from mpi4py import MPI

        kinds = {"sum": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN}
        flat = array.reshape(-1)
        assert np.shares_memory(flat, array) or not array.size, "not contiguous"
        length = max(1, _PIECE_BYTES // array.itemsize)
        for start in range(0, flat.shape[0], length):
            piece = flat[start : start + length]
            self.wait(self.comm.Iallreduce(MPI.IN_PLACE, piece, kinds[op]))

    def broadcast_array(self, array: NDArray[Any], root: int = 0) -> None:
        """Set ``array`` (contiguous, the same size and type everywhere) to that of ``root``."""
        from mpi4py import MPI

        memory = array.reshape(-1).view("uint8")
        for start in range(0, memory.shape[0], _PIECE_BYTES):
            self.wait(self.comm.Ibcast([memory[start : start + _PIECE_BYTES], MPI.BYTE], root))

    def bcast(self, value: Any, root: int = 0) -> Any:
        """``value`` of rank ``root``, pickled, on every rank."""
        import numpy as np

        data = np.frombuffer(pickle.dumps(value), np.uint8) if self.rank == root else None
        length = np.array([0 if data is None else data.size], np.int64)
        self.broadcast_array(length, root)
        buffer = np.empty(int(length[0]), np.uint8) if data is None else data.copy()
        self.broadcast_array(buffer, root)
        return value if self.rank == root else pickle.loads(buffer.tobytes())

    def allgather_object(self, value: Any) -> list[Any]:
        """The pickled ``value`` of every rank, by rank."""
        import numpy as np
        from mpi4py import MPI

        data = np.frombuffer(pickle.dumps(value), np.uint8)
        lengths = np.zeros(self.size, np.int64)
        self.wait(self.comm.Iallgather(np.array([data.size], np.int64), lengths))
        if lengths.sum() > _PIECE_BYTES:
            return [self.bcast(value, root) for root in range(self.size)]
        buffer = np.empty(int(lengths.sum()), np.uint8)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        counts = [int(length) for length in lengths]
        offsets = [int(start) for start in starts[:-1]]
        self.wait(self.comm.Iallgatherv(data, [buffer, counts, offsets, MPI.BYTE]))
        return [
            pickle.loads(buffer[start:stop].tobytes()) for start, stop in itertools.pairwise(starts)
        ]

    def gather_object(self, value: Any, root: int = 0) -> list[Any] | None:
        """The pickled ``value`` of every rank, by rank, on ``root``; None on the others."""
        import numpy as np
        from mpi4py import MPI

        data = np.frombuffer(pickle.dumps(value), np.uint8)
        lengths = np.zeros(self.size, np.int64)
        self.wait(self.comm.Iallgather(np.array([data.size], np.int64), lengths))
        if lengths.sum() > _PIECE_BYTES:
            found = self.allgather_object(value)
            return found if self.rank == root else None
        buffer = np.empty(int(lengths.sum()) if self.rank == root else 0, np.uint8)
        starts = [0, *itertools.accumulate(int(length) for length in lengths)]
        counts = [int(length) for length in lengths]
        self.wait(self.comm.Igatherv(data, [buffer, counts, starts[:-1], MPI.BYTE], root))
        if self.rank != root:
            return None
        return [
            pickle.loads(buffer[start:stop].tobytes()) for start, stop in itertools.pairwise(starts)
        ]

    def agree(self, problem: Exception | None = None) -> None:
        """Go on only if no rank has a problem; collective.

        Raises:
            AgreedError: on every rank, with the message of the lowest rank that has one. If that
                is a user's error, it is one of the same class, too.
        """
        mine: tuple[type[UserError], str] | None = None
        if problem is not None:
            known = isinstance(problem, UserError)
            kind = next((each for each in _KINDS if isinstance(problem, each)), UserError)
            mine = kind, str(problem) if known else f"{type(problem).__name__}: {problem}"
        found = [(rank, *told) for rank, told in enumerate(self.allgather_object(mine)) if told]
        if not found:
            return
        rank, kind, text = found[0]
        where = "" if len(found) == self.size else f"rank {rank}: "
        raise _agreed(kind)(where + text) from problem

    def agreed(self, work: Callable[[], T]) -> T:
        """Do what may end in a user's error, and go on only if it does on no rank; collective.

        Args:
            work: is not collective.

        Raises:
            AgreedError: as ``agree``.
        """
        problem: UserError | None = None
        result: Any = None
        try:
            result = work()
        except UserError as error:
            problem = error
        self.agree(problem)
        return cast("T", result)


def _agreed(kind: type[UserError]) -> type[AgreedError]:
    """An AgreedError that ``except kind`` catches, too."""
    if kind is UserError:
        return AgreedError
    return type("AgreedError", (AgreedError, kind), {})
