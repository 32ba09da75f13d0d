"""Every schedule over every transport, against sums made by NumPy in float64.

Values are small whole numbers, so that sums are exact in every type and any order.
"""

from __future__ import annotations

import errno
import os
import random
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from hpcsync import schedules
from hpcsync.collectives.progress import Progress
from hpcsync.device import DType, dtype_of, get
from hpcsync.device.cpu import narrow, widen
from hpcsync.schedules import Kind
from hpcsync.transports import mapped
from hpcsync.transports.base import (
    Program,
    Region,
    Transport,
    Wait,
    chunk_offsets,
    private_buffer,
)
from hpcsync.transports.mpi_host import MpiHost
from hpcsync.transports.shared_memory import SharedMemory, SharedMemoryError

pytestmark = pytest.mark.mpi

Array = np.ndarray[Any, Any]

STEPWISE = ("direct", "ring", "halving", "doubling")
DTYPES = (
    "bfloat16",
    "float16",
    "float32",
    "float64",
    "int8",
    "uint8",
    "int16",
    "int32",
    "int64",
)
# Nothing, less than a chunk each, on and off the bounds of chunks and cache lines.
LENGTHS = (0, 1, 2, 15, 16, 17, 31, 63, 64, 65, 129, 1000, 4099)
TRANSPORTS = ("shared_memory", "mpi_host", "mpi_host in pieces")


class Group:
    """A transport of all ranks of a communicator, and memory for it."""

    def __init__(self, comm: MPI.Intracomm, name: str) -> None:
        ranks = range(comm.size)
        self.comm = comm
        self.transport: Transport
        if name == "shared_memory":
            self.transport = SharedMemory(comm, ranks, get())
        else:
            piece = 24 if name.endswith("pieces") else 1 << 30
            self.transport = MpiHost(comm, ranks, get(), piece_bytes=piece)
        self._tag = 0

    def region(self, count: int, dtype: DType, before: int = 0, after: int = 0) -> Region:
        """``count`` elements in a buffer of their own, with bytes before and behind them."""
        nbytes = before + count * dtype.itemsize + after
        if isinstance(self.transport, SharedMemory):
            return Region(self.transport.allocate(nbytes, 8), before, count, dtype)
        return Region(private_buffer(nbytes), before, count, dtype)

    def bind(
        self,
        name: str,
        kind: Kind,
        region: Region,
        divisor: int = 1,
        owners: int | None = None,
        released: bool = False,
    ) -> Program:
        self._tag += 1
        every = schedules.everyone(name, kind, self.comm.size, owners)
        return self.transport.bind(every, region, self._tag, divisor, released)

    def owned(self, name: str, kind: Kind, region: Region, owners: int | None = None) -> slice:
        """The elements that this rank owns."""
        schedule = schedules.build(name, kind, self.comm.rank, self.comm.size, owners)
        offsets = chunk_offsets(schedule, region)
        low, high = schedule.owned
        return slice(offsets[low], offsets[high])


@pytest.fixture(params=TRANSPORTS)
def group(request: pytest.FixtureRequest, comm: MPI.Intracomm) -> Group:
    return Group(comm, request.param)


def drive(program: Program) -> None:
    for wait in program.run():
        while not wait.ready():
            time.sleep(5e-5)


def values(rank: int, count: int, seed: int = 0) -> Array:
    """What a rank brings, in float64."""
    return np.random.default_rng([seed, rank]).integers(-9, 10, count).astype(np.float64)


def put(region: Region, numbers: Array) -> None:
    dtype = region.dtype
    if dtype.name == "bfloat16":
        region.array[:] = narrow(numbers.astype(np.float32), dtype)
    elif dtype.name == "uint8":
        region.array[:] = numbers.astype(np.int64).astype(np.uint8)
    else:
        region.array[:] = numbers.astype(dtype.storage)


def held(array: Array, dtype: DType) -> Array:
    """Stored elements in float64; uint8 counts modulo 256."""
    if dtype.name == "bfloat16":
        return widen(array, dtype).astype(np.float64)
    if dtype.name == "uint8":
        return array.view(np.int8).astype(np.float64)
    return array.astype(np.float64)


def total(comm: MPI.Intracomm, count: int, seed: int = 0) -> Array:
    return np.sum([values(rank, count, seed) for rank in range(comm.size)], axis=0)


def check(group: Group, name: str, kind: Kind, count: int, dtype: DType) -> None:
    comm, region = group.comm, group.region(count, dtype)
    truth = total(comm, count)
    part = group.owned(name, kind, region)
    if kind is Kind.ALLGATHER:
        put(region, np.full(count, -77.0))
        mine = region.part(part.start, part.stop)
        put(mine, truth[part])
    else:
        put(region, values(comm.rank, count))
    program = group.bind(name, kind, region)
    drive(program)
    done = part if kind is Kind.REDUCE_SCATTER else slice(None)
    np.testing.assert_array_equal(held(region.array[done], dtype), truth[done], f"{count} {dtype}")
    program.close()


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("name", STEPWISE)
def test_every_length(group: Group, name: str, kind: Kind) -> None:
    for count in LENGTHS:
        check(group, name, kind, count, dtype_of("float32"))


@pytest.mark.parametrize("name", STEPWISE)
def test_every_dtype(group: Group, name: str) -> None:
    for dtype in DTYPES:
        for kind in Kind:
            check(group, name, kind, 117, dtype_of(dtype))


# Not uint8: Open MPI's own sum stops at 255.
@pytest.mark.parametrize("dtype", ["float32", "float64", "int8", "int16", "int32", "int64"])
def test_native(comm: MPI.Intracomm, dtype: str) -> None:
    group = Group(comm, "mpi_host")
    for count in (0, 1, 117, 4099):
        check(group, "native", Kind.ALLREDUCE, count, dtype_of(dtype))


@pytest.mark.parametrize("name", STEPWISE)
def test_a_scattered_sum_and_a_gather_make_an_allreduce(group: Group, name: str) -> None:
    comm = group.comm
    for owners in range(1, comm.size + 1) if name == "direct" else [None]:
        for count in (1, 100, 1001):
            region = group.region(count, dtype_of("float32"))
            scatter = group.bind(name, Kind.REDUCE_SCATTER, region, comm.size, owners)
            gather = group.bind(name, Kind.ALLGATHER, region, 1, owners, released=True)
            for run in range(3):
                put(region, values(comm.rank, count, run))
                drive(scatter)
                drive(gather)
                wanted = (total(comm, count, run) / comm.size).astype(np.float32)
                np.testing.assert_array_equal(region.array, wanted)


@pytest.mark.parametrize("name", STEPWISE)
def test_runs_again_and_again(group: Group, name: str) -> None:
    comm = group.comm
    region = group.region(333, dtype_of("float32"))
    program = group.bind(name, Kind.ALLREDUCE, region)
    for run in range(20):
        if run % comm.size == comm.rank:
            time.sleep(2e-3)  # everyone is late once
        put(region, values(comm.rank, 333, run))
        drive(program)
        np.testing.assert_array_equal(region.array, total(comm, 333, run))
        region.array[:] = -1  # a rank that still reads this has not waited for its turn
    program.close()


@pytest.mark.parametrize("name", STEPWISE)
def test_memory_around_a_region_is_left_alone(group: Group, name: str) -> None:
    comm = group.comm
    for dtype, before in (("float32", 12), ("bfloat16", 2), ("float64", 8), ("int8", 1)):
        region = group.region(101, dtype_of(dtype), before, after=9)
        memory = region.buffer.own
        memory[:] = 0xA5
        comm.Barrier()
        put(region, values(comm.rank, 101))
        drive(group.bind(name, Kind.ALLREDUCE, region))
        np.testing.assert_array_equal(held(region.array, region.dtype), total(comm, 101))
        assert (memory[:before] == 0xA5).all()
        assert (memory[-9:] == 0xA5).all()


@pytest.mark.parametrize("name", STEPWISE)
def test_all_ranks_hold_the_same_bits(group: Group, name: str) -> None:
    comm = group.comm
    for dtype in ("float32", "bfloat16"):
        region = group.region(777, dtype_of(dtype))
        numbers = np.random.default_rng(comm.rank).normal(size=777).astype(np.float32)
        region.array[:] = narrow(numbers, region.dtype) if dtype == "bfloat16" else numbers
        drive(group.bind(name, Kind.ALLREDUCE, region, comm.size))
        mine = region.array.tobytes()
        assert comm.allgather(mine) == [mine] * comm.size
        everyone = np.mean([np.random.default_rng(r).normal(size=777) for r in range(comm.size)], 0)
        tolerance = 1e-6 if dtype == "float32" else 2e-2
        np.testing.assert_allclose(held(region.array, region.dtype), everyone, 0, tolerance)


@pytest.mark.parametrize("name", STEPWISE)
def test_a_mean_of_float16_is_divided_before_it_is_rounded(group: Group, name: str) -> None:
    value = 60000 // max(1, group.comm.size - 1)  # all ranks' sum is too large, no smaller one is
    for kind in (Kind.ALLREDUCE, Kind.REDUCE_SCATTER):
        region = group.region(70, dtype_of("float16"))
        region.array[:] = value
        drive(group.bind(name, kind, region, group.comm.size))
        part = group.owned(name, kind, region)
        np.testing.assert_array_equal(region.array[part], np.float16(value))


@pytest.mark.parametrize("name", STEPWISE)
def test_nan_and_inf_reach_every_rank(group: Group, name: str) -> None:
    comm = group.comm
    region = group.region(50, dtype_of("float32"))
    region.array[:] = comm.rank
    if comm.rank == comm.size - 1:
        region.array[7] = np.nan
    if comm.rank == 0:
        region.array[49] = np.inf
    drive(group.bind(name, Kind.ALLREDUCE, region, comm.size))
    assert list(np.flatnonzero(np.isnan(region.array))) == [7]
    assert list(np.flatnonzero(np.isinf(region.array))) == [49]


@pytest.mark.parametrize("name", ["shared_memory", "mpi_host"])
def test_groups_of_some_ranks(comm: MPI.Intracomm, name: str) -> None:
    part = comm.Split(comm.rank % 2, comm.rank)
    group = Group(part, name)
    for algorithm in STEPWISE:
        check(group, algorithm, Kind.ALLREDUCE, 99, dtype_of("float32"))
    part.Free()


def test_many_messages_are_not_kept_as_persistent_requests(comm: MPI.Intracomm) -> None:
    group = Group(comm, "mpi_host")
    group.transport.piece_bytes = 4  # type: ignore[attr-defined]
    for count in (64, 1500):  # the second makes hundreds of messages a rank
        check(group, "direct", Kind.ALLREDUCE, count, dtype_of("float32"))


class Job:
    """A program for the progress thread."""

    def __init__(self, program: Program, priority: int, nbytes: int, over: Callable[[], None]):
        self.program = program
        self.priority = priority
        self.nbytes = nbytes
        self._over = over

    def run(self) -> Iterator[Wait]:
        return self.program.run()

    def finished(self) -> None:
        self._over()

    def describe(self) -> str:
        return "job"


def run_all(progress: Progress, programs: Sequence[Program], order: Sequence[int]) -> None:
    """Start the programs in an order of this rank's own, and wait for all."""
    left = [len(programs)]

    def over() -> None:
        left[0] -= 1

    jobs = [Job(programs[index], place % 5, 1000, over) for place, index in enumerate(order)]
    for first in range(0, len(jobs), 3):
        progress.submit(jobs[first : first + 3])  # type: ignore[arg-type]
    progress.wait_until(lambda: left[0] == 0)


@pytest.mark.parametrize("credit", [1, 5000, 1 << 30])
def test_many_in_flight_started_in_another_order_on_each_rank(group: Group, credit: int) -> None:
    """However small the credit window, ranks that fill it with different programs get through."""
    comm = group.comm
    sizes = [1, 17, 64, 1000, 333, 5, 128, 2049, 63, 512, 77, 900]
    regions = [group.region(count, dtype_of("float32")) for count in sizes]
    programs = [
        group.bind(STEPWISE[index % 4], Kind.ALLREDUCE, region)
        for index, region in enumerate(regions)
    ]
    progress = Progress(credit, timeout_s=60.0)
    for run in range(3):
        for index, region in enumerate(regions):
            put(region, values(comm.rank, region.count, index + run))
        order = list(range(len(sizes)))
        random.Random(comm.rank * 100 + run).shuffle(order)
        run_all(progress, programs, order)
        for index, region in enumerate(regions):
            wanted = total(comm, region.count, index + run)
            np.testing.assert_array_equal(region.array, wanted)
    progress.close()
    for program in programs:
        program.close()


class Broken(Program):
    def run(self) -> Iterator[Wait]:
        raise RuntimeError("a fault of the transport")
        yield  # makes it a coroutine


def test_what_a_program_raises_reaches_who_waits() -> None:
    progress = Progress(1 << 20, timeout_s=60.0)
    for _ in range(2):  # and stays: the thread is gone
        with pytest.raises(RuntimeError, match="a fault of the transport"):
            run_all(progress, [Broken()], [0])
    progress.close()


@pytest.mark.parametrize("named", [True, False])
def test_buffers_are_private_to_the_user_and_unlinked(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    made: list[tuple[str, int]] = []
    create = mapped.create

    def spy(name: str, nbytes: int) -> int:
        if not (named or name):
            raise OSError(errno.EOPNOTSUPP, "no files without a name here")
        handle = create(name, nbytes)
        made.append((name, stat.S_IMODE(os.fstat(handle).st_mode)))
        return handle

    monkeypatch.setattr(mapped, "create", spy)
    buffer = SharedMemory(comm, range(comm.size), get()).allocate(1000, 1)
    ((name, mode),) = made
    assert mode == 0o600
    start = f"{mapped.FOLDER}/{mapped.PREFIX}{os.getpid()}-"
    assert name == "" if named else name.startswith(start)
    assert not os.path.exists(name)
    assert buffer.nbytes == 1000
    assert not buffer.own.any()
    buffer.own[0] = comm.rank + 1
    comm.Barrier()
    assert [buffer.peer(index)[0] for index in range(comm.size)] == [
        index + 1 for index in range(comm.size)
    ]


def test_no_room_on_one_rank_is_told_to_all_and_leaves_nothing(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = comm.size - 1
    if comm.rank == last:

        def full(handle: int, start: int, length: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
    transport = SharedMemory(comm, range(comm.size), get())
    with pytest.raises(SharedMemoryError, match=r"/dev/shm: No space left on device for \d+ MiB"):
        transport.allocate(5 << 20, 4)
    comm.Barrier()
    mine = f"{mapped.PREFIX}{os.getpid()}-"
    assert not [each for each in os.listdir(mapped.FOLDER) if each.startswith(mine)]


def test_counters_stand_on_lines_of_their_own(comm: MPI.Intracomm) -> None:
    buffer = SharedMemory(comm, range(comm.size), get()).allocate(64, 100)
    assert [buffer.slots.take() for _ in range(100)] == list(range(100))
    assert buffer.own.ctypes.data % 64 == 0


@pytest.mark.parametrize("transport", ["shared_memory", "mpi_host"])
def test_waits_say_who_is_missing(comm: MPI.Intracomm, transport: str) -> None:
    """The last rank is late; the others tell that they wait for it, and for nobody else."""
    group = Group(comm, transport)
    if comm.size == 1:
        pytest.skip("a rank alone waits for nobody")
    region = group.region(1 << 16, dtype_of("float32"))
    program = group.bind("direct", Kind.ALLREDUCE, region)
    put(region, values(comm.rank, region.count))
    last = comm.size - 1
    run = program.run()
    if comm.rank == last:
        comm.Barrier()
        drive(program)
        return
    wait = next(run)
    deadline = time.monotonic() + 0.5
    while not wait.ready() and time.monotonic() < deadline:
        time.sleep(1e-3)
    assert not wait.ready()
    text = wait.describe()
    comm.Barrier()
    while wait is not None:
        while not wait.ready():
            time.sleep(5e-5)
        wait = next(run, None)  # type: ignore[arg-type]
    assert f"rank {last}" in text
    for other in set(range(last)) - {comm.rank}:
        assert f"rank {other}" not in text, text
