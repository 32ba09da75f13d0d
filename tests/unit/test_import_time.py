"""What must start at once imports nothing heavy: neither torch, nor MPI, nor NumPy."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "mpi4py", "numpy", "h5py", "rich", "sklearn", "scipy", "cupy"}


def imported(code: str) -> set[str]:
    """Top-level names of the modules that ``code`` leaves imported."""
    epilogue = "print('\\n' + json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    program = f"import atexit, json, sys\natexit.register(lambda: {epilogue})\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import hpcsync", id="import"),
        pytest.param("import hpcsync.config as c; c.load(None)", id="config"),
        pytest.param("import hpcsync; dir(hpcsync)", id="dir"),
    ],
)
def test_import_is_light(code: str) -> None:
    assert not imported(code) & HEAVY


@pytest.mark.parametrize("arguments", [["--help"], ["--explain", "comm.bucket_mb"]])
def test_help_is_light(arguments: list[str]) -> None:
    code = (
        "import runpy\n"
        f"sys.argv = ['hpcsync.train', *{arguments!r}]\n"
        "runpy.run_module('hpcsync.train', run_name='__main__', alter_sys=True)"
    )
    assert not imported(code) & HEAVY
