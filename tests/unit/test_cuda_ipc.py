"""Sums over device memory that ranks share, on the double: ranks are threads, streams are slow."""

from __future__ import annotations

import numpy as np
import pytest

from hpcsync import schedules
from hpcsync.device import dtype_of
from hpcsync.schedules import Kind
from hpcsync.transports import cuda_ipc
from hpcsync.transports.base import Region, chunk_offsets
from hpcsync.transports.ipc_memory import IpcBuffer
from tests.double.shared import Array, Rank, job, total, values

STEPWISE = ("ring", "halving", "doubling")
LENGTHS = (0, 1, 17, 65, 1000, 4099)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("name", ["direct", *STEPWISE])
def test_every_schedule(name: str, kind: Kind, size: int) -> None:
    def work(rank: Rank) -> None:
        dtype = dtype_of("float32")
        for count in LENGTHS:
            region, truth = rank.region(count, dtype), total(size, count)
            schedule = schedules.build(name, kind, rank.rank, size)
            offsets = chunk_offsets(schedule, region)
            part = slice(offsets[schedule.owned[0]], offsets[schedule.owned[1]])
            if kind is Kind.ALLGATHER:
                brought = np.full(count, -77.0)
                brought[part] = truth[part]
                rank.put(region, brought)
            else:
                rank.put(region, values(rank.rank, count))
            program = rank.bind(name, kind, region)
            rank.drive(program)
            done = part if kind is Kind.REDUCE_SCATTER else slice(None)
            np.testing.assert_array_equal(rank.read(region)[done], truth[done])
            program.close()

    job(size, work, seed=(name, kind, size))


@pytest.mark.parametrize("one_shot", [0, cuda_ipc.ONE_SHOT])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "int8", "int64"])
def test_every_type(dtype: str, one_shot: int) -> None:
    def work(rank: Rank) -> None:
        region = rank.region(777, dtype_of(dtype))
        program = rank.bind("direct", Kind.ALLREDUCE, region)
        rank.put(region, values(rank.rank, 777))
        rank.drive(program)
        np.testing.assert_array_equal(rank.read(region), total(3, 777))

    job(3, work, one_shot=one_shot)


@pytest.mark.parametrize("seed", range(8))
def test_a_scattered_sum_and_a_gather_make_an_allreduce(seed: int) -> None:
    size = 3

    def work(rank: Rank) -> None:
        for owners in range(1, size + 1):
            region = rank.region(1001, dtype_of("float32"))
            scatter = rank.bind("direct", Kind.REDUCE_SCATTER, region, size, owners)
            gather = rank.bind("direct", Kind.ALLGATHER, region, 1, owners, released=True)
            for run in range(4):
                rank.put(region, values(rank.rank, 1001, run))
                rank.drive(scatter)
                rank.drive(gather)
                wanted = (total(size, 1001, run) / size).astype(np.float32)
                np.testing.assert_array_equal(rank.read(region), wanted)
                rank.join(region)

    job(size, work, seed=seed)


def test_both_ways_add_to_the_same_bits() -> None:
    def made(one_shot: int) -> Array:
        found: list[Array] = []

        def work(rank: Rank) -> None:
            region = rank.region(999, dtype_of("float32"))
            program = rank.bind("direct", Kind.ALLREDUCE, region, divisor=3)
            numbers = np.random.default_rng(rank.rank).standard_normal(999)
            rank.put(region, numbers)
            rank.drive(program)
            found.append(rank.read(region))

        job(4, work, one_shot=one_shot)
        for each in found[1:]:
            np.testing.assert_array_equal(found[0], each)
        return found[0]

    np.testing.assert_array_equal(made(0), made(cuda_ipc.ONE_SHOT))


def test_programs_without_room_for_copies_go_the_other_way() -> None:
    def work(rank: Rank) -> None:
        buffer = rank.transport.allocate(1 << 16, 64)
        assert isinstance(buffer, IpcBuffer)
        stream = rank.device.stream()
        region = Region(buffer, 0, 1 << 14, dtype_of("float32"), stream=stream)
        kinds = [type(rank.bind("direct", Kind.ALLREDUCE, region)).__name__ for _ in range(12)]
        assert set(kinds) == {"_OneShot", "_Direct"}
        assert kinds == sorted(kinds, reverse=True)

    job(2, work, one_shot=1 << 17)


def test_memory_is_freed_once_no_rank_needs_it() -> None:
    def work(rank: Rank) -> None:
        def freed() -> int:
            free = rank.device.machine.pool.free
            return sum(len(slabs) for (kind, _), slabs in free.items() if kind == "shared")

        def another(count: int = 5000) -> Region:
            region = rank.region(count, dtype_of("float32"))
            rank.drive(rank.bind("direct", Kind.ALLREDUCE, region))
            return region

        first = another()
        second = another()
        if rank.rank == 0:
            del first
        third = another()
        assert freed() == 0, "rank 1 still has the first"
        if rank.rank == 1:
            del first
        fourth = another(6000)
        rank.transport.allocate(1, 1)  # after it all ranks have freed
        assert freed() == 2
        for region in (second, third, fourth):
            assert not rank.read(region).any()

    job(2, work)


def test_a_buffer_begins_with_zeros() -> None:
    def work(rank: Rank) -> None:
        for count in (1, 5000):
            assert not rank.read(rank.region(count, dtype_of("float32"))).any()

    job(4, work)
