"""The commands of README and docs/, run as they are written, page by page, in a fresh checkout."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import documents, launcher
from tools import bootstrap

pytestmark = [pytest.mark.usefixtures("mpi"), pytest.mark.timeout(900)]

PAGES = [page for page in documents.pages() if any(b.kind == "sh" for b in documents.blocks(page))]
DOCTOR = re.compile(r"^python -m hpcsync\.doctor.*$", re.M)
DIGITS = importlib.util.find_spec("sklearn") is not None
# One node, shared memory only, whatever cores and interfaces the machine has.
ONE_NODE = {
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "self,sm",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}


def environment(folder: Path) -> None:
    """Make ``folder`` what ``bootstrap.py`` makes: this Python's own environment, by links."""
    prefix = Path(sys.prefix)
    if not (prefix / "pyvenv.cfg").exists():
        pytest.skip("not in a virtual environment: run python3 tools/bootstrap.py test")
    folder.mkdir()
    for entry in prefix.iterdir():
        if entry.name != bootstrap.STAMP:
            (folder / entry.name).symlink_to(entry)


def checkout(folder: Path) -> dict[str, str]:
    """Copy the checkout, as a newcomer has it after the set-up; the environment of a shell there.

    Only what pip would do is left out: ``bootstrap.py`` finds its environment ready.
    """
    ignore = shutil.ignore_patterns(".git", ".venv*", "runs", "build", "__pycache__", ".*_cache")
    shutil.copytree(documents.ROOT, folder, ignore=ignore)
    environment(folder / ".venv")
    path = f"{folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    env = launcher.environment({**ONE_NODE, "PATH": path, "PYTHONPATH": str(folder)})
    pins = subprocess.run(
        ["python3", "-c", "from tools import bootstrap; print(bootstrap.fingerprint())"],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    stamp = {"pins": pins, "extras": [*(["digits"] if DIGITS else []), "dev", "mpi", "test"]}
    (folder / ".venv" / bootstrap.STAMP).write_text(json.dumps(stamp))
    return env


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_run_as_they_are_written(page: Path, tmp_path: Path) -> None:
    commands = [c for b in documents.blocks(page) if b.kind == "sh" for c in b.commands()]
    if not DIGITS and any("digits" in command.split() for command in commands):
        pytest.skip("scikit-learn is missing: pip install 'hpcsync[digits]'")
    folder = tmp_path / "hpcsync"
    env = checkout(folder)
    script = ["set -euxo pipefail"]
    for block in documents.blocks(page):
        if block.file is not None:
            (folder / block.file).write_text(block.text)
        elif block.kind == "sh":
            # What doctor finds wrong here is no fault of the page.
            script.append(DOCTOR.sub(r"\g<0> || test $? = 1", block.text))
    job = launcher.Job(["bash", "-c", "\n".join(script)], env=env, cwd=folder)
    outcome = job.wait(timeout=840)
    outcome.assert_clean()
    assert outcome.status == 0, outcome.describe()
