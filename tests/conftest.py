"""What every test shares: marks that say what they lack, and the MPI suite kept for mpirun.

``pytest`` alone runs the unit tests here and starts the MPI suite itself (test_mpi_suite.py).
To work on one MPI test: ``mpirun -n 2 python -m pytest tests/mpi/test_x.py --with-mpi``.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

from tests import launcher

HERE = Path(__file__).resolve().parent
SUMMARIES = pytest.StashKey[list[str]]()

# Timing is never asserted, and the ranks of a job must draw the same examples.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("mpi", deadline=None, derandomize=True, database=None)


@functools.cache
def _lacks_cluster() -> str | None:
    if os.geteuid() != 0:
        return "network namespaces need root"
    lacking = [tool for tool in ("ip", "tc", "unshare") if shutil.which(tool) is None]
    if lacking:
        return f"{', '.join(lacking)} missing: apt-get install iproute2 util-linux"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode:
        return "this kernel or container does not allow network namespaces"
    return launcher.missing()


@functools.cache
def _lacks_slurm() -> str | None:
    tools = ("slurmctld", "slurmd", "munged", "srun", "unshare")
    lacking = [tool for tool in tools if shutil.which(tool) is None]
    if lacking:
        return (
            f"{', '.join(lacking)} missing: apt-get install slurm-wlm munge libpmix2 libpmix-dev "
            "util-linux"
        )
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root"
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True, check=False).returncode:
        return "this kernel or container does not allow UTS namespaces"
    return launcher.missing()


@functools.cache
def _lacks_gpu() -> str | None:
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is missing: pip install 'hpcsync[cuda12]' or 'hpcsync[cuda13]'"
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


LACKS: dict[str, Callable[[], str | None]] = {
    "cluster": _lacks_cluster,
    "slurm": _lacks_slurm,
    "gpu": _lacks_gpu,
}


def pytest_configure(config: pytest.Config) -> None:
    """Choose hypothesis' profile and make room for the MPI suite's summaries."""
    hypothesis.settings.load_profile("mpi" if config.getoption("with_mpi") else "default")
    config.stash[SUMMARIES] = []


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave tests/mpi to mpirun: here it would be N times one rank."""
    under_mpi = config.getoption("with_mpi")
    return True if collection_path == HERE / "mpi" and not under_mpi else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the unit tests first; skip what this machine cannot run, and say what it lacks.

    Raises:
        UsageError: it lacks what tests need whose mark is in HPCSYNC_NEED, as in "cluster,slurm".
    """
    items.sort(key=lambda item: HERE / "unit" not in item.path.parents)
    for item in items:
        for mark, lacks in LACKS.items():
            if item.get_closest_marker(mark) and (reason := lacks()):
                if launcher.needed(mark):
                    raise pytest.UsageError(f"HPCSYNC_NEED names {mark}, but {reason}")
                item.add_marker(pytest.mark.skip(reason=f"{mark}: {reason}"))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Show how many tests each run of the MPI suite held."""
    for line in config.stash[SUMMARIES]:
        terminalreporter.write_line(line)


@pytest.fixture
def summarise(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Add a line to what pytest prints at its end."""
    return request.config.stash[SUMMARIES].append


@pytest.fixture
def mpi() -> None:
    """Skip the test where no MPI job can be started."""
    if reason := launcher.missing():
        pytest.skip(reason)
