"""Faults of GPUs that fakes provoke: each is found, its fix is followed, and the check passes."""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpcsync.device_probe import kept
from hpcsync.device_probe.attempt import Outcome
from hpcsync.doctor import gpu, ranks, software
from hpcsync.doctor.base import Status, System
from hpcsync.doctor.facts import Facts, gather
from tests import faults, probed
from tests.doctor import Sandbox, mended_here, module, offline, provokes, script, wheel
from tests.unit.test_cuda_state import CUPY, TORCH

driver = pytest.importorskip("tests.unit.test_cuda_state").driver


def system(env: dict[str, str] | None = None, **options: Any) -> System:
    """This one, less any job, with a device that is a fake and ``options`` in its place."""
    return faults.system(env, **{"device": probed.SPEC, **options})


@pytest.fixture
def gpus(tmp_path: Path) -> Path:
    return faults.two_gpus(tmp_path / "root")


# ---- what is tried -------------------------------------------------------------------------------


@pytest.mark.usefixtures("mpi")
def test_a_gpu_that_does_all_it_should(gpus: Path) -> None:
    here = system(root=gpus)
    found = [*gpu.device(here), *gpu.sharing(here), *gpu.mpi(here)]
    assert [each.code for each in found] == ["gpu", "gpu_ipc", "gpu_mpi"]
    assert {each.status for each in found} == {Status.PASS}
    assert "unharmed" in found[2].why


def test_no_gpu(tmp_path: Path, gpus: Path) -> None:
    checks = (gpu.device, gpu.sharing, gpu.mpi)
    for check in checks:
        assert [each.why for each in check(system(root=tmp_path / "none"))] == ["no GPU here"]
    from hpcsync import config as configs

    on_cpu = system(root=gpus, config=configs.load(None, ["train.device=cpu"]))
    for check in checks:
        assert [each.why for each in check(on_cpu)] == ["not used: train.device is cpu"]


@pytest.mark.parametrize("fault", ["start crash", "start hang", "sums crash"])
@provokes("gpu.broken")
def test_a_gpu_that_does_not_answer(gpus: Path, fault: str, tmp_path: Path) -> None:
    """Without GPUs the device says that there is none, and other checks why."""
    folder = tmp_path / "fake"
    text = (
        "import os\nfrom tests import probed\n"
        "class Device(probed.FileDevice):\n"
        "    def __init__(self, index):\n"
        "        if os.environ.get('CUDA_VISIBLE_DEVICES') == '':\n"
        "            raise RuntimeError('no GPU')\n"
        "        super().__init__(index)\n"
        "    def stream(self):\n"
        "        probed.go_wrong('sums')\n"
        "        return super().stream()\n"
    )
    module(folder, "fakedevice", text)
    env = {"FAULT": fault, "PYTHONPATH": str(folder)}
    here = system(env, root=gpus, device="fakedevice:Device", limit_s=15)
    found = mended_here(gpu.device, "gpu.broken", here, fix="export CUDA_VISIBLE_DEVICES=")
    assert ("did not end in 15 s" in found.why) == fault.endswith("hang")
    assert found.status == Status.FAIL


def test_a_gpu_that_cannot_be_opened_is_for_other_checks(gpus: Path) -> None:
    here = system({"FAULT": "start raise"}, root=gpus)
    for check in (gpu.device, gpu.sharing, gpu.mpi):
        (found,) = check(here)
        assert found.status == Status.PASS
        assert found.why.startswith("not tried: opening the device: the child ")


@provokes("gpu_ipc.refused")
def test_memory_that_other_processes_cannot_open(gpus: Path) -> None:
    here = system({"FAULT": "opening raise"}, root=gpus)
    fix = "doctor comm.transport.node=mpi_staged"
    found = mended_here(gpu.sharing, "gpu_ipc.refused", here, fix=fix)
    assert "another process: DeviceError: it cannot be done" in found.why


@pytest.mark.usefixtures("mpi")
@pytest.mark.parametrize("how", ["crash", "wrong"])
@provokes("gpu_mpi.staged")
def test_mpi_that_does_not_take_gpu_memory(gpus: Path, tmp_path: Path, how: str) -> None:
    said = "mca:opal:base:param:opal_built_with_cuda_support:value:true"
    script(tmp_path / "bin", "ompi_info", f"echo {said}")
    env = {"FAULT": f"mpi {how}", "FAULT_UNLESS": "AWARE"}
    env["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    here = system(env, root=gpus)

    def then(mended: System) -> System:
        """Told in another way: an Open MPI that lacks CUDA, as that of the tests may, refuses."""
        given = {key: value for key, value in mended.env.items() if "OMPI_MCA_" not in key}
        return replace(mended, env={**given, "AWARE": mended.env["OMPI_MCA_opal_cuda_support"]})

    found = mended_here(gpu.mpi, "gpu_mpi.staged", here, fix="export OMPI_MCA_", then=then)
    assert ("SIGSEGV" in found.why) == (how == "crash")
    assert "giving device memory" in found.why or "bytes came out wrong" in found.why


@pytest.mark.usefixtures("mpi")
def test_mpi_that_was_built_without_cuda(gpus: Path, tmp_path: Path) -> None:
    said = "mca:opal:base:param:opal_built_with_cuda_support:value:false"
    script(tmp_path / "bin", "ompi_info", f"echo {said}")
    env = {"FAULT": "mpi crash", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    (found,) = gpu.mpi(system(env, root=gpus))
    assert found.status is Status.PASS
    assert "built without CUDA" in found.why


@provokes("gpu.stale")
def test_jobs_that_go_by_an_answer_that_is_no_longer_true(gpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    path = kept.path_of(socket.gethostname(), cache / "hpcsync")
    kept.write(path, {}, {"sharing": Outcome("it was refused")})
    here = system({"XDG_CACHE_HOME": str(cache)}, root=gpus)
    mended_here(gpu.sharing, "gpu.stale", here, fix="rm -f ")
    assert not path.exists()


# ---- torch, driver and CuPy ----------------------------------------------------------------------

AVAILABLE = (
    "class Cuda:\n"
    "    def is_available(self): return True\n"
    "    def device_count(self): return 2\n"
    "    def get_device_name(self, index): return 'Fake GPU'\n"
    "cuda = Cuda()\n"
)
RIGHT = CUPY.format(compiler="return 13, 0", version=13000)


def with_driver(driver: Path, folder: Path, cupy: str = RIGHT, **env: str) -> dict[str, str]:
    """An environment with a fake driver, torch and CuPy."""
    fake = module(folder, "torch", TORCH + AVAILABLE)
    if cupy:
        module(fake, "cupy", cupy)
    return {"LD_LIBRARY_PATH": str(driver), "PYTHONPATH": str(fake), **env}


@provokes("torch.exclusive", "torch.prohibited")
@pytest.mark.parametrize(("mode", "code"), [("3", "torch.exclusive"), ("2", "torch.prohibited")])
def test_a_gpu_in_a_mode_of_its_own(
    tmp_path: Path, gpus: Path, driver: Path, mode: str, code: str
) -> None:
    tool = 'test "$*" = "-i 0 -c DEFAULT"'
    script(tmp_path / "bin", "nvidia-smi", tool)
    env = with_driver(driver, tmp_path / "fake", FAKE_CUDA_MODE=mode, FAKE_CUDA_COUNT="1")
    env["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    here = system(env, root=gpus, user=0)

    def then(mend: System) -> System:
        return system({**env, "FAKE_CUDA_MODE": "0"}, root=gpus, user=0)

    mended_here(software.torch, code, here, fix="nvidia-smi -i 0 -c DEFAULT", then=then)


@provokes("torch.other_cupy")
def test_cupy_for_another_cuda(tmp_path: Path, gpus: Path, driver: Path) -> None:
    sandbox = Sandbox(tmp_path / "sandbox")
    sandbox.add("torch", "2.11.0", TORCH + AVAILABLE)
    about = "cupy/__init__.py"
    other = CUPY.format(compiler="return 13, 0", version=12090)
    wheel(tmp_path / "wheels", "cupy_cuda12x", "13.6", {about: other})
    wheel(tmp_path / "wheels", "cupy_cuda13x", "13.6", {about: RIGHT})
    env = {**offline(tmp_path / "wheels"), "LD_LIBRARY_PATH": str(driver)}
    here = system(env, root=gpus, python=str(sandbox.python))
    installed = here.call(str(sandbox.python), "-m", "pip", "install", "cupy-cuda12x")
    assert installed.ok, installed.err
    found = mended_here(software.torch, "torch.other_cupy", here)
    assert found.why == "CuPy 13.6.0 is for CUDA 12, but torch 2.11.0 for CUDA 13.0"
    assert "-m pip uninstall -y cupy-cuda12x && " in found.fix


@provokes("torch.no_driver")
def test_a_gpu_without_a_driver(tmp_path: Path) -> None:
    root = tmp_path / "root"
    bus = root / "sys" / "bus" / "pci" / "devices"
    for name, vendor, kind in (
        ("0000:00:01.0", "0x8086", "0x030000"),
        ("0000:00:02.0", "0x10de", "0x040300"),
        ("0000:41:00.0", "0x10de", "0x030200"),
    ):
        (bus / name).mkdir(parents=True)
        (bus / name / "vendor").write_text(f"{vendor}\n")
        (bus / name / "class").write_text(f"{kind}\n")
    (root / "dev").mkdir()
    script(tmp_path / "bin", "apt-get", f"test $3 = nvidia-driver && touch {root}/dev/nvidia0")
    fake = module(tmp_path / "fake", "torch", TORCH + AVAILABLE)
    module(fake, "cupy", RIGHT)
    env = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "PYTHONPATH": str(fake)}
    here = system(env, root=root, user=0)
    fix = "apt-get install -y nvidia-driver"
    found = mended_here(software.torch, "torch.no_driver", here, fix=fix)
    assert "0000:41:00.0" in found.why


# ---- several ranks -------------------------------------------------------------------------------


def judged(*ranks_see: list[str], words: tuple[str, ...] = ()) -> list[str]:
    from hpcsync import config as configs

    here = system(config=configs.load(None, list(words)))
    every = [Facts(rank=rank, host="h", gpus=gpus) for rank, gpus in enumerate(ranks_see)]
    found = [each for _, each in ranks.judge(here, every) if each.check == "gpu"]
    for each in found:
        assert each.fix.startswith("mpirun -n "), each
    return [each.why for each in found]


@provokes("gpu.shared")
def test_two_ranks_on_one_gpu() -> None:
    (why,) = judged(["a"], ["a"])
    assert why == "h has 2 ranks but 1 GPU for them: two on one would wait for each other"
    assert judged(["a"], ["a"], words=("topology.share_devices=true",)) == []
    assert judged(["a"], ["b"]) == judged(["a", "b"], ["a", "b"]) == judged([], []) == []


def test_the_gpus_that_a_rank_sees(tmp_path: Path, gpus: Path, driver: Path) -> None:
    here = system({"LD_LIBRARY_PATH": str(driver)}, root=gpus, python=sys.executable)
    assert gather(here).gpus == ["28" * 16, "29" * 16]
    assert gather(system(root=tmp_path / "none")).gpus == []
    assert json.dumps(gather(here).gpus)
