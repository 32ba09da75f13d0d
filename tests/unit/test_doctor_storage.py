"""Run folders and HDF5 with faults.

Each fault is found, its fix is followed as a shell would, and then the check passes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hpcsync.doctor import storage
from hpcsync.doctor.base import Status
from tests.doctor import Sandbox, mended_here, module, offline, provokes, wheel
from tests.faults import running_in, system


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    """A bad folder of runs, and a good one that SCRATCH names."""
    for name in ("bad", "good"):
        (tmp_path / name).mkdir()
    return {"SCRATCH": str(tmp_path / "good")}


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
def test_wrong_h5py(tmp_path: Path, code: str, text: str) -> None:
    sandbox = Sandbox(tmp_path / "sandbox")
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
    tmp_path: Path, folders: dict[str, str], code: str, fault: str
) -> None:
    """It has told its version when its first look into the folder hangs, or ends it."""
    text = (
        "import os, tempfile, time\nmkdtemp = tempfile.mkdtemp\n"
        "def fail(*args, **options):\n"
        f"    if str(options['dir']).endswith('bad'): {fault}\n"
        "    return mkdtemp(*args, **options)\ntempfile.mkdtemp = fail\n"
    )
    right = H5PY.format(mpi=False)
    sandbox = Sandbox(tmp_path / "sandbox")
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
