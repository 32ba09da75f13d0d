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
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests import launcher

HERE = Path(__file__).resolve().parent
SUMMARY = "summary"

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
    """Choose hypothesis' profile."""
    hypothesis.settings.load_profile("mpi" if config.getoption("with_mpi") else "default")


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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """With ``-n``: unit tests on all workers, then what starts jobs on one, one after the other."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if nodeid.startswith("tests/unit/") else "the machine"

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show how many tests each run of the MPI suite held."""
    for report in chain(*terminalreporter.stats.values()):
        if getattr(report, "when", None) == "call":
            for line in (line for name, line in report.user_properties if name == SUMMARY):
                terminalreporter.write_line(line)


@pytest.fixture
def summarise(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Add a line to what pytest prints at its end."""
    return lambda line: request.node.user_properties.append((SUMMARY, line))


@pytest.fixture
def mpi() -> None:
    """Skip the test where no MPI job can be started."""
    if reason := launcher.missing():
        pytest.skip(reason)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch's own threads would only fight for the cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
