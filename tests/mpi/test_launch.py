"""What the ranks of a job agree on at its start and at its end."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import numpy as np
import pytest
from mpi4py import MPI

from hpcsync import launch
from hpcsync import runtime as runtime_module
from hpcsync.config import TopologyConfig
from hpcsync.errors import ConfigError, DataError, ModelError, UserError
from hpcsync.launch import AgreedError, Runtime
from hpcsync.topology import Topology

pytestmark = pytest.mark.mpi

RANK, SIZE = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
LAST = SIZE - 1


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    with launch.start(TopologyConfig()) as started:
        yield started


def test_start(runtime: Runtime) -> None:
    assert (runtime.rank, runtime.size) == (RANK, SIZE)
    assert runtime.host == socket.gethostname()
    assert runtime.topology.names == (runtime.host,)
    assert (runtime.local_rank, runtime.local_size) == (RANK, SIZE)
    assert MPI.Comm.Compare(runtime.comm, MPI.COMM_WORLD) == MPI.CONGRUENT


def test_pretended_nodes() -> None:
    with launch.start(TopologyConfig(ranks_per_node=1)) as runtime:
        assert runtime.topology.node_count == SIZE
        assert runtime.local_rank == 0


def test_what_the_banner_tells() -> None:
    assert launch.thread_level() == "THREAD_MULTIPLE"
    name, path = launch.mpi_library()
    assert name
    assert "\n" not in name
    assert "/libmpi" in path


def test_groups_keep_their_order(runtime: Runtime) -> None:
    backwards = tuple(range(SIZE))[::-1]
    group = runtime.group(backwards)
    assert group.allgather(RANK) == list(backwards)
    group.Free()
    halves = runtime.group([rank for rank in range(SIZE) if rank % 2 == RANK % 2])
    assert halves.allgather(RANK) == [rank for rank in range(SIZE) if rank % 2 == RANK % 2]
    halves.Free()
    none = runtime.group([0]) if RANK == 0 else runtime.group([])
    assert none.size == 1
    none.Free()


@pytest.mark.parametrize("piece", [1, 24, 1 << 30])
def test_what_is_more_than_a_count_holds_goes_in_pieces(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(runtime_module, "_PIECE_BYTES", piece)
    for op, truth in (("sum", SIZE * LAST / 2), ("max", LAST), ("min", 0)):
        array = np.arange(14.0).reshape(2, 7) * RANK
        runtime.allreduce_array(array, op)
        assert np.array_equal(array, np.arange(14.0).reshape(2, 7) * truth)
    runtime.allreduce_array(np.zeros(0), "sum")
    mine = np.arange(5) + RANK
    runtime.broadcast_array(mine, LAST)
    assert mine.tolist() == [LAST + place for place in range(5)]
    assert runtime.allgather_object("x" * RANK) == ["x" * rank for rank in range(SIZE)]
    assert runtime.bcast(RANK, LAST) == LAST


def test_agreeing_on_nothing_goes_on(runtime: Runtime) -> None:
    runtime.agree()
    runtime.agree(None)


@pytest.mark.parametrize("kind", [UserError, ModelError, DataError, ConfigError])
def test_a_problem_of_one_rank_is_everyones(runtime: Runtime, kind: type[UserError]) -> None:
    problem = kind("no such file") if RANK == LAST else None
    with pytest.raises(kind) as told:
        runtime.agree(problem)
    assert isinstance(told.value, AgreedError)
    assert str(told.value) == ("no such file" if SIZE == 1 else f"rank {LAST}: no such file")


def test_the_lowest_rank_speaks(runtime: Runtime) -> None:
    with pytest.raises(AgreedError) as told:
        runtime.agree(ModelError(f"of rank {RANK}"))
    assert str(told.value) == "of rank 0"


def test_a_problem_that_is_no_users_error_keeps_its_name(runtime: Runtime) -> None:
    with pytest.raises(AgreedError, match="ZeroDivisionError: mine"):
        runtime.agree(ZeroDivisionError("mine") if RANK == LAST else None)


def test_what_was_agreed_on_may_be_agreed_on_again(runtime: Runtime) -> None:
    with pytest.raises(AgreedError) as told:
        runtime.agree(ModelError("wrong"))
    with pytest.raises(ModelError, match="wrong") as again:
        runtime.agree(told.value)
    assert isinstance(again.value, AgreedError)


def test_closing_goes_backwards_and_once() -> None:
    done: list[int] = []
    runtime = Runtime(MPI.COMM_WORLD.Dup(), Topology.group(["host"] * SIZE), 60.0)
    for number in range(3):
        runtime.on_close(lambda number=number: done.append(number))
    runtime.close()
    runtime.close()
    assert done == [2, 1, 0]


def test_an_error_leaves_a_runtime_open_unless_all_know_of_it() -> None:
    for error, closed in ((RuntimeError("mine"), False), (AgreedError("ours"), True)):
        done: list[int] = []
        runtime = Runtime(MPI.COMM_WORLD.Dup(), Topology.group(["host"] * SIZE), 60.0)
        runtime.on_close(lambda done=done: done.append(1))
        with pytest.raises(type(error)), runtime:
            raise error
        assert bool(done) == closed
        runtime.close()
