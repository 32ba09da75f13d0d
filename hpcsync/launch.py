"""Start, checks and the end of a job: the one module that names COMM_WORLD.

Everything else is handed a Runtime. Control messages (a few scalars, small objects) go through
it; they never spin while they wait.
"""

from __future__ import annotations

import itertools
import os
import pickle
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, cast

from .config import TopologyConfig
from .errors import (
    CollectiveTimeout,
    ConfigError,
    DataError,
    HpcsyncError,
    LaunchError,
    ModelError,
    UserError,
)
from .topology import Topology

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm, Request
    from numpy.typing import NDArray

_PIECE_BYTES = 1 << 30  # classic MPI counts have 31 bits
_MOST_SLEEP_S = 1e-3
_TURN_S = 0.25  # longer than it takes to speak and to end the job
_KINDS: tuple[type[UserError], ...] = (ConfigError, DataError, ModelError, LaunchError)
_TAG_FIX = "see `python -m mpi4py --mpi-library`"


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
        from mpi4py import MPI

        kinds = {"sum": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN}
        self.wait(self.comm.Iallreduce(MPI.IN_PLACE, array, kinds[op]))

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
        buffer = np.empty(int(lengths.sum()), np.uint8)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        counts = [int(length) for length in lengths]
        offsets = [int(start) for start in starts[:-1]]
        self.wait(self.comm.Iallgatherv(data, [buffer, counts, offsets, MPI.BYTE]))
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


def _agreed(kind: type[UserError]) -> type[AgreedError]:
    """An AgreedError that ``except kind`` catches, too."""
    if kind is UserError:
        return AgreedError
    return type("AgreedError", (AgreedError, kind), {})


def start(config: TopologyConfig, timeout_s: float = 300.0) -> Runtime:
    """Initialise MPI, check how the job was started, and group its ranks; collective.

    Raises:
        LaunchError: no usable MPI, ranks that did not find each other, or too low a thread level.
    """
    mpi = _import_mpi()
    world = mpi.COMM_WORLD
    check_singletons(world.Get_size(), os.environ)
    if mpi.Query_thread() < mpi.THREAD_MULTIPLE:
        raise LaunchError(
            f"MPI: thread level {thread_level()} is too low, since communication has a thread of "
            "its own; use an MPI built with THREAD_MULTIPLE, or unset MPI4PY_RC_THREAD_LEVEL"
        )
    comm = world.Dup()
    hosts = comm.allgather(socket.gethostname())
    crowding = hosts.count(socket.gethostname()) / (os.cpu_count() or 1)
    topology = Topology.group(hosts, config.ranks_per_node)
    return Runtime(comm, topology, timeout_s, crowding)


def _import_mpi() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise LaunchError(
            f"MPI: mpi4py finds no MPI library ({reason}); `pip install 'hpcsync[mpi]'`, or load "
            f"your site's MPI module; {_TAG_FIX}"
        ) from None
    return MPI


def check_singletons(size: int, environment: Mapping[str, str]) -> None:
    """Stop a job whose processes each think that they are alone.

    That happens when the launcher and the MPI library that mpi4py loads do not speak the same
    language: N jobs of one rank would train, and nobody would notice.

    Raises:
        LaunchError: the launcher started more processes than MPI sees.
    """
    if size > 1:
        return
    launchers = (
        (
            "OMPI_COMM_WORLD_SIZE",
            "mpirun",
            "mpi4py has loaded another MPI than mpirun's: use the "
            "mpirun of the MPI that `python -m mpi4py --mpi-library` names",
        ),
        (
            "PMI_SIZE",
            "the launcher",
            "mpi4py has loaded another MPI than the launcher's: use the "
            "mpiexec of the MPI that `python -m mpi4py --mpi-library` names",
        ),
        (
            "SLURM_STEP_NUM_TASKS",
            "srun",
            "start with `srun --mpi=pmix` (`srun --mpi=list` shows "
            "what the site has), or with mpirun inside the job",
        ),
    )
    for variable, launcher, fix in launchers:
        started = environment.get(variable, "1")
        if started.isdigit() and int(started) > 1:
            raise LaunchError(
                f"launch: {launcher} started {started} processes ({variable}), but each of them "
                f"is alone in its MPI world; {fix}"
            )


def thread_level() -> str:
    """The thread level that MPI gave, as MPI spells it."""
    from mpi4py import MPI

    names = ("THREAD_SINGLE", "THREAD_FUNNELED", "THREAD_SERIALIZED", "THREAD_MULTIPLE")
    return {getattr(MPI, name): name for name in names}.get(MPI.Query_thread(), "unknown")


def mpi_library() -> tuple[str, str]:
    """Name with version, and path, of the MPI library in use."""
    from mpi4py import MPI

    text = MPI.Get_library_version().split("\0")[0]
    found = re.match(r"(Open MPI v[\d.\w]+|MPICH Version:\s*[\d.\w]+|[^\n,]+)", text)
    name = re.sub(r"\s+", " ", found.group(1)) if found else "unknown"
    return name, _library_path()


def _library_path() -> str:
    try:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            paths = [line.split(maxsplit=5)[-1].strip() for line in maps if "/libmpi" in line]
    except OSError:
        return "unknown path"
    mains = [path for path in paths if re.search(r"/libmpi(ch)?(_\w+)?\.so", path)]
    return (mains or paths or ["unknown path"])[0]


def guard(main: Callable[[], int]) -> NoReturn:
    """Run a command and end the whole job with its status.

    A user's error is one line and status 2, anything else one traceback and status 1.
    """
    status = 0
    try:
        status = main()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):  # as Python itself would
            print(stop.code, file=sys.stderr)
    except BaseException as error:  # whatever it is, it must end every rank
        status = fail(error)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)


def fail(error: BaseException) -> int:
    """Report ``error`` and end the other ranks; returns the exit status if this is the only one.

    Does not return where other ranks have to be ended. Ranks wait in rank order before they speak,
    so that an error which hits several is told once: the first to speak ends the job.
    """
    rank, size = _place()
    status = 2 if isinstance(error, UserError) else 130 if _interrupted(error) else 1
    if isinstance(error, AgreedError):
        if rank == 0:
            _tell(error, "")
        return status
    if size > 1:
        time.sleep(min(rank, 12) * _TURN_S)
    _tell(error, f"rank {rank} on {socket.gethostname()}: " if size > 1 else "")
    if size > 1:
        abort(status)
    return status


def _patience_s(rank: int) -> float:
    """Seconds before a rank may speak: 0, 1, 2, 2.3, 2.5, ... up to 3.

    A lower rank with the same error needs about 0.3 s to end the job, more on a busy machine.
    """
    return 3.0 - 2.0 / rank if rank else 0.0


def abort(status: int) -> NoReturn:
    """End every rank of the job now, with ``status``."""
    from mpi4py import MPI

    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(0.1)  # let the launcher forward what was said
    MPI.COMM_WORLD.Abort(status)
    os._exit(status)


def _place() -> tuple[int, int]:
    """Rank and size, without starting MPI."""
    module = sys.modules.get("mpi4py.MPI")
    if module is None or not module.Is_initialized() or module.Is_finalized():
        return 0, 1
    return module.COMM_WORLD.Get_rank(), module.COMM_WORLD.Get_size()


def _interrupted(error: BaseException) -> bool:
    return isinstance(error, KeyboardInterrupt)


def _tell(error: BaseException, where: str) -> None:
    if _interrupted(error):
        text = f"hpcsync: {where}interrupted\n"
    elif isinstance(error, HpcsyncError):
        text = f"hpcsync: error: {where}{error}\n"
    else:
        trace = "".join(traceback.format_exception(error))
        text = f"hpcsync: {where}{type(error).__name__}\n{trace}"
    sys.stderr.write(text)
    sys.stderr.flush()
