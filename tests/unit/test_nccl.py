"""Messages by NCCL on the double, device and library."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hpcsync import schedules
from hpcsync.collectives.routes import Facts
from hpcsync.device import dtype_of
from hpcsync.errors import DeviceError
from hpcsync.schedules import Kind
from hpcsync.transports import nccl, nccl_library
from hpcsync.transports.base import Program, Region, chunk_offsets, device_buffer
from hpcsync.transports.nccl import Nccl
from tests.double.job import Job, Rank, job
from tests.double.nccl import DoubleNccl, Fabric, installed

Array = np.ndarray[Any, Any]
LIMIT_S = 60.0


def transport(rank: Rank, fabric: Fabric) -> Nccl:
    library = DoubleNccl(fabric)
    ranks = range(rank.size)
    return Nccl(rank.runtime.group(ranks), ranks, rank.device, rank.runtime.wait, library)


def region(rank: Rank, count: int, dtype: str = "float32") -> Region:
    kind = dtype_of(dtype)
    buffer = device_buffer(rank.device, max(count * kind.itemsize, 1))
    return Region(buffer, 0, count, kind, stream=rank.device.stream())


def bind(way: Nccl, name: str, kind: Kind, place: Region, divisor: int = 1) -> Program:
    every = schedules.everyone(name, kind, way.size)
    return way.bind(every, place, 0, divisor)


def put(rank: Rank, place: Region, numbers: Array) -> None:
    compute = rank.device.current()
    rank.device.write(place.array, numbers.astype(place.dtype.storage), compute)
    assert place.stream is not None
    place.stream.wait(compute.record())


def taken(rank: Rank, place: Region) -> Array:
    """A copy on the host, filled when the region's stream is at its end."""
    assert place.stream is not None
    pinned: Array = rank.device.pinned(place.nbytes).view(place.dtype.storage)
    place.stream.copy(pinned, place.array)
    rank.device.current().wait(place.stream.record())
    return pinned


def drive(*programs: Program) -> None:
    """Run programs beside each other."""
    limit = time.monotonic() + LIMIT_S
    under_way = [[program.run(), None] for program in programs]
    while under_way:
        assert time.monotonic() < limit, [wait.describe() for _, wait in under_way if wait]
        time.sleep(5e-5)
        for each in list(under_way):
            run, wait = each
            if wait is None or wait.ready():
                each[1] = next(run, None)
                if each[1] is None:
                    under_way.remove(each)


def values(rank: int, count: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, rank]).integers(-9, 10, count).astype(np.float64)


def total(size: int, count: int, seed: int = 0) -> Array:
    return np.sum([values(rank, count, seed) for rank in range(size)], axis=0)


def run(made: Job, work: Callable[[Rank, Fabric], None]) -> None:
    fabric = Fabric(made.machine)
    made.run(lambda rank: work(rank, fabric))
    assert fabric.empty


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["direct", "ring", "halving", "doubling"])
def test_every_schedule(name: str, size: int) -> None:
    def work(rank: Rank, fabric: Fabric) -> None:
        way = transport(rank, fabric)
        for kind in Kind:
            for count in (0, 1, 17, 1000):
                place, truth = region(rank, count), total(size, count)
                schedule = schedules.build(name, kind, rank.rank, size)
                offsets = chunk_offsets(schedule, place)
                part = slice(offsets[schedule.owned[0]], offsets[schedule.owned[1]])
                brought = values(rank.rank, count)
                if kind is Kind.ALLGATHER:
                    brought = np.full(count, -77.0)
                    brought[part] = truth[part]
                put(rank, place, brought)
                program = bind(way, name, kind, place)
                drive(program)
                found = taken(rank, place)
                assert place.stream is not None
                place.stream.synchronize()
                done = part if kind is Kind.REDUCE_SCATTER else slice(None)
                np.testing.assert_array_equal(found[done], truth[done])
                program.close()

    with job(size, (name, size)) as made:
        run(made, work)


@pytest.mark.parametrize("seed", range(10))
def test_ranks_that_run_programs_in_orders_of_their_own(seed: int) -> None:
    size, count, runs = 3, 400, 4

    def work(rank: Rank, fabric: Fabric) -> None:
        way = transport(rank, fabric)
        places = [region(rank, count + 8 * index) for index in range(3)]
        programs = [bind(way, "direct", Kind.ALLREDUCE, place, 2) for place in places]
        found: list[tuple[int, int, Array]] = []
        order = np.random.default_rng([seed, rank.rank])
        for turn in range(runs):
            for index, place in enumerate(places):
                put(rank, place, values(rank.rank, place.count, 10 * turn + index))
            drive(*(programs[index] for index in order.permutation(3)))
            found += [(turn, index, taken(rank, place)) for index, place in enumerate(places)]
        for stream in rank.device.streams:
            stream.synchronize()
        for turn, index, each in found:
            wanted = total(size, places[index].count, 10 * turn + index) / 2
            np.testing.assert_array_equal(each, wanted, f"run {turn} of {index}")

    with job(size, seed) as made:
        run(made, work)


@pytest.mark.parametrize("seed", range(8))
def test_scratch_memory_is_filled_again_once_it_was_added(seed: int) -> None:
    """Reduce-scatters in streams of their own: nothing else holds the next message up."""
    size, count = 3, 3000

    def work(rank: Rank, fabric: Fabric) -> None:
        way, found = transport(rank, fabric), []
        streams = [rank.device.new_stream(f"own{index}") for index in range(5)]
        places = [replace(region(rank, count), stream=stream) for stream in streams]
        programs = [bind(way, "direct", Kind.REDUCE_SCATTER, place) for place in places]
        for turn, place in enumerate(places):
            put(rank, place, values(rank.rank, count, turn))
        for place, program in zip(places, programs, strict=True):
            drive(program)
            found.append(taken(rank, place))
        for stream in rank.device.streams:
            stream.synchronize()
        offsets = chunk_offsets(schedules.build("direct", Kind.ALLREDUCE, 0, size), places[0])
        part = slice(offsets[rank.rank], offsets[rank.rank + 1])
        for turn, each in enumerate(found):
            np.testing.assert_array_equal(each[part], total(size, count, turn)[part])

    with job(size, seed) as made:
        run(made, work)


def test_scratch_memory_grows_between_runs_that_are_under_way() -> None:
    size = 3

    def work(rank: Rank, fabric: Fabric) -> None:
        way, found = transport(rank, fabric), []
        for turn, count in enumerate((50, 900, 30, 4000, 20000)):
            place = region(rank, count)
            put(rank, place, values(rank.rank, count, turn))
            drive(bind(way, "direct", Kind.ALLREDUCE, place))
            found.append((place, taken(rank, place)))
        for stream in rank.device.streams:
            stream.synchronize()
        for turn, (place, each) in enumerate(found):
            np.testing.assert_array_equal(each, total(size, place.count, turn))

    for seed in range(5):
        with job(size, seed) as made:
            run(made, work)


def test_a_job_whose_deck_asks_for_it() -> None:
    """Two nodes: by NCCL within them, and as the routes say between them."""
    count = 3000

    def body(rank: Rank) -> dict[str, str]:
        made = rank.collectives(facts=Facts(nccl="", mpi_device=""))
        buffer = made.arena(4 * count)
        collective = made.allreduce(buffer, dtype_of("float32"), count=count, average=True)
        for turn in range(3):
            numbers = values(rank.rank, count, turn).astype(np.float32)
            rank.device.write(buffer.own[: 4 * count].view(np.float32), numbers)
            collective.start(0, [rank.device.current().record()])
            collective.wait()
            collective.join(rank.device.current())
            pinned = rank.device.pinned(4 * count).view(np.float32)
            rank.device.current().copy(pinned, buffer.own[: 4 * count].view(np.float32))
            rank.device.current().synchronize()
            np.testing.assert_array_equal(pinned, total(4, count, turn) / 4)
        return made.describe_transports()

    comm = {"node_transport": "nccl"}
    with job(4, 5, per_node=2, comm=comm) as made, installed(made.machine) as fabric:
        found = made.run(body)[0]
    assert fabric.empty
    assert found["node"] == "nccl"
    assert found["rail"].startswith("mpi_staged (nccl and MPI must not")


def test_a_node_that_cannot_is_told_on_all_nodes() -> None:
    def body(rank: Rank) -> str:
        own.rank = rank
        with pytest.raises(DeviceError) as caught:
            rank.collectives(facts=Facts(nccl=""))
        return str(caught.value)

    def library(fabric: Fabric) -> DoubleNccl:
        return DoubleNccl(fabric, "no" if own.rank.rank == 3 else "")

    own, comm = threading.local(), {"node_transport": "nccl"}
    with job(4, per_node=2, comm=comm) as made, installed(made.machine, library):
        (told,) = set(made.run(body))
    assert told.startswith("rank 2: nccl: rank 3 cannot take part (no); ")


def test_more_programs_than_one_map_has_counters_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "_SLOTS", 1)  # a page of them

    def work(rank: Rank, fabric: Fabric) -> None:
        way = transport(rank, fabric)
        place = region(rank, 4)
        bound = [bind(way, "direct", Kind.ALLREDUCE, place) for _ in range(70)]
        put(rank, place, np.ones(4))
        drive(bound[0])
        drive(bound[69])
        found = taken(rank, place)
        rank.device.current().synchronize()
        np.testing.assert_array_equal(found, np.full(4, 4.0))

    with job(2) as made:
        run(made, work)


def test_a_rank_that_cannot_take_part_is_told_on_every_rank() -> None:
    told: list[str] = []

    def work(rank: Rank, fabric: Fabric) -> None:
        problem = "NCCL_ERROR_INVALID_USAGE: Duplicate GPU\nand more" if rank.rank == 1 else ""
        library = DoubleNccl(fabric, problem)
        group = rank.runtime.group(range(rank.size))
        with pytest.raises(DeviceError) as caught:
            Nccl(group, range(rank.size), rank.device, rank.runtime.wait, library)
        told.append(str(caught.value))

    with job(3) as made:
        run(made, work)
    assert set(told) == {
        "nccl: rank 1 cannot take part (NCCL_ERROR_INVALID_USAGE: Duplicate GPU); it needs CuPy "
        "with NCCL and a GPU of its own for each rank; or use comm.transport.node=auto"
    }


def test_two_ranks_on_one_gpu_are_told() -> None:
    def work(rank: Rank, fabric: Fabric) -> None:
        with pytest.raises(DeviceError, match=r"nccl: rank 0 .*shares its GPU with another rank"):
            transport(rank, fabric)

    with job(2, one_device=True) as made:
        run(made, work)


def test_damaged_messages_are_told() -> None:
    def work(rank: Rank, fabric: Fabric) -> None:
        fabric.damaged = True
        with pytest.raises(DeviceError, match="messages came damaged"):
            transport(rank, fabric)

    with job(2) as made:
        run(made, work)


def test_no_cupy_is_told() -> None:
    def work(rank: Rank, fabric: Fabric) -> None:
        group = rank.runtime.group(range(rank.size))
        with pytest.raises(DeviceError, match=r"nccl: rank 0 cannot take part \(.*cupy.*\)"):
            Nccl(group, range(rank.size), rank.device, rank.runtime.wait)

    with job(2) as made:
        run(made, work)


class _Recorded:
    """As much of CuPy as messages ask for; calls are written down."""

    def __init__(self, identifier: object) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.identifier = identifier
        self.cuda = self
        self.available = True

    def get_current_stream(self) -> Any:
        class _Stream:
            ptr = 77

        return _Stream()

    def get_unique_id(self) -> object:
        return self.identifier

    def NcclCommunicator(self, *given: Any) -> _Recorded:  # noqa: N802
        self.calls.append(("join", *given))
        return self

    def groupStart(self) -> None:  # noqa: N802
        self.calls.append(("start",))

    def groupEnd(self) -> None:  # noqa: N802
        self.calls.append(("end",))

    def send(self, *given: Any) -> None:
        self.calls.append(("send", *given))

    def recv(self, *given: Any) -> None:
        self.calls.append(("recv", *given))


@pytest.mark.parametrize("identifier", [tuple(range(-64, 64)), bytes(range(128))])
def test_calls_of_cupy(identifier: object) -> None:
    """By the signatures of cupy.cuda.nccl; the name of a communicator is a tuple, or bytes."""
    cupy = _Recorded(identifier)
    library = nccl_library.Cupy.__new__(nccl_library.Cupy)
    library._cupy = library._nccl = cupy

    class _Memory:
        nbytes = 12

        def __init__(self, address: int) -> None:
            self.__cuda_array_interface__ = {"data": (address, False), "strides": None}

    one: Any = _Memory(1000)
    other: Any = _Memory(2000)
    library.join(2, library.identifier(), 1).exchange([(0, one)], [(0, other)])
    assert cupy.calls == [
        ("join", 2, identifier, 1),
        ("start",),
        ("send", 1000, 12, 1, 0, 77),
        ("recv", 2000, 12, 1, 0, 77),
        ("end",),
    ]
