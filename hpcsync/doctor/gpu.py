"""What the GPU of this place can do, tried in children on real buffers, and what jobs go by."""

from __future__ import annotations

import json
import shlex
import socket
from collections.abc import Iterator, Mapping, Sequence

from .. import cache_files
from ..binding import Seen, assign
from ..device_probe import kept
from ..device_probe.attempt import Outcome, attempt
from ..errors import LaunchError
from .base import Finding, System, fail, good, warn
from .facts import Facts
from .mpi import start
from .software import gpu_count

# What helps a library that was built with CUDA but does not use it, by the library's name.
_AWARE = {
    "Open MPI": "OMPI_MCA_opal_cuda_support=true OMPI_MCA_pml=ucx",
    "MPICH": "MPICH_GPU_SUPPORT_ENABLED=1",
}
# The child could not come so far; where that is an error, other checks say why.
_BEFORE = ("loading torch and CuPy", "opening the device")
_HIDE = "export CUDA_VISIBLE_DEVICES="


def device(system: System) -> Iterator[Finding]:
    """Memory, copies, events and the kernels that add; and whether jobs go by an older answer."""
    tried = _tried(system, ("memory", "sums"))
    if tried is None:
        yield good("gpu", _absent(system))
        return
    problem = _first(tried)
    if not problem:
        yield good("gpu", "memory, copies, events and kernels do what they should")
    elif _told_elsewhere(problem):
        yield good("gpu", f"not tried: {problem}")
    else:
        yield fail("gpu.broken", f"{problem}; without GPUs runs compute on the CPU", _HIDE)
    yield from _stale(system, tried)


def sharing(system: System) -> Iterator[Finding]:
    """Whether ranks of a node can add from each other's GPU memory."""
    way = system.config.comm.node_transport
    if way not in ("auto", "cuda_ipc"):
        yield good("gpu_ipc", f"not used: comm.transport.node is {way}")
        return
    tried = _tried(system, ("sharing",))
    if tried is None:
        yield good("gpu_ipc", _absent(system))
        return
    problem = _first(tried)
    if not problem:
        yield good("gpu_ipc", "another process added to this one's GPU memory, in order")
    elif _before(problem):
        yield good("gpu_ipc", f"not tried: {problem}")
    else:
        yield warn(
            "gpu_ipc.refused",
            f"ranks of a node cannot read each other's GPU memory ({problem}): gradients go by "
            "MPI, which is slower; containers without --ipc=host are so",
            system.again("comm.transport.node=mpi_staged"),
        )
    yield from _stale(system, tried)


def mpi(system: System) -> Iterator[Finding]:
    """Whether MPI takes GPU memory, by handing it some."""
    tried = _tried(system, ("mpi", "mpi_pair"))
    if tried is None:
        yield good("gpu_mpi", _absent(system))
        return
    problem = _first(tried)
    if not problem:
        yield good("gpu_mpi", "MPI takes GPU memory: buffers went through it unharmed")
    elif _before(problem) or problem.startswith("LaunchError"):
        yield good("gpu_mpi", f"not tried: {problem}")
    elif _without_cuda(system):
        yield good(
            "gpu_mpi",
            "this Open MPI was built without CUDA: GPU memory is staged through the host's; a "
            "build with CUDA would take it directly",
        )
    else:
        named = [fix for name, fix in _AWARE.items() if name in problem]
        yield warn(
            "gpu_mpi.staged",
            f"MPI does not take GPU memory ({problem}): it is staged through the host's, which is "
            "slower",
            "export " + " ".join(named or _AWARE.values()),
        )
    yield from _stale(system, tried)


def shared(system: System, every: Sequence[Facts]) -> Iterator[Finding]:
    """Whether each rank finds a GPU of its own.

    Args:
        every: all ranks, by rank.
    """
    if not all(each.gpus for each in every) or system.config.topology.share_devices:
        return
    seen = [Seen(each.host, tuple(each.gpus)) for each in every]
    try:
        assign(seen, share=False)
    except LaunchError as error:
        hosts = {each.host for each in every}
        room = min(len({gpu for e in every if e.host == host for gpu in e.gpus}) for host in hosts)
        why = str(error).removeprefix("devices: ").partition("; ")[0]
        yield fail("gpu.shared", why, f"{start(system, room, len(hosts))} {system.again()}")


def _without_cuda(system: System) -> bool:
    """Whether the Open MPI on PATH says that it cannot take GPU memory, whatever it is told; it
    would end a job that asks for it."""
    if system.which("ompi_info") is None:
        return False
    answer = system.call("ompi_info", "--parsable", "--all")
    return "opal_built_with_cuda_support:value:false" in answer.out


def _absent(system: System) -> str:
    return "no GPU here" if not gpu_count(system) else "not used: train.device is cpu"


def _tried(system: System, names: Sequence[str]) -> dict[str, Outcome] | None:
    """Outcomes; None where there is nothing to try."""
    if not gpu_count(system) or system.config.train.device == "cpu":
        return None
    return attempt(
        names,
        device=system.device,
        env=system.env,
        python=system.python,
        limit_s=system.limit_s,
    )


def _first(tried: Mapping[str, Outcome]) -> str:
    return next((each.problem for each in tried.values() if each.problem), "")


def _before(problem: str) -> bool:
    return problem.startswith(_BEFORE)


def _told_elsewhere(problem: str) -> bool:
    """Whether the child came to no device, and said so itself: no crash, and no end by time."""
    lost = "was killed by" in problem or "did not end" in problem
    return _before(problem) and not lost


def _stale(system: System, tried: Mapping[str, Outcome]) -> Iterator[Finding]:
    """Where jobs go by a kept answer that is no longer true."""
    path = kept.path_of(socket.gethostname(), cache_files.folder(system.env))
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["outcomes"]
        other = [name for name in tried if bool(before[name]) != bool(tried[name].problem)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if other and all(each.lasting for each in tried.values()):
        yield warn(
            "gpu.stale",
            f"{path} says otherwise of {', '.join(other)}, and jobs go by it until driver, "
            "libraries or settings change",
            f"rm -f {shlex.quote(str(path))}",
        )
