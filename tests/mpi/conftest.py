"""The ranks of the MPI suite agree on the outcome of each test.

A test passes when it passes on every rank. After it the ranks tell each other how it went, over a
communicator of their own, and rank 0 reports what failed where. If a rank failed and another does
not get to the end of the test within ``STUCK_S`` (it waits in a collective for the failed one),
the failed rank prints its failure and aborts the job.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import pytest_timeout
from _pytest.reports import TestReport
from _pytest.runner import runtestprotocol
from _pytest.terminal import TerminalReporter
from mpi4py import MPI

STUCK_S = 10.0
WORLD = MPI.COMM_WORLD.Dup()
# Where this rank's stderr goes while pytest captures.
STDERR = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Rank 0 alone reports."""
    config.stash[STDERR] = os.dup(2)
    if WORLD.rank == 0:
        return
    manager = config.pluginmanager
    if (reporter := manager.get_plugin("terminalreporter")) is not None:
        manager.unregister(reporter)
        quiet = TerminalReporter(config, open(os.devnull, "w"))  # noqa: SIM115
        manager.register(quiet, "terminalreporter")


def pytest_timeout_set_timer(item: pytest.Item, settings: pytest_timeout.Settings) -> bool:
    """Past its time a test's stack is printed and the job ends.

    A watchdog in C does it: a rank stuck in MPI runs no Python, neither signal nor thread.
    """
    stderr = item.config.stash[STDERR]
    faulthandler.dump_traceback_later(settings.timeout, exit=True, file=stderr)
    return True


def pytest_timeout_cancel_timer() -> bool:
    """The test ended in time."""
    faulthandler.cancel_dump_traceback_later()
    return True


def pytest_collection_finish(session: pytest.Session) -> None:
    """Every rank must run the same tests, or they would wait for each other for ever."""
    names = WORLD.allgather([item.nodeid for item in session.items])
    if any(other != names[0] for other in names):
        pytest.exit("the ranks collected different tests", returncode=1)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A module that does not import on a rank other than 0 would go unseen."""
    if report.failed and WORLD.rank != 0:
        print(f"rank {WORLD.rank}: {report.nodeid}\n{report.longreprtext}", file=sys.stderr)


def _failure(reports: list[TestReport]) -> str:
    return "\n".join(report.longreprtext for report in reports if report.failed)


def _wait(failure: str, nodeid: str) -> None:
    """Wait for every rank to end the test; abort the job if this rank failed and one is stuck."""
    barrier = WORLD.Ibarrier()
    deadline = time.monotonic() + STUCK_S
    pause = 1e-4
    while not barrier.Test():
        if failure and time.monotonic() > deadline:
            print(
                f"\nrank {WORLD.rank} failed in {nodeid}, and another rank did not get to its "
                f"end within {STUCK_S:.0f} s; aborting the job\n{failure}",
                file=sys.stderr,
                flush=True,
            )
            MPI.COMM_WORLD.Abort(1)
        time.sleep(pause)
        pause = min(2 * pause, 0.01)


def _agree(reports: list[TestReport], nodeid: str) -> None:
    """Fail the test on every rank if it failed on one, and show all failures on each."""
    failure = _failure(reports)
    _wait(failure, nodeid)
    failures = WORLD.allgather(failure)
    ranks_of: dict[str, list[int]] = {}
    for rank, text in enumerate(failures):
        if text:
            ranks_of.setdefault(text, []).append(rank)
    if not ranks_of or WORLD.size == 1:
        return
    text = "\n".join(f"on rank {ranks}:\n{text}" for text, ranks in ranks_of.items())
    calls = [report for report in reports if report.when == "call"]
    bad = next((report for report in reports if report.failed), (calls or reports)[0])
    bad.outcome = "failed"
    bad.longrepr = text


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Run a test, agree, then report."""
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, log=False, nextitem=nextitem)
    # From here on this rank only waits: the rank that is stuck must be the one to show its stack.
    faulthandler.cancel_dump_traceback_later()
    _agree(reports, item.nodeid)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


@pytest.fixture
def comm() -> Iterator[MPI.Intracomm]:
    """A communicator of all ranks for one test alone."""
    own = MPI.COMM_WORLD.Dup()
    yield own
    own.Free()


@pytest.fixture
def folder(comm: MPI.Intracomm, tmp_path: Path) -> Path:
    """A folder that all ranks share."""
    shared: Path = comm.bcast(tmp_path)
    return shared
