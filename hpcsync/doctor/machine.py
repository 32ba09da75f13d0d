"""Host name, /dev/shm, limits of processes, clock source, environment on a network file system."""

from __future__ import annotations

import os
import resource
import shlex
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..banner import size as size_of
from .base import Finding, System, good, result, warn

SHM_ENOUGH = 512 << 20
MANY_RANKS = 64
_RESOLVE = "import socket, sys; socket.getaddrinfo(sys.argv[1], None)"
_RESOLVE_LIMIT_S = 15.0
_CLOCKS = "/sys/devices/system/clocksource/clocksource0"
# Read without a system call, fastest first.
_FAST_CLOCKS = ("tsc", "kvm-clock", "hyperv_clocksource_tsc_page", "arch_sys_counter", "timebase")
_NETWORK = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "smb3", "ceph", "fuse.sshfs", "afs")


def host(system: System) -> Iterator[Finding]:
    """Whether this host's name has an address."""
    name = socket.gethostname()
    answer = system.call(system.python, "-c", _RESOLVE, name, limit_s=_RESOLVE_LIMIT_S)
    if answer.ok:
        yield good("hosts", f"{name} has an address")
        return
    entry = f"127.0.1.1 {shlex.quote(name)}"
    if system.place.job:  # other nodes look for this one: its own loop would mislead them
        entry = "\"$(hostname -I | cut -d' ' -f1) $(hostname)\""
    yield warn(
        "hosts.unresolved",
        f"{name} has no address: MPI's launchers and torch look for one, some wait long for it "
        "(for the administrator)",
        f"echo {entry} | {system.sudo}tee -a /etc/hosts",
    )


def shm(system: System) -> Iterator[Finding]:
    """Room in /dev/shm, where ranks of a node share gradients."""
    if system.config.comm.node_transport == "mpi_host":
        yield good("shm", "not used: comm.transport.node is mpi_host")
        return
    folder = system.at("/dev/shm")
    instead = system.again("comm.transport.node=mpi_host")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        make = f"mkdir -p {folder} && mount -t tmpfs -o mode=1777,size=50% tmpfs {folder}"
        yield warn(
            "shm.unusable",
            f"{folder} is not there, or may not be written to: ranks of a node exchange by MPI's "
            "messages, which is slower",
            make if system.user == 0 else instead,
        )
        return
    room = os.statvfs(folder)
    free = room.f_bavail * room.f_frsize
    if free >= SHM_ENOUGH:
        yield good("shm", f"{size_of(free)} free in {folder}")
        return
    yield warn(
        "shm.small",
        f"{folder} has {size_of(free)} free: gradients of all ranks of a node live there (4 bytes "
        "a parameter and rank); containers take --shm-size",
        f"mount -o remount,size=50% {folder}" if system.user == 0 else instead,
    )


class _Limit(NamedTuple):
    """A limit of processes: ulimit's option, what is enough (None: no limit), what it stops."""

    kind: int
    option: str
    enough: int | None
    what: str


_LIMITS = {
    "files": _Limit(resource.RLIMIT_NOFILE, "-n", 1024, "open files, sockets to ranks among them"),
    "processes": _Limit(resource.RLIMIT_NPROC, "-u", 1024, "processes and threads of a user"),
    "memory": _Limit(resource.RLIMIT_AS, "-v", None, "KiB of addresses, mapped memory counted"),
    "file_size": _Limit(resource.RLIMIT_FSIZE, "-f", None, "blocks of a file, so of a checkpoint"),
    "time": _Limit(resource.RLIMIT_CPU, "-t", None, "seconds of processor time, then it is killed"),
}
_LOCKED = _Limit(resource.RLIMIT_MEMLOCK, "-l", None, "KiB of memory that InfiniBand may pin")
_UNITS = {"-v": 1024, "-f": 512, "-l": 1024}


def limits(system: System) -> Iterator[Finding]:
    """Limits of processes that stop large jobs."""
    wanted = dict(_LIMITS)
    network = system.at("/sys/class/infiniband")
    if network.is_dir() and any(network.iterdir()):
        wanted["locked"] = _LOCKED
    found = [each for name, limit in wanted.items() for each in _judge(system, name, limit)]
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield from result("limits", found, f"enough; {files:,} open files")


def _judge(system: System, name: str, limit: _Limit) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(limit.kind)
    endless = resource.RLIM_INFINITY
    if soft == endless or (limit.enough is not None and soft >= limit.enough):
        return
    enough = endless if limit.enough is None else limit.enough
    reachable = hard == endless or (enough != endless and hard >= enough)
    value = "unlimited" if enough == endless else str(enough)
    told = soft // _UNITS.get(limit.option, 1)
    why = f"at most {told:,} {limit.what} (ulimit {limit.option}); {value} would do"
    fix = f"ulimit {'-S ' if reachable else ''}{limit.option} {value}"
    if not reachable and system.user != 0:
        why += "; the hard limit is root's to raise, for Slurm's jobs in slurmd's service"
        fix = f"sudo prlimit --pid $$ --{_LONG[limit.option]}={value}"
    yield warn(f"limits.{name}", why, fix)


_LONG = {"-n": "nofile", "-u": "nproc", "-v": "as", "-f": "fsize", "-t": "cpu", "-l": "memlock"}


def clock(system: System) -> Iterator[Finding]:
    """The kernel's clock source: traces read the clock twice a span."""
    current = system.read(f"{_CLOCKS}/current_clocksource")
    available = system.read(f"{_CLOCKS}/available_clocksource").split()
    better = next((name for name in _FAST_CLOCKS if name in available), "")
    if not current or current in _FAST_CLOCKS:
        yield good("clock", current or "the system does not tell its source")
    elif not better:
        yield good("clock", f"{current}, slow to read, but there is no faster one here")
    else:
        path = system.at(f"{_CLOCKS}/current_clocksource")
        yield warn(
            "clock.slow",
            f"{current} takes a system call a reading, which traces pay; {better} is there "
            "(for the administrator)",
            f"echo {better} | {system.sudo}tee {shlex.quote(str(path))}",
        )


def environment(system: System) -> Iterator[Finding]:
    """The file system that Python and its packages are read from by every rank."""
    prefix = system.prefix
    kind = file_system(system, prefix)
    size = system.place.size
    if kind not in _NETWORK or size < MANY_RANKS:
        many = f"; copy it to the nodes for {MANY_RANKS} ranks or more" if kind in _NETWORK else ""
        yield good("environment", f"{prefix} on {kind or 'an unknown file system'}{many}")
        return
    local = f"/tmp/{prefix.name}"
    each = (
        "srun -N $SLURM_NNODES -n $SLURM_NNODES"
        if system.env.get("SLURM_JOB_ID")
        else "mpirun --map-by ppr:1:node"
    )
    yield warn(
        "environment.network",
        f"{size} ranks read {prefix} from {kind} when they start: that takes minutes; copy it to "
        "each node first",
        f"{each} cp -aT {shlex.quote(str(prefix))} {local} && export PATH={local}/bin:$PATH",
    )


def file_system(system: System, path: Path) -> str:
    """Type of the file system that holds ``path``; empty if the system does not tell."""
    best, kind = -1, ""
    for line in system.read("/proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split()
        if len(fields) < 5 or not right:
            continue
        mount = Path(fields[4].replace("\\040", " "))
        if path.is_relative_to(mount) and len(mount.parts) >= best:
            best, kind = len(mount.parts), right.split()[0]
    return kind
