"""All checks, in the order of the report, and how a rank makes its share of them."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial

from ..children import Answer, last_line
from . import gpu, machine, mpi, software, storage
from .base import Check, Finding, Scope, System, fail
from .signals import signals
from .slurm import slurm

CHECKS = (
    Check("python", Scope.NODE, software.python),
    Check("packages", Scope.NODE, software.packages),
    Check("torch", Scope.NODE, software.torch),
    Check("gpu", Scope.NODE, gpu.device),
    Check("gpu_ipc", Scope.NODE, gpu.sharing),
    Check("gpu_mpi", Scope.NODE, gpu.mpi),
    Check("kernels", Scope.NODE, software.kernels),
    Check("hosts", Scope.NODE, machine.host),
    Check("shm", Scope.NODE, machine.shm),
    Check("limits", Scope.RANK, machine.limits),
    Check("folder", Scope.JOB, storage.folder),
    Check("hdf5", Scope.NODE, storage.hdf5),
    Check("clock", Scope.NODE, machine.clock),
    Check("environment", Scope.JOB, machine.environment),
    Check("slurm", Scope.JOB, slurm),
    Check("signals", Scope.RANK, signals),
)
# What a child that joins the job finds out, and what a comparison of all ranks does.
JOINED = ("mpi", "mpirun", "launch")
COMPARED = ("nodes", "alike", "cores")
ORDER = (
    *("python", "packages", "torch", *JOINED, "gpu", "gpu_ipc", "gpu_mpi", "kernels", "hosts"),
    *("nodes", "alike", "cores", "shm", "limits", "folder", "hdf5", "clock", "environment"),
    *("slurm", "signals"),
)


def mine(system: System, names: Collection[str]) -> Iterator[Finding]:
    """This rank's share of the checks of those names, but for what needs MPI."""
    place = system.place
    duties = {Scope.RANK}
    if place.local_rank == 0:
        duties.add(Scope.NODE)
    if place.rank == 0:
        duties.add(Scope.JOB)
    for check in CHECKS:
        if check.name in names and check.scope in duties:
            yield from guarded(check.name, system, partial(check.run, system))


def joined(system: System, answer: Answer) -> Iterator[Finding]:
    """What the child that joined the job tells of MPI and its launcher."""
    told = answer.data()
    yield from guarded("mpi", system, lambda: mpi.library(system, answer))
    yield from guarded("launch", system, lambda: mpi.singletons(system, told))
    if system.place.rank == 0:
        path = str(told.get("path", ""))
        yield from guarded("mpirun", system, lambda: mpi.launcher(system, path))


def guarded(name: str, system: System, run: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """What a check finds; a check that fails itself must not hide the others."""
    try:
        yield from run()
    except Exception as error:
        if system.debug:
            traceback.print_exc()
        yield fail(
            f"{name}.error",
            f"the check itself failed: {type(error).__name__}: {last_line(str(error))}: a defect "
            "of hpcsync; report it with the traceback that this shows",
            system.again("--only", name, "--debug"),
        )
