"""The launcher environment itself: what every other MPI test takes for granted."""

from __future__ import annotations

import os

import pytest
from mpi4py import MPI

pytestmark = pytest.mark.mpi


def test_ranks_are_one_job(comm: MPI.Intracomm) -> None:
    assert comm.size == int(os.environ.get("OMPI_COMM_WORLD_SIZE", comm.size))
    assert sorted(comm.allgather(comm.rank)) == list(range(comm.size))


def test_threads_may_call_mpi() -> None:
    assert MPI.Query_thread() == MPI.THREAD_MULTIPLE
