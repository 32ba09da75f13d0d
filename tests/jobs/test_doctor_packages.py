"""The doctor finds packages and kernels that are missing, old or broken; its commands mend them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import launcher
from tests.doctor import (
    ROOT,
    Sandbox,
    doctor,
    findings,
    mended,
    needs_gxx,
    needs_mpi,
    offline,
    provokes,
    shell,
    wheel,
)

pytestmark = pytest.mark.timeout(300)


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
    names = ["setup.py", "build_kernels.py", "setup.cfg", "pyproject.toml", "MANIFEST.in"]
    for name in [*names, "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, target)
    with (target / "setup.cfg").open("a") as settings:
        settings.write("\n[build_ext]\ndebug = 1\n")
    for path in (target / "cuda" / "cpu").glob("*.cpp"):
        if path.stem not in ("dispatch", "sums"):
            path.unlink()
    (target / "cuda" / "cpu" / "kernels.def").write_text('#include "sums.def"\n')
    return target


@needs_gxx
@provokes("kernels.missing", "kernels.broken")
def test_kernels(tmp_path: Path) -> None:
    """Not built, then built for another machine: a library that ends the process when it is
    used."""
    checkout = small_checkout(tmp_path / "checkout")
    sandbox = Sandbox(tmp_path / "sandbox")
    command = doctor("--json", "--only", "kernels", python=sandbox.python)
    begins = {"fix": f"{sandbox.python} -m pip install", "env": offline(tmp_path / "none")}
    assert mended("kernels.missing", f"cd {checkout}", command, **begins)["status"] == "WARN"

    library = checkout / "hpcsync" / "libhpcsync_kernels.so"
    assert library.exists()
    wrong = tmp_path / "wrong.cpp"
    wrong.write_text('extern "C" int hpcsync_abi_version(void) { __builtin_trap(); }\n')
    library.unlink()
    subprocess.run(["g++", "-shared", "-fPIC", "-o", library, wrong], check=True)
    assert mended("kernels.broken", f"cd {checkout}", command, **begins)["status"] == "FAIL"
