"""What a rank tells the others about itself, for checks that compare ranks."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata

from .. import __version__
from ..binding import own_cores
from ..launch import container_quota, machine
from .base import System
from .software import gpu_count

_COMPARED = ("torch", "mpi4py", "numpy", "h5py")


@dataclass(kw_only=True)
class Facts:
    """One rank.

    Attributes:
        boot: which machine, whatever its name: the id of its last start.
        cores: those that this process may use.
        around: those that its launcher may use, and so could give it.
        online: cores of the machine.
        quota: cores' worth of time that the container may use; None for no limit.
        threads: OMP_NUM_THREADS; 0 if it is not set.
        versions: by name.
        prefix: the Python environment.
        clocks: this host's time at moments that were the same for all ranks.
        gpus: names that no other GPUs have, of those that this process sees.
        sees: whether it finds the file that rank 0 has put into the run folder.
    """

    rank: int = 0
    host: str = ""
    boot: str = ""
    cores: Sequence[int] = ()
    around: Sequence[int] = ()
    online: int = 1
    quota: float | None = None
    threads: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    clocks: Sequence[float] = ()
    gpus: Sequence[str] = ()
    sees: bool = True


def gather(system: System) -> Facts:
    """Of this process."""
    quota = container_quota()
    threads = system.env.get("OMP_NUM_THREADS", "")
    versions = {"Python": ".".join(map(str, system.version[:2])), "hpcsync": __version__}
    for name in _COMPARED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "missing"
    return Facts(
        rank=system.place.rank,
        host=socket.gethostname(),
        boot=machine(),
        cores=sorted(own_cores()),
        around=_cores_of(system, os.getppid()),
        online=os.cpu_count() or 1,
        quota=None if quota == float("inf") else quota,
        threads=int(threads) if threads.isdigit() else 0,
        versions=versions,
        prefix=str(system.prefix),
        gpus=system.probe("gpus").data().get("gpus", []) if gpu_count(system) else [],
    )


def _cores_of(system: System, process: int) -> list[int]:
    for line in system.read(f"/proc/{process}/status").splitlines():
        name, _, text = line.partition(":")
        if name == "Cpus_allowed_list":
            return numbers(text)
    return []


def numbers(text: str) -> list[int]:
    """``0-2,5`` as numbers."""
    found: list[int] = []
    for part in text.strip().split(","):
        low, _, high = part.partition("-")
        if low.isdigit():
            found += range(int(low), int(high or low) + 1)
    return found
