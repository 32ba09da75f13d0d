"""Transports by messages between device memory, on the double: ranks are threads, MPI is slow.

Values are small whole numbers, so that sums are exact in every type and any order.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from hpcsync import schedules
from hpcsync.device import DType, Event, dtype_of
from hpcsync.device.cpu import narrow, widen
from hpcsync.schedules import Kind
from hpcsync.transports.base import (
    Parcel,
    Program,
    Region,
    Transport,
    Wait,
    chunk_offsets,
    device_buffer,
)
from hpcsync.transports.mpi_device import MpiDevice
from hpcsync.transports.mpi_staged import MpiStaged
from hpcsync.transports.staging import Pool
from tests.double.device import machine
from tests.double.job import Rank, job

Array = np.ndarray[Any, Any]

STEPWISE = ("direct", "ring", "halving", "doubling")
KINDS = (Kind.ALLREDUCE, Kind.REDUCE_SCATTER, Kind.ALLGATHER)
LENGTHS = (0, 1, 17, 65, 1000)
LIMIT_S = 60.0


def staged(rank: Rank) -> Transport:
    """Cells so short that every message is many of them."""
    comm: Any = rank.comm.Dup()
    return MpiStaged(comm, range(rank.size), rank.device, piece_bytes=96)


def direct(rank: Rank) -> Transport:
    comm: Any = rank.comm.Dup()
    return MpiDevice(comm, range(rank.size), rank.device, piece_bytes=1000)


MAKERS = {"mpi_staged": staged, "mpi_device": direct}


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Callable[[Rank], Transport]:
    return MAKERS[request.param]


def drive(waits: Iterator[Wait]) -> None:
    limit = time.monotonic() + LIMIT_S
    for wait in waits:
        while not wait.ready():
            assert time.monotonic() < limit, wait.describe()
            time.sleep(2e-5)


def values(rank: int, count: int, seed: int = 0) -> Array:
    """What a rank brings."""
    return np.random.default_rng([seed, rank]).integers(-9, 10, count).astype(np.float64)


def stored(numbers: Array, dtype: DType) -> Array:
    if dtype.name == "bfloat16":
        return narrow(numbers.astype(np.float32), dtype)
    return numbers.astype(dtype.storage)


def held(array: Array, dtype: DType) -> Array:
    if dtype.name == "bfloat16":
        return widen(array, dtype).astype(np.float64)
    return array.astype(np.float64)


def bound(
    rank: Rank, transport: Transport, name: str, kind: Kind, count: int, dtype: DType, tag: int
) -> tuple[Region, Program]:
    buffer = device_buffer(rank.device, count * dtype.itemsize + 24)
    region = Region(buffer, 8, count, dtype, stream=rank.device.stream())
    every = schedules.everyone(name, kind, rank.size)
    return region, transport.bind(every, region, tag)


def run_once(rank: Rank, region: Region, program: Program, seed: int) -> None:
    """Values that the computation makes, and a run that begins when they are there."""
    stream = region.stream
    assert stream is not None
    compute = rank.device.current()
    compute.wait(stream.record())
    numbers = stored(values(rank.rank, region.count, seed), region.dtype)
    rank.device.write(region.array, numbers, compute)
    stream.wait(compute.record())
    drive(program.run())


def expected(rank: Rank, region: Region, name: str, kind: Kind, seed: int) -> tuple[slice, Array]:
    """Where a rank's result stands, and what it is."""
    size, count = rank.size, region.count
    every = np.array([values(who, count, seed) for who in range(size)])
    own = schedules.build(name, kind, rank.rank, size)
    offsets = chunk_offsets(own, region)
    if kind is Kind.ALLGATHER:
        gathered = np.zeros(count)
        for who, each in enumerate(schedules.everyone(name, kind, size)):
            part = slice(offsets[each.owned[0]], offsets[each.owned[1]])
            gathered[part] = every[who][part]
        return slice(0, count), gathered
    part = slice(0, count)
    if kind is Kind.REDUCE_SCATTER:
        part = slice(offsets[own.owned[0]], offsets[own.owned[1]])
    return part, every.sum(axis=0)[part]


def check(
    rank: Rank, make: Callable[[Rank], Transport], name: str, kind: Kind, lengths: Any, dtype: DType
) -> None:
    transport = make(rank)
    for tag, count in enumerate(lengths):
        region, program = bound(rank, transport, name, kind, count, dtype, tag)
        for seed in range(2):
            run_once(rank, region, program, seed)
            part, wanted = expected(rank, region, name, kind, seed)
            compute = rank.device.current()
            assert region.stream is not None
            compute.wait(region.stream.record())
            got = held(rank.device.read(region.array), dtype)[part]
            np.testing.assert_array_equal(got, wanted, f"{count} elements, run {seed}")
        program.close()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
@pytest.mark.parametrize("name", STEPWISE)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums(make: Callable[[Rank], Transport], size: int, name: str, kind: Kind) -> None:
    with job(size, f"{name} {kind}") as ranks:
        ranks.run(lambda rank: check(rank, make, name, kind, LENGTHS, dtype_of("float32")))


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float64", "int8", "int64"])
def test_element_types(make: Callable[[Rank], Transport], name: str) -> None:
    with job(3, name) as ranks:
        ranks.run(
            lambda rank: check(rank, make, "direct", Kind.ALLREDUCE, (0, 65, 300), dtype_of(name))
        )


def test_a_mean_is_divided_once(make: Callable[[Rank], Transport]) -> None:
    """float16 would overflow in a sum of four that is divided later."""
    dtype = dtype_of("float16")

    def body(rank: Rank) -> None:
        transport = make(rank)
        for tag, name in enumerate(STEPWISE):
            buffer = device_buffer(rank.device, 200 * dtype.itemsize)
            region = Region(buffer, 0, 200, dtype, stream=rank.device.stream())
            every = schedules.everyone(name, Kind.ALLREDUCE, rank.size)
            program = transport.bind(every, region, tag, divisor=4)
            rank.device.write(region.array, np.full(200, 40000, np.float16), region.stream)
            drive(program.run())
            if name == "direct":
                assert (rank.device.read(region.array) == 40000).all()

    with job(4, "mean") as ranks:
        ranks.run(body)


def test_programs_in_flight_do_not_disturb_each_other(make: Callable[[Rank], Transport]) -> None:
    """Each rank runs them in an order of its own, several on one stream."""
    dtype, count = dtype_of("float32"), 500

    def body(rank: Rank) -> None:
        transport = make(rank)
        made = [
            bound(rank, transport, name, Kind.ALLREDUCE, count, dtype, tag)
            for tag, name in enumerate((*STEPWISE, *STEPWISE))
        ]
        compute = rank.device.current()
        running = {}
        for index in np.random.default_rng(rank.rank).permutation(len(made)):
            region, program = made[index]
            assert region.stream is not None
            rank.device.write(region.array, stored(values(rank.rank, count, index), dtype), compute)
            region.stream.wait(compute.record())
            steps = program.run()
            running[index] = (steps, next(steps, None))
        limit = time.monotonic() + LIMIT_S
        while running:
            assert time.monotonic() < limit, [str(wait) for _, wait in running.values()]
            for index, (steps, wait) in list(running.items()):
                if wait is None:
                    del running[index]
                elif wait.ready():
                    running[index] = steps, next(steps, None)
            time.sleep(2e-5)
        for index, (region, _) in enumerate(made):
            wanted = np.sum([values(who, count, index) for who in range(rank.size)], axis=0)
            np.testing.assert_array_equal(rank.device.read(region.array), wanted)

    with job(3, "in flight") as ranks:
        ranks.run(body)


def test_a_wait_says_who_is_missing(make: Callable[[Rank], Transport]) -> None:
    """Rank 1 comes late: rank 0 can tell for whom it waits."""
    late = threading.Event()

    def body(rank: Rank) -> None:
        transport = make(rank)
        region, program = bound(
            rank, transport, "direct", Kind.ALLREDUCE, 100, dtype_of("float32"), 1
        )
        rank.device.write(region.array, np.ones(100, np.float32), region.stream)
        if rank.rank == 1:
            assert late.wait(LIMIT_S)
            drive(program.run())
            return
        said, steps, limit = "", program.run(), time.monotonic() + LIMIT_S
        wait = next(steps)
        while "rank 1" not in said and "ranks 1" not in said:
            assert time.monotonic() < limit, said
            if wait.ready():
                wait = next(steps)
            said = wait.describe()
        assert said.startswith(f"{transport.name}: direct waits at step 0 of 2 for ")
        late.set()
        drive(iter([wait]))
        drive(steps)

    with job(2, "late") as ranks:
        ranks.run(body)


# Mail


LETTERS = (0, 1, 95, 96, 97, 300, 1000)  # bytes; staged cells have 96


class Post:
    """A mail of every rank with every other, both ways, and what it sends."""

    def __init__(self, rank: Rank, transport: Transport, each: int) -> None:
        device = rank.device
        self.device, self.stream = device, device.stream()
        self.others = [who for who in range(rank.size) if who != rank.rank]
        self.rank, self.each = rank.rank, each
        peers = [who for who in self.others for _ in range(each)]
        self.outgoing = [Parcel(who, device.empty(1000)) for who in peers]
        self.incoming = [Parcel(who, device.empty(1000)) for who in peers]
        self.mail = transport.mail(self.outgoing, self.incoming, 7, self.stream)

    def exchange(self, turn: int) -> None:
        """Each parcel has its own length, which the receiver does not know."""
        waits = [self.mail.expect(range(len(self.incoming)))]
        for index, parcel in enumerate(self.outgoing):
            data = letter(self.rank, parcel.peer, index % self.each, turn)
            self.device.write(parcel.memory[: len(data)], data, self.stream)
            waits.append(self.mail.send(index, len(data)))
        drive(iter(waits))
        for index, parcel in enumerate(self.incoming):
            data = letter(parcel.peer, self.rank, index % self.each, turn)
            copy = self.device.empty(1000)[: len(data)]
            if len(data):
                self.stream.copy(copy, parcel.memory[: len(data)])
                np.testing.assert_array_equal(self.device.read(copy), data)


def letter(sender: int, receiver: int, index: int, turn: int) -> Array:
    nbytes = LETTERS[(sender + 2 * receiver + 3 * index + turn) % len(LETTERS)]
    draw = np.random.default_rng([sender, receiver, index, turn])
    return draw.integers(0, 256, nbytes).astype(np.uint8)


@pytest.mark.parametrize("size", [2, 3])
def test_mail_of_any_length_arrives_in_order(make: Callable[[Rank], Transport], size: int) -> None:
    def body(rank: Rank) -> None:
        post = Post(rank, make(rank), 3)
        for turn in range(len(LETTERS)):
            post.exchange(turn)
        post.mail.close()

    with job(size, "mail") as ranks:
        ranks.run(body)


def test_mail_says_who_is_missing(make: Callable[[Rank], Transport]) -> None:
    def body(rank: Rank) -> None:
        post = Post(rank, make(rank), 1)
        limit = time.monotonic() + LIMIT_S
        if rank.rank == 0:
            wait, said = post.mail.expect([0]), ""
            while "rank 1" not in said:
                assert not wait.ready()
                assert time.monotonic() < limit, said
                said = wait.describe()
            rank.runtime.barrier()
            drive(iter([wait]))
        else:
            rank.runtime.barrier()
            drive(iter([post.mail.send(0, 100)]))

    with job(2, "late mail") as ranks:
        ranks.run(body)


# Memory that comes and goes


class Later(Event):
    """An event that a test brings about."""

    def __init__(self) -> None:
        self.come = False

    def ready(self) -> bool:
        return self.come

    def synchronize(self) -> None:
        raise AssertionError("nobody waits here")


def test_a_piece_is_not_taken_again_before_its_event() -> None:
    made: list[int] = []

    def make(nbytes: int) -> Array:
        made.append(nbytes)
        return np.empty(nbytes, np.uint8)

    pool, event = Pool(make), Later()
    first = pool.take(5000)
    assert first.memory.nbytes == 5000
    pool.give(first, event)
    second = pool.take(8000)
    assert second.whole is not first.whole
    event.come = True
    assert pool.take(4097).whole is first.whole
    assert pool.take(100).whole.nbytes == 4096
    assert made == [8192, 8192, 4096]


def test_a_stream_waits_for_a_piece_rather_than_take_ever_more() -> None:
    with machine("pieces") as made:
        device = made.device()
        stream, other = device.stream(), device.stream()
        pool = Pool(device.empty)
        pieces = [pool.take(1000, stream) for _ in range(20)]
        for piece in pieces:
            other.fill(piece.whole, 1)
            pool.give(piece, other.record())
        again = [pool.take(1000, stream) for _ in range(12)]
        for piece in again:
            stream.fill(piece.whole, 2)
        assert {id(each.whole) for each in again} <= {id(each.whole) for each in pieces}
        for piece in again:
            assert (device.read(piece.whole) == 2).all()
