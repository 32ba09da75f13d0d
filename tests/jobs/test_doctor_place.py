"""The doctor finds what cores, limits, signals and disks lack, and its commands mend them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hpcsync.doctor.machine import _LIMITS
from tests import launcher
from tests.doctor import (
    cores,
    doctor,
    findings,
    has_own_mpi,
    mended,
    mpirun,
    needs_cores,
    needs_gxx,
    needs_mpi,
    needs_root,
    provokes,
    script,
    shell,
)

pytestmark = pytest.mark.timeout(300)


# --- cores ----------------------------------------------------------------------------------------


@needs_mpi
@provokes("cores.crowded")
def test_more_ranks_than_cores() -> None:
    ranks = cores() + 1
    command = f"{mpirun(ranks)} {doctor('--json', '--only', 'cores')}"
    found = findings(shell(command))["cores.crowded"]
    assert found["fix"].startswith(f"mpirun -n {cores()} ")
    path = f"{Path(launcher.find_mpirun() or '').parent}:{os.environ['PATH']}"
    # Open MPI binds up to two ranks to a core each, and more to sockets: both are well.
    after = findings(shell(found["fix"], {"PATH": path}))
    assert after["cores"]["status"] == "PASS"


@needs_mpi
@needs_cores
@provokes("cores.crowded")
def test_a_shell_that_may_use_one_core_only() -> None:
    first = min(os.sched_getaffinity(0))
    online = os.cpu_count() or 1
    command = f"{mpirun(2)} {doctor('--json', '--only', 'cores')}"
    setup = f"taskset -cp {first} $$ >&2"
    mended("cores.crowded", setup, command, fix=f"taskset -cp 0-{online - 1} $$")


@needs_mpi
@needs_cores
@pytest.mark.skipif(not has_own_mpi(), reason="MPI is no wheel here: pip install 'hpcsync[mpi]'")
@provokes("cores.narrow")
def test_a_rank_that_is_bound_to_one_core() -> None:
    """As Open MPI does unless told otherwise."""
    found = launcher.find_mpirun()
    command = f"{found} -n 1 {doctor('--json', '--only', 'cores')}"
    mended("cores.narrow", "", command, fix="export PRTE_MCA_hwloc_default_binding_policy=none")


@needs_mpi
@needs_cores
@provokes("cores.shared")
def test_ranks_that_are_bound_to_the_same_core(tmp_path: Path) -> None:
    """As by a launcher that counts cores anew for each step; a stand-in that heeds the fix."""
    first = min(os.sched_getaffinity(0))
    bind = f'[ "$SLURM_CPU_BIND" = none ] || set -- taskset -c {first} "$@"'
    binder = script(tmp_path, "binder", f'{bind}\nexec "$@"')
    command = f"{mpirun(2)} {binder} {doctor('--json', '--only', 'cores')}"
    found = mended("cores.shared", "", command, fix="export PRTE_MCA_")
    assert found["status"] == "FAIL"


@needs_mpi
@provokes("cores.threads")
def test_too_many_threads() -> None:
    ranks = min(2, cores())
    if ranks < 2:
        pytest.skip("one core: two ranks are too many in any case")
    setup = f"export OMP_NUM_THREADS={8 * cores()}"
    command = f"{mpirun(2)} {doctor('--json', '--only', 'cores')}"
    mended("cores.threads", setup, command, fix="export OMP_NUM_THREADS=")


# --- the machine ----------------------------------------------------------------------------------


@pytest.mark.cluster
@provokes("hosts.unresolved")
def test_host_name_without_an_address(tmp_path: Path) -> None:
    """In a host of its own name and its own /etc/hosts."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n")
    name = "nowhere-in-the-world"
    command = doctor("--json", "--only", "hosts")
    inside = f"hostname {name}\nmount --bind {hosts} /etc/hosts\n{command}"
    found = findings(shell(f"unshare --uts --mount sh -c {shlex.quote(inside)}"))
    found = found["hosts.unresolved"]
    inside = f"hostname {name}\nmount --bind {hosts} /etc/hosts\n{found['fix']}\n{command}"
    after = findings(shell(f"unshare --uts --mount sh -c {shlex.quote(inside)}"))
    assert after["hosts"]["status"] == "PASS"


@pytest.mark.cluster
@provokes("shm.small")
def test_small_shared_memory() -> None:
    """A container's 64 KiB; the fix takes what the machine has, which may be too little."""
    command = doctor("--json", "--only", "shm")
    small = "mount -t tmpfs -o size=64k tmpfs /dev/shm"
    run = f"unshare --mount sh -c {shlex.quote(f'{small}; {command}')}"
    found = findings(shell(run))["shm.small"]
    assert found["fix"] == "mount -o remount,size=50% /dev/shm"
    with_fix = f"{small}; {found['fix']}; {command}"
    after = findings(shell(f"unshare --mount sh -c {shlex.quote(with_fix)}"))
    assert after["shm"]["status"] == "PASS"


ENOUGH = {"files": 200, "processes": 900, "memory": 1 << 25, "file_size": 1 << 20, "time": 500}


@pytest.mark.parametrize("name", _LIMITS)
@provokes("limits.files", "limits.processes", "limits.memory", "limits.file_size", "limits.time")
def test_limits(name: str) -> None:
    option = _LIMITS[name].option
    if name == "processes" and os.geteuid() != 0:
        pytest.skip("only root may start processes beyond the limit that the test sets")
    setup = f"ulimit -S {option} {ENOUGH[name]}"
    mended(f"limits.{name}", setup, fix="ulimit -S")


@needs_root
@provokes("limits.files")
def test_hard_limit() -> None:
    if "1024" not in shell("ulimit -n 200; ulimit -n 1024 && ulimit -n"):
        pytest.skip("root may not raise limits here: a container without CAP_SYS_RESOURCE")
    mended("limits.files", "ulimit -n 200", fix="ulimit -n 1024")


@pytest.mark.parametrize("name", ["TERM", "USR1", "USR2"])
@provokes("signals.ignored")
def test_signals_that_a_script_ignores(name: str) -> None:
    found = mended("signals.ignored", f"trap '' {name}", fix=f"trap - {name}")
    assert f"SIG{name} is ignored" in found["why"]


@provokes("signals.blocked")
def test_signals_that_are_blocked(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGTERM])\n"
        "os.execvp(sys.argv[1], sys.argv[1:])\n"
    )
    path = tmp_path / "block.py"
    path.write_text(code)
    block = f"{sys.executable} {path}"
    command = f"{block} {doctor('--json', '--only', 'signals')}"
    found = findings(shell(command))["signals.blocked"]
    assert "SIGTERM, SIGUSR1 are blocked" in found["why"]
    after = findings(shell(f"{block} sh -c {shlex.quote(found['fix'])}"))
    assert after["signals"]["status"] == "PASS"


# --- storage --------------------------------------------------------------------------------------


@provokes("folder.unwritable")
def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    command = doctor("--json", "--only", "folder", "run.dir=/proc/runs")
    env = {"SCRATCH": str(tmp_path)}
    found = mended("folder.unwritable", "", command, env=env)
    assert found["status"] == "FAIL"
    assert found["fix"].endswith(f"run.dir={tmp_path}/runs")
    assert not any(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.cluster
@provokes("folder.full", "folder.unwritable")
def test_full_disk(tmp_path: Path) -> None:
    env = {"SCRATCH": str(tmp_path)}
    (tmp_path / "disk").mkdir()
    command = doctor("--json", "--only", "folder", f"run.dir={tmp_path}/disk")
    for size, code in (("16m", "folder.full"), ("64k", "folder.unwritable")):
        mount = f"mount -t tmpfs -o size={size} tmpfs {tmp_path}/disk"
        run = f"unshare --mount sh -c {shlex.quote(f'{mount}; {command}')}"
        assert code in findings(shell(run, env))


@needs_mpi
@pytest.mark.cluster
@provokes("folder.local")
def test_folder_that_nodes_do_not_share(tmp_path: Path) -> None:
    """The second rank sees an empty file system where the first one's run folder is."""
    for name in ("local", "shared"):
        (tmp_path / name).mkdir()
    mount = f"mount -t tmpfs tmpfs {tmp_path}/local"
    other = script(tmp_path, "other", f'exec unshare --mount sh -c \'{mount}; exec "$@"\' sh "$@"')
    one = doctor("--json", "--only", "folder", f"run.dir={tmp_path}/local")

    def both(command: str) -> str:
        return f"{mpirun(1)} {command} : -n 1 {other} {command}"

    env = {"SCRATCH": f"{tmp_path}/shared"}
    found = findings(shell(both(one), env))["folder.local"]
    assert found["status"] == "FAIL"
    after = findings(shell(both(found["fix"]), env))
    assert "folder.local" not in after
    assert after["folder"]["status"] == "PASS"


NO_LOCKS = """
#include <errno.h>
extern "C" int flock(int, int) { errno = ENOLCK; return -1; }
"""


@needs_gxx
@provokes("hdf5.locks")
def test_file_system_without_locks(tmp_path: Path) -> None:
    """As Lustre is without its flock option; HDF5 itself then refuses to open files."""
    source = tmp_path / "locks.cpp"
    source.write_text(NO_LOCKS)
    library = tmp_path / "locks.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-o", library, source], check=True)
    setup = f"export LD_PRELOAD={library}"
    mended("hdf5.locks", setup, fix="export HDF5_USE_FILE_LOCKING=FALSE")
