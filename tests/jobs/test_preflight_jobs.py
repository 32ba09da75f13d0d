"""preflight under mpirun, with ranks that do not answer."""

from __future__ import annotations

import json
import sys

import pytest

from tests import launcher

pytestmark = [pytest.mark.usefixtures("mpi"), pytest.mark.timeout(400)]

# The command, in which rank 1 sleeps at its first exchange, until its partner gives it up or for
# ever, or dies.
SLEEPS = """
import os, signal, sys, time
from hpcsync.preflight import wire
from hpcsync.preflight.__main__ import main

once = wire.Wire._greet

def sleeps(self, other):
    if self._rank == 1:
        wire.Wire._greet = once
        if sys.argv[1] == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        while sys.argv[1] == "ever" or not self._comm.Iprobe(other, wire._STOP):
            time.sleep(0.01)
    return once(self, other)

wire.Wire._greet = sleeps
main(sys.argv[2:])
"""
WORDS = ("--json", "--save", "", "--slow", "1e-9", "--ranks-per-node", "1", "--timeout", "24")


def outcome(how: str) -> launcher.Outcome:
    """Three nodes of one rank, all on this machine."""
    command = [*launcher.mpirun(3), sys.executable, "-c", SLEEPS, how, *WORDS]
    return launcher.Job(command).wait(timeout=300)


def test_a_rank_that_comes_back_is_named_and_the_job_ends_well() -> None:
    found = outcome("late")
    found.assert_clean()
    assert found.status == 4, found.describe()
    told = json.loads(found.stdout)
    assert len(told["exclude"]) == 1
    assert told["exclude"] == [told["nodes"][1]["name"]]
    assert "nothing has come from rank 1 to rank " in found.stderr


def test_a_rank_that_never_comes_back_is_told_and_ends_the_job() -> None:
    found = outcome("ever")
    found.assert_clean()
    assert found.status == 1, found.describe()
    (first, *_) = [line for line in found.stderr.splitlines() if "nothing has come" in line]
    assert "from rank 1 to rank " in first
    assert "rank 1 is on " in first
    assert "a rank is missing" in json.loads(found.stdout)["error"]


def test_a_rank_that_dies_is_an_error_for_programs() -> None:
    found = outcome("dies")
    found.assert_clean()
    assert found.status not in (0, 4), found.describe()
    assert "a rank died" in json.loads(found.stdout)["error"]
