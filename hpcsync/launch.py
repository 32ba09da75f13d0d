"""Start, checks and the end of a job: the one module that names COMM_WORLD.

Everything else is handed a Runtime.
"""

from __future__ import annotations

import contextlib
import math
import os
import pwd
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from . import output
from .binding import own_cores
from .config import TopologyConfig
from .errors import HpcsyncError, LaunchError, UserError
from .runtime import AgreedError as AgreedError
from .runtime import Runtime as Runtime
from .topology import Topology

# Coded messages of a few hundred KB then take one turn at either end, not three. What the
# environment says counts.
_MPI_SETTINGS = {"OMPI_MCA_btl_tcp_eager_limit": str(256 << 10)}
_TAG_FIX = "see `python -m mpi4py --mpi-library`"


def start(config: TopologyConfig, timeout_s: float = 300.0) -> Runtime:
    """Initialise MPI, check how the job was started, and group its ranks; collective.

    Raises:
        LaunchError: no usable MPI, ranks that did not find each other, or too low a thread level.
    """
    mpi = _import_mpi()
    everyone = mpi.COMM_WORLD
    check_singletons(everyone.Get_size(), os.environ)
    if mpi.Query_thread() < mpi.THREAD_MULTIPLE:
        raise LaunchError(
            f"MPI: thread level {thread_level()} is too low, since communication has a thread of "
            "its own; use an MPI built with THREAD_MULTIPLE, or unset MPI4PY_RC_THREAD_LEVEL"
        )
    comm = everyone.Dup()
    told = comm.allgather((socket.gethostname(), own_cores()))
    hosts = [host for host, _ in told]
    crowding = crowding_of([cores for host, cores in told if host == socket.gethostname()])
    topology = Topology.group(hosts, config.ranks_per_node)
    return Runtime(comm, topology, timeout_s, crowding)


def world() -> Any:
    """All ranks' communicator, unchecked: for what looks into how a job was started.

    Raises:
        LaunchError: no usable MPI.
    """
    return _import_mpi().COMM_WORLD


def crowding_of(cores: Sequence[frozenset[int]], quota: float | None = None) -> float:
    """Ranks a core of a host.

    Args:
        cores: for each rank of the host those that it may use. Bound to a core each or free to use
            all of them, the ranks share what they have together.
        quota: cores' worth of time that the container may use; what the system says if not given.
    """
    together: frozenset[int] = frozenset().union(*cores)
    return len(cores) / max(min(len(together), container_quota() if quota is None else quota), 1)


def machine() -> str:
    """What tells this machine from others: containers of one share a running kernel."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return socket.gethostname()


def container_quota() -> float:
    """Of this container, by control groups; infinite if it has none."""
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            time_us, period_us = file.read().split()
        return int(time_us) / int(period_us)
    except (OSError, ValueError):  # no such file, or "max"
        return math.inf


def _import_mpi() -> Any:
    for name, value in _MPI_SETTINGS.items():
        os.environ.setdefault(name, value)
    # Without it Open MPI ends the process; batch systems and containers may not set it.
    os.environ["HOME"] = os.environ.get("HOME") or _home()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise LaunchError(
            f"MPI: mpi4py finds no MPI library ({reason}); `pip install 'hpcsync[mpi]'`, or load "
            f"your site's MPI module; {_TAG_FIX}"
        ) from None
    return MPI


def _home() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:  # a user that a container does not know
        return os.environ.get("TMPDIR", "/tmp")


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
    output.last()
    status = 0
    try:
        status = main()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):  # as Python itself would
            print(stop.code, file=sys.stderr)
    except BaseException as error:  # whatever it is, it must end every rank
        status = fail(error)
    if not output.end():
        status = status or 1
    _note(status)
    sys.exit(status)


def _note(status: int) -> None:
    """Leave rank 0's status in the file that ``HPCSYNC_STATUS_FILE`` names.

    Where all ranks end with the same status, launchers kill the slower ones for the status of the
    first, and tell of that kill.
    """
    path = os.environ.get("HPCSYNC_STATUS_FILE")
    if path and _place()[0] == 0:
        with contextlib.suppress(OSError), open(path, "w", encoding="ascii") as file:
            file.write(f"{status}\n")


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
        time.sleep(_patience_s(rank))
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
