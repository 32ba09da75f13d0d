"""The doctor as users start it: faults that are real here, and its report of several ranks."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcsync.doctor import checks
from hpcsync.doctor.machine import _LIMITS
from tests import launcher
from tests.doctor import (
    ROOT,
    Sandbox,
    cores,
    doctor,
    findings,
    mended,
    module,
    offline,
    provokes,
    script,
    shell,
    wheel,
)

pytestmark = pytest.mark.timeout(300)
needs_mpi = pytest.mark.usefixtures("mpi")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may do that")
needs_cores = pytest.mark.skipif(cores() < 2, reason="one core: ranks cannot be bound apart")
needs_gxx = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++ is missing: apt-get install g++"
)


def mpirun(ranks: int, *flags: str) -> str:
    """The start of a command line, for a shell."""
    return shlex.join(launcher.mpirun(ranks, *flags))


# --- whole reports ------------------------------------------------------------------------------


@needs_mpi
def test_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hpcsync.doctor", "--json"],
        cwd=ROOT,
        env=launcher.environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    report = json.loads(done.stdout)
    assert done.returncode == report["exit_status"], done.stderr
    assert (report["ranks"], report["heard"]) == (1, 1)
    checked = {each["check"] for each in report["findings"]}
    assert checked == set(checks.ORDER) - {"launch", "nodes", "alike"}
    for each in report["findings"]:
        assert (each["status"] == "PASS") == (not each["fix"]), each
        assert "\n" not in each["why"] + each["fix"]


@needs_mpi
@pytest.mark.parametrize("ranks", [2, 4])
def test_rank_0_reports_for_all(ranks: int) -> None:
    only = "mpi,mpirun,limits,hosts,nodes,alike,cores,signals"
    outcome = launcher.run(ranks, "-m", "hpcsync.doctor", "--json", "--only", only, timeout=240)
    outcome.assert_clean()
    assert outcome.status == 0, outcome.describe()
    assert outcome.stdout.count('"format"') == 1
    report = json.loads(outcome.stdout)
    assert (report["ranks"], report["heard"]) == (ranks, ranks)
    found = findings(outcome.stdout)
    assert found["limits"]["ranks"] == list(range(ranks))
    assert found["hosts"]["ranks"] == [0], "one rank of a node makes its checks"
    assert found["nodes"]["why"] == f"{ranks} ranks on 1 node (1 x {ranks})"
    assert found["mpirun"]["why"] == "started by mpirun"


@needs_mpi
def test_a_fault_of_one_rank_is_told_with_its_rank(tmp_path: Path) -> None:
    low = script(tmp_path, "low", '[ "$OMPI_COMM_WORLD_RANK" = 1 ] && ulimit -S -n 200; exec "$@"')
    words = ["-m", "hpcsync.doctor", "--only", "limits"]
    command = [*launcher.mpirun(2), str(low), sys.executable, *words]
    outcome = launcher.Job(command).wait(240)
    outcome.assert_clean()
    assert outcome.status == 0, outcome.describe()
    (line,) = (line for line in outcome.stdout.splitlines() if "WARN" in line)
    assert "at most 200 open files" in line
    assert "[rank 1 on " in line


@needs_mpi
def test_a_failure_is_an_exit_status() -> None:
    words = ["-m", "hpcsync.doctor", "--only", "folder", "run.dir=/proc/runs"]
    assert launcher.run(0, *words, timeout=240).status == 1
    outcome = launcher.run(2, *words, timeout=240)
    outcome.assert_clean()
    assert outcome.status == 1, outcome.describe()
    assert outcome.stdout.count("  FAIL  folder") == 1


@needs_mpi
def test_wrong_words_are_told_once() -> None:
    outcome = launcher.run(2, "-m", "hpcsync.doctor", "train.stesp=3", timeout=240)
    outcome.assert_clean()
    assert outcome.status == 2, outcome.describe()
    assert outcome.stderr.count("hpcsync: error: ") == 1, outcome.describe()


@needs_mpi
def test_a_rank_whose_mpi_dies(tmp_path: Path) -> None:
    """It tells so itself; rank 0 reports what it knows once its patience is over."""
    code = (
        "import os, sys\n"
        "if os.environ.get('OMPI_COMM_WORLD_RANK') == '1' and 'world' in str(sys.orig_argv):\n"
        "    os.abort()\n"
    )
    env = {"PYTHONPATH": f"{ROOT}:{module(tmp_path, 'sitecustomize', code)}"}
    words = ["-m", "hpcsync.doctor", "--only", "mpi,limits", "--limit", "4"]
    outcome = launcher.Job([*launcher.mpirun(2), sys.executable, *words], env=env).wait(240)
    assert not outcome.timed_out, outcome.describe()
    assert outcome.status != 0
    assert "  FAIL  mpi " in outcome.stdout, outcome.describe()
    assert outcome.stdout.count("  PASS  limits") == 1, outcome.describe()


# --- packages and kernels -------------------------------------------------------------------------


@provokes("packages.missing", "packages.old")
def test_packages_that_are_missing_or_old(tmp_path: Path) -> None:
    bare = Sandbox(tmp_path / "bare", bare=True)
    bare.add("rich", "12.0", "")
    for name in ("torch", "mpi4py", "h5py", "numpy", "rich", "xxhash"):
        wheel(tmp_path / "wheels", name, "99.0", {f"{name}/__init__.py": ""})
    env = offline(tmp_path / "wheels")
    command = doctor("--json", "--only", "packages", python=bare.python)
    before = findings(shell(command, env))
    assert before["packages.missing"]["why"] == "not installed: torch, mpi4py, h5py, numpy, xxhash"
    assert before["packages.old"]["why"] == "too old: rich 12.0 (needs 13)"
    fixes = [each["fix"] for each in before.values()]
    after = findings(shell("\n".join([*fixes, command]), env))
    assert after["packages"]["status"] == "PASS", after


@needs_mpi
@provokes("torch.broken", "mpi.missing", "kernels.broken", "hdf5.broken")
def test_checks_of_packages_that_are_missing(tmp_path: Path) -> None:
    """Each of them installs what it lacks itself, rather than what it would for another fault."""
    python = Sandbox(tmp_path / "bare", bare=True).python
    path = f"{Path(launcher.find_mpirun() or '').parent}:{os.environ['PATH']}"
    only = "torch,mpi,kernels,hdf5"
    found = findings(shell(doctor("--json", "--only", only, python=python), {"PATH": path}))
    fixes = {code: each["fix"].partition(" -m pip install ")[2] for code, each in found.items()}
    assert fixes == {
        "torch.broken": "'torch>=2.11'",
        "mpi.missing": "'mpi4py>=4.1'",
        "kernels.broken": "'numpy>=1.26'",
        "hdf5.broken": "'h5py>=3.10'",
    }


def small_checkout(target: Path) -> Path:
    """A checkout of its own with the kernels of sums alone, which are soon compiled."""
    forget = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("cuda", "hpcsync", "inputs"):
        shutil.copytree(ROOT / name, target / name, ignore=forget)
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    with (target / "setup.cfg").open("a") as settings:
        settings.write("\n[build_ext]\ndebug = 1\n")
    for path in (target / "cuda" / "cpu").glob("*.cpp"):
        if path.stem not in ("dispatch", "sums"):
            path.unlink()
    (target / "cuda" / "cpu" / "kernels.def").write_text('#include "sums.def"\n')
    return target


@needs_gxx
@pytest.mark.parametrize("code", ["kernels.missing", "kernels.broken"])
@provokes("kernels.missing", "kernels.broken")
def test_kernels(tmp_path: Path, code: str) -> None:
    """Not built, or built for another machine: a library that ends the process when it is used."""
    checkout = small_checkout(tmp_path / "checkout")
    sandbox = Sandbox(tmp_path / "sandbox")
    if code == "kernels.broken":
        wrong = tmp_path / "wrong.cpp"
        library = checkout / "hpcsync" / "libhpcsync_kernels.so"
        wrong.write_text('extern "C" int hpcsync_abi_version(void) { __builtin_trap(); }\n')
        subprocess.run(["g++", "-shared", "-fPIC", "-o", library, wrong], check=True)
    command = doctor("--json", "--only", "kernels", python=sandbox.python)
    fix = f"{sandbox.python} -m pip install"
    found = mended(code, f"cd {checkout}", command, fix=fix, env=offline(tmp_path / "none"))
    assert found["status"] == ("WARN" if code == "kernels.missing" else "FAIL")


# --- MPI ------------------------------------------------------------------------------------------


@needs_mpi
@provokes("mpi.missing")
def test_mpi_library_that_is_not_there() -> None:
    found = mended("mpi.missing", "export MPI4PY_LIBMPI=/nowhere/libmpi.so", fix="unset")
    assert "/nowhere/libmpi.so" in found["why"]


def has_own_mpi() -> bool:
    return (Path(sys.prefix) / "lib" / "libmpi.so.40").exists()


@needs_mpi
@pytest.mark.skipif(not has_own_mpi(), reason="MPI is no wheel here: pip install 'hpcsync[mpi]'")
@provokes("mpi.missing")
def test_mpi_library_beside_mpirun(tmp_path: Path) -> None:
    """In an environment without the wheel, but with its mpirun on PATH."""
    python = Sandbox(tmp_path / "sandbox").python
    command = doctor("--json", "--only", "mpi", python=python)
    path = f"{sys.prefix}/bin:{os.environ['PATH']}"
    mended("mpi.missing", "", command, fix="export MPI4PY_LIBMPI=", env={"PATH": path})


@needs_mpi
@provokes("mpi.threads")
def test_thread_level() -> None:
    setup = "export MPI4PY_RC_THREAD_LEVEL=funneled"
    found = mended("mpi.threads", setup, fix="unset MPI4PY_RC_THREAD_LEVEL")
    assert "THREAD_FUNNELED" in found["why"]


FAKE_MPI = """
import os, time
if os.environ.get("OMPI_MCA_pml") != "ob1":
    {fault}
THREAD_SINGLE, THREAD_FUNNELED, THREAD_SERIALIZED, THREAD_MULTIPLE = range(4)
def Query_thread(): return THREAD_MULTIPLE
def Get_library_version(): return "Fake MPI 1.0"
class Comm:
    def Get_size(self): return 1
COMM_WORLD = Comm()
"""


@pytest.mark.parametrize(
    ("code", "fault"), [("mpi.stuck", "time.sleep(600)"), ("mpi.broken", "os.abort()")]
)
@provokes("mpi.stuck", "mpi.broken")
def test_mpi_that_does_not_start(tmp_path: Path, code: str, fault: str) -> None:
    """As with a network that MPI tries, and that the fix leaves out."""
    fake = module(tmp_path, "mpi4py.MPI", FAKE_MPI.format(fault=fault))
    command = doctor("--json", "--only", "mpi", "--limit", "15")
    mended(code, "", command, fix="export OMPI_MCA_pml=ob1", env={"PYTHONPATH": f"{ROOT}:{fake}"})


@provokes("mpi.login")
def test_mpi_that_starts_in_a_job_only(tmp_path: Path) -> None:
    """A login node of a stand-in for Slurm, whose nodes have what MPI needs."""
    fake = module(tmp_path, "mpi4py.MPI", FAKE_MPI.format(fault="os.abort()"))
    listed = "if [ $1 = --mpi=list ]; then printf 'MPI plugin types are...\\n\\tpmix\\n'; exit; fi"
    run = '[ "$1 $2 $3" = "--mpi=pmix -n 1" ] && shift 3'
    job = 'SLURM_JOB_ID=7 OMPI_MCA_pml=ob1 exec "$@"'
    script(tmp_path / "bin", "srun", f"{listed}\n{run}\n{job}")
    env = {
        "PYTHONPATH": f"{ROOT}:{fake}",
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_CONF": "/x",
    }
    found = mended("mpi.login", fix="srun --mpi=pmix -n 1 ", env=env)
    assert found["status"] == "WARN"


@needs_mpi
@pytest.mark.parametrize(
    ("ranks", "number"), [(0, signal.SIGINT), (0, signal.SIGKILL), (2, signal.SIGTERM)]
)
def test_nothing_stays_behind_when_it_is_ended(
    tmp_path: Path, ranks: int, number: signal.Signals
) -> None:
    """While its child hangs in MPI."""
    began = tmp_path / "began"
    code = f"import time\nopen({str(began)!r}, 'w').close()\ntime.sleep(600)"
    fake = module(tmp_path, "mpi4py.MPI", code)
    command = [sys.executable, "-m", "hpcsync.doctor", "--only", "mpi", "--limit", "300"]
    start = launcher.mpirun(ranks) if ranks else []
    job = launcher.Job([*start, *command], env={"PYTHONPATH": f"{ROOT}:{fake}"})
    deadline = time.monotonic() + 120
    while not began.exists():
        assert time.monotonic() < deadline, job.wait(0.1).describe()
        time.sleep(0.05)
    job.signal(number)
    outcome = job.wait(60)
    outcome.assert_clean()
    assert "Traceback" not in outcome.text
    if not ranks:
        assert outcome.status == (130 if number == signal.SIGINT else -number)


@needs_mpi
@provokes("mpirun.missing")
def test_no_mpirun(tmp_path: Path) -> None:
    for name in ("sh", "env", "srun", "mkdir"):
        if shutil.which(name):
            (tmp_path / name).symlink_to(shutil.which(name))
    setup = "export PATH=/usr/bin:/bin"
    if shutil.which("mpirun", path="/usr/bin:/bin"):
        setup = f"export PATH={tmp_path}"
    mended("mpirun.missing", setup, fix="export PATH=")


@needs_mpi
@provokes("mpirun.other")
def test_mpirun_of_another_mpi(tmp_path: Path) -> None:
    script(tmp_path / "bin", "mpirun", "exit 1")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libmpi.so.40").touch()
    setup = f"export PATH={tmp_path}/bin:$PATH"
    found = mended("mpirun.other", setup, fix="export PATH=")
    assert str(tmp_path / "bin" / "mpirun") in found["why"]


@needs_mpi
@needs_root
@provokes("mpirun.root")
def test_mpirun_as_root() -> None:
    setup = "unset OMPI_ALLOW_RUN_AS_ROOT OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"
    mended("mpirun.root", setup, fix="export OMPI_ALLOW_RUN_AS_ROOT=1 ")


SINGLETONS = """
case "$1" in
--mpi=list) printf 'MPI plugin types are...\\n\\tnone\\n{listed}' ;;
*) if [ "$SLURM_MPI_TYPE" = pmix ]; then exec {mpirun} "$@"; fi
   for rank in 0 1; do
       SLURM_PROCID=$rank SLURM_STEP_NUM_TASKS=2 SLURM_LOCALID=$rank SLURM_JOB_ID=7 "$@"
   done ;;
esac
"""


@needs_mpi
@pytest.mark.parametrize("listed", ["\\tpmi2\\n\\tpmix\\n", ""], ids=["pmix", "none"])
@provokes("launch.singletons")
def test_srun_that_starts_singletons(tmp_path: Path, listed: str) -> None:
    """A stand-in for srun, whose ranks meet by PMIx only; a real one is in tests/slurm."""
    path = f"{tmp_path}:{Path(launcher.find_mpirun() or '').parent}:{os.environ['PATH']}"
    script(tmp_path, "srun", SINGLETONS.format(mpirun=mpirun(2), listed=listed))
    command = f"srun {doctor('--json', '--only', 'launch,nodes')}"
    found = findings(shell(command, {"PATH": path}))["launch.singletons"]
    assert found["status"] == "FAIL"
    assert "started 2 processes" in found["why"]
    begins = "export SLURM_MPI_TYPE=pmix" if listed else f"{Path(sys.prefix)}/bin/mpirun -n 2 "
    assert found["fix"].startswith(begins) or not has_own_mpi()
    then = command if listed else ""
    allowed = "export PRTE_MCA_rmaps_default_mapping_policy=:OVERSUBSCRIBE"
    after = findings(shell(f"{allowed}\n{found['fix']}\n{then}", {"PATH": path}))
    assert after["nodes"]["why"] == "2 ranks on 1 node (1 x 2)"
    assert "launch.singletons" not in after


@needs_mpi
@provokes("launch.size")
def test_ranks_that_are_not_all_there(tmp_path: Path) -> None:
    more = script(tmp_path, "more", 'OMPI_COMM_WORLD_SIZE=3 exec "$@"')
    command = doctor("--json", "--only", "launch,nodes")
    found = findings(shell(f"{mpirun(2)} {more} {command}"))["launch.size"]
    assert found["why"] == "mpirun started 3 ranks, but MPI sees 2"
    # As the fix says, with the flags that few cores need.
    after = findings(shell(f"{mpirun(3)} {found['fix'].partition(' -n 3 ')[2]}"))
    assert "launch.size" not in after
    assert after["nodes"]["why"] == "3 ranks on 1 node (1 x 3)"


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
