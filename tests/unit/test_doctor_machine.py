"""Machines with faults: clock, host name, shared memory, limits, file systems.

Each fault is found, its fix is followed as a shell would, and then the check passes.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import socket
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import pytest

from hpcsync.doctor import machine
from hpcsync.doctor.base import Finding, Status, System
from tests.doctor import mended_here, provokes, script
from tests.faults import files, system

MOUNTS = """\
21 1 8:1 / / rw - ext4 /dev/sda1 rw
22 21 0:40 / /home rw - nfs4 server:/home rw
23 21 0:41 / /scratch rw - lustre server:/scratch rw
"""


@provokes("clock.slow")
def test_slow_clock(tmp_path: Path) -> None:
    root = files(
        tmp_path,
        sys__devices__system__clocksource__clocksource0__current_clocksource="hpet\n",
        sys__devices__system__clocksource__clocksource0__available_clocksource="tsc hpet acpi_pm\n",
    )
    (of_user,) = machine.clock(system(root=root, user=1000))
    assert of_user.fix.startswith("echo tsc | sudo tee ")
    mended_here(machine.clock, "clock.slow", system(root=root, user=0), fix="echo tsc | tee ")


@pytest.mark.parametrize("available", ["", "hpet acpi_pm"])
def test_a_slow_clock_that_cannot_be_helped(tmp_path: Path, available: str) -> None:
    folder = "sys__devices__system__clocksource__clocksource0__"
    files(tmp_path, **{f"{folder}current_clocksource": "hpet"})
    files(tmp_path, **{f"{folder}available_clocksource": available})
    assert [each.status for each in machine.clock(system(root=tmp_path))] == [Status.PASS]


@pytest.mark.parametrize("job", [False, True])
@provokes("hosts.unresolved")
def test_host_without_an_address(tmp_path: Path, job: bool) -> None:
    """A resolver of our own, in place of that which reads /etc/hosts."""
    hosts = files(tmp_path, etc__hosts="127.0.0.1 localhost\n") / "etc" / "hosts"
    python = script(tmp_path, "python", f'grep -q -w -- "$3" {hosts}')
    here = system(python=str(python), user=0)

    def in_root(checked: System) -> Sequence[Finding]:
        found = machine.host(checked)
        return [dataclasses.replace(e, fix=e.fix.replace("/etc/hosts", str(hosts))) for e in found]

    if job:  # where the loop would mislead other nodes
        name = socket.gethostname()
        script(
            tmp_path / "bin", "hostname", f'[ "$1" = -I ] && echo 10.0.0.7 fd00::7 || echo {name}'
        )
        env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        here = system({**env, "SLURM_JOB_ID": "7"}, python=str(python))
    found = mended_here(in_root, "hosts.unresolved", here)
    assert hosts.read_text().splitlines()[1].split()[0] == ("10.0.0.7" if job else "127.0.1.1")
    assert "sudo" not in found.fix
    (of_user,) = machine.host(dataclasses.replace(here, user=1000, python="/bin/false"))
    assert of_user.fix.endswith(" | sudo tee -a /etc/hosts")


@pytest.mark.parametrize("user", [0, 1000])
@provokes("shm.unusable")
def test_no_shared_memory(tmp_path: Path, user: int) -> None:
    """The one fix mounts it, here by a mount that only makes the folder; the other does without."""
    script(tmp_path / "bin", "mount", f"test -d {tmp_path}/dev/shm")
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    here = system(env, root=tmp_path, user=user)
    fix = "mkdir -p" if user == 0 else "doctor comm.transport.node=mpi_host"
    mended_here(machine.shm, "shm.unusable", here, fix=fix)


@provokes("shm.small")
def test_small_shared_memory_of_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SHM_ENOUGH", 1 << 62)
    here = system(user=1000)
    mended_here(machine.shm, "shm.small", here, fix="doctor comm.transport.node=mpi_host")


@provokes("limits.locked")
def test_memory_that_infiniband_may_not_pin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fix raises the limit of a shell; what that shell says is the limit of its children."""
    limits = {"soft": 8 << 20}
    endless = resource.RLIM_INFINITY

    def getrlimit(kind: int) -> tuple[int, int]:
        return (limits["soft"], endless) if kind == resource.RLIMIT_MEMLOCK else (endless, endless)

    monkeypatch.setattr(resource, "getrlimit", getrlimit)
    root = files(tmp_path, sys__class__infiniband__mlx5_0__name="")
    (found,) = machine.limits(system(root=root))
    assert found.code == "limits.locked"
    assert found.why.startswith("at most 8,192 KiB of memory that InfiniBand may pin")
    assert found.fix == "ulimit -S -l unlimited"
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limits["soft"], limits["soft"]))
    fixes = {each.code: each.fix for each in machine.limits(system(root=root, user=1000))}
    assert fixes["limits.locked"] == "sudo prlimit --pid $$ --memlock=unlimited"
    monkeypatch.setattr(resource, "getrlimit", getrlimit)
    limits["soft"] = endless
    assert [each.status for each in machine.limits(system(root=root))] == [Status.PASS]
    assert [each.status for each in machine.limits(system(root=tmp_path / "x"))] == [Status.PASS]


@pytest.mark.usefixtures("mpi")
@pytest.mark.parametrize("slurm_job", [False, True])
@provokes("environment.network")
def test_environment_on_nfs(tmp_path: Path, slurm_job: bool) -> None:
    mounts = f"{MOUNTS}24 21 0:42 / {tmp_path}/home rw - nfs4 server:/home rw\n"
    root = files(tmp_path / "root", proc__self__mountinfo=mounts)
    prefix = tmp_path / "home" / f"environment-{uuid.uuid4().hex[:8]}"
    script(prefix / "bin", "python", "")
    job = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "64"}
    here = dataclasses.replace(system(root=root, prefix=prefix), env={**system().env, **job})
    copy = Path("/tmp") / prefix.name

    def outside_the_job(checked: System) -> Sequence[Finding]:
        """The fix is followed where the job is started, so without a rank's variables."""
        return list(machine.environment(dataclasses.replace(checked, env={**checked.env, **job})))

    def then(mend: System) -> System:
        python = shutil.which("python", path=mend.env["PATH"])
        assert python is not None
        return dataclasses.replace(mend, prefix=Path(python).parents[1])

    try:
        env = {**system().env, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        here = dataclasses.replace(here, env=env)
        fix = "mpirun --map-by ppr:1:node cp -aT "
        if slurm_job:
            srun = '[ "$1 $2 $3 $4" = "-N 2 -n 2" ] && shift 4 && exec "$@"'
            script(tmp_path / "bin", "srun", srun)
            env = {**env, "PATH": f"{tmp_path / 'bin'}:{env['PATH']}"}
            here = dataclasses.replace(here, env={**env, "SLURM_JOB_ID": "7", "SLURM_NNODES": "2"})
            fix = "srun -N $SLURM_NNODES -n $SLURM_NNODES cp -aT "
        mended_here(outside_the_job, "environment.network", here, fix=fix, then=then)
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def test_file_systems(tmp_path: Path) -> None:
    root = files(tmp_path, proc__self__mountinfo=MOUNTS)
    here = system(root=root)
    assert machine.file_system(here, Path("/home/me/env")) == "nfs4"
    assert machine.file_system(here, Path("/homes")) == "ext4"
    assert machine.file_system(system(root=tmp_path / "none"), Path("/home")) == ""


def test_few_ranks_may_read_from_nfs(tmp_path: Path) -> None:
    root = files(tmp_path, proc__self__mountinfo=MOUNTS)
    (found,) = machine.environment(system(root=root, prefix=Path("/home/me/env")))
    assert found.status == Status.PASS
    assert "64 ranks or more" in found.why
