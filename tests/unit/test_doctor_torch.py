"""torch and CuPy that do not fit the machine or its GPUs.

Each fault is found, its fix is followed as a shell would, and then the check passes.
"""

from __future__ import annotations

import dataclasses
import shutil
import uuid
from pathlib import Path

import pytest

from hpcsync.doctor import software
from hpcsync.doctor.base import System
from tests.doctor import Sandbox, mended_here, module, offline, provokes, wheel
from tests.faults import system, two_gpus

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
    return two_gpus(tmp_path / "root")


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
