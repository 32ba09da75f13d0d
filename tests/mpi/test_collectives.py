"""Collectives over levels: every algorithm and placement, bits that do not depend on either,
what happens where shared memory is short, and how a missing rank is told."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

from hpcsync import schedules
from hpcsync.collectives import Collective, Collectives, choice
from hpcsync.collectives.eager import Eager
from hpcsync.config import ALGORITHMS, RAIL_ALGORITHMS, CommConfig
from hpcsync.device import dtype_of
from hpcsync.device.cpu import narrow, widen
from hpcsync.errors import CollectiveTimeout, UserError
from hpcsync.launch import Runtime
from hpcsync.topology import Topology
from hpcsync.transports.base import Buffer, private_buffer

pytestmark = pytest.mark.mpi

Array = np.ndarray[Any, Any]
Open = Callable[..., Collectives]
WIDTHS = (0, 1, 2, 3)
TINY = 1 / 1024  # MiB: many segments from small arrays


def topology_of(size: int, width: int) -> Topology:
    return Topology.group(["host"] * size, width)


@pytest.fixture
def opened() -> Iterator[Open]:
    """Makes the Collectives of a placement, and closes them."""
    runtimes: list[Runtime] = []

    def make(placed: int | Topology = 0, timeout_s: float = 60.0, **comm: Any) -> Collectives:
        size = MPI.COMM_WORLD.size
        topology = placed if isinstance(placed, Topology) else topology_of(size, placed)
        runtime = Runtime(MPI.COMM_WORLD.Dup(), topology, timeout_s)
        runtimes.append(runtime)
        return Collectives(runtime, CommConfig(timeout_s=timeout_s, **comm))

    yield make
    for runtime in runtimes:
        runtime.close()


def numbers(rank: int, count: int, seed: int = 0) -> Array:
    """What a rank brings: float32 of several magnitudes, so that another order gives other bits."""
    draw = np.random.default_rng([seed, rank])
    return (draw.normal(size=count) * 10.0 ** draw.integers(-3, 4, count)).astype(np.float32)


def whole(rank: int, count: int, seed: int = 0) -> Array:
    """Whole numbers, whose sums are exact in every type."""
    return np.random.default_rng([seed, rank]).integers(-9, 10, count).astype(np.float64)


def total(size: int, count: int, seed: int = 0) -> Array:
    return np.sum([whole(rank, count, seed) for rank in range(size)], axis=0)


def reduced(
    collectives: Collectives, values: Array, name: str = "float32", average: bool = True, **how: Any
) -> Array:
    """Allreduce of ``values`` in a buffer of its own."""
    dtype = dtype_of(name)
    buffer = collectives.buffer(values.size * dtype.itemsize)
    collective = collectives.allreduce(buffer, dtype, average=average, **how)
    stored = buffer.own.view(dtype.storage)
    stored[:] = narrow(values.astype(np.float32), dtype) if name == "bfloat16" else values
    collective.start()
    collective.wait()
    out = widen(stored, dtype) if name == "bfloat16" else stored
    result = out.copy()
    collective.close()
    return result


@pytest.mark.parametrize("transport", ["auto", "mpi_host"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_and_placement(
    opened: Open, algorithm: str, width: int, transport: str
) -> None:
    collectives = opened(width, algorithm=algorithm, node_transport=transport, segment_mb=TINY)
    rank, size = collectives.runtime.rank, collectives.runtime.size
    for count in (0, 1, 17, 1000, 3001):
        for name in ("float32", "bfloat16"):
            got = reduced(collectives, whole(rank, count), name, average=False)
            np.testing.assert_array_equal(got, total(size, count))


@pytest.mark.parametrize("width", [2, 3])
@pytest.mark.parametrize("rail", RAIL_ALGORITHMS)
def test_every_algorithm_of_the_rail(opened: Open, rail: str, width: int) -> None:
    collectives = opened(width, rail_algorithm=rail, segment_mb=TINY)
    rank, size = collectives.runtime.rank, collectives.runtime.size
    for name in ("float32", "float64", "bfloat16", "float16", "int32"):
        got = reduced(collectives, whole(rank, 2001), name, average=False)
        np.testing.assert_array_equal(got, total(size, 2001))


@pytest.mark.parametrize("width", WIDTHS)
def test_mean(opened: Open, width: int) -> None:
    collectives = opened(width)
    rank, size = collectives.runtime.rank, collectives.runtime.size
    truth = np.mean([numbers(other, 999).astype(np.float64) for other in range(size)], axis=0)
    got = reduced(collectives, numbers(rank, 999))
    np.testing.assert_allclose(got, truth, rtol=1e-5, atol=1e-5)
    mine = got.tobytes()
    assert collectives.runtime.allgather_object(mine) == [mine] * size


@pytest.mark.parametrize("width", [0, 1, 2])
def test_a_mean_of_float16_does_not_overflow_between_levels(opened: Open, width: int) -> None:
    collectives = opened(width, rail_algorithm="direct")
    got = reduced(collectives, np.full(50, 60000.0), "float16")
    np.testing.assert_array_equal(got, 60000.0)


def test_nodes_whose_ranks_take_turns(opened: Open) -> None:
    """Hosts in another order than ranks: a rail stands in the order of nodes, not of ranks."""
    size = MPI.COMM_WORLD.size
    if size < 4:
        pytest.skip("two nodes whose ranks take turns need 4 ranks")
    for hosts in (["a", "b", "b", "a"], ["a", "b", "a", "b"], ["b", "a", "a", "a"]):
        collectives = opened(Topology.group(hosts), segment_mb=TINY)
        rank = collectives.runtime.rank
        assert collectives.node.comm.rank == collectives.topology.local_rank(rank)
        if collectives.rail.ranks:
            assert collectives.rail.ranks[collectives.rail.comm.rank] == rank
        got = reduced(collectives, whole(rank, 777), average=False)
        np.testing.assert_array_equal(got, total(size, 777))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_reproducible_bits_depend_on_neither_placement_nor_pieces(opened: Open, name: str) -> None:
    found: dict[str, bytes] = {}
    for width in WIDTHS:
        for segment in (2.0, TINY):
            for transport in ("auto", "mpi_host"):
                collectives = opened(
                    width, reproducible=True, segment_mb=segment, node_transport=transport
                )
                rank = collectives.runtime.rank
                got = reduced(collectives, numbers(rank, 3001), name)
                found[f"{width} {segment} {transport}"] = got.tobytes()
                # Any offset in a buffer: where a bucket puts a parameter.
                dtype = dtype_of(name)
                buffer = collectives.buffer(4096 * dtype.itemsize)
                offset = 64 * dtype.itemsize
                moved = collectives.allreduce(
                    buffer, dtype, count=3001, offset=offset, average=True
                )
                place = buffer.own[offset:].view(dtype.storage)[:3001]
                mine = numbers(rank, 3001)
                place[:] = narrow(mine, dtype) if name == "bfloat16" else mine
                moved.start()
                moved.wait()
                out = widen(place, dtype) if name == "bfloat16" else place
                found[f"{width} {segment} {transport} moved"] = out.tobytes()
    assert len(set(found.values())) == 1, {key: hash(bits) for key, bits in found.items()}


def test_reproducible_adds_in_rank_order(opened: Open) -> None:
    collectives = opened(2, reproducible=True)
    rank, size = collectives.runtime.rank, collectives.runtime.size
    assert (
        choice.resolve(collectives.config, collectives.topology, dtype_of("float32"), "ring")
        == "direct"
    )
    wanted = numbers(0, 500)
    for other in range(1, size):
        wanted = wanted + numbers(other, 500)
    got = reduced(collectives, numbers(rank, 500), average=False)
    np.testing.assert_array_equal(got, wanted)


def test_auto_and_what_native_cannot_add(opened: Open) -> None:
    size = MPI.COMM_WORLD.size
    flat, split = opened(0), opened(1)

    def chosen(group: Collectives, name: str, dtype: str) -> str:
        return choice.resolve(group.config, group.topology, dtype_of(dtype), name)

    assert chosen(flat, "auto", "float32") == "direct"
    assert chosen(split, "auto", "float32") == ("direct" if size == 1 else "hierarchical")
    assert chosen(flat, "native", "float64") == "native"
    assert chosen(flat, "native", "bfloat16") == "direct"
    assert flat.describe_transports() == ({} if size == 1 else {"node": "shared_memory"})
    assert split.describe_transports() == ({} if size == 1 else {"rail": "mpi_host"})


def test_memory_is_shared_where_ranks_share_a_node(opened: Open) -> None:
    size = MPI.COMM_WORLD.size
    assert opened(0).buffer(100).shared == (size > 1)
    assert opened(2).buffer(100).shared == (size > 1)
    assert not opened(1).buffer(100).shared
    assert not opened(0, node_transport="mpi_host").buffer(100).shared


def test_bytes_across_the_slow_link(opened: Open) -> None:
    """Each node sends and receives the buffer once in all, however it is cut."""
    size = MPI.COMM_WORLD.size
    if size < 4:
        pytest.skip("two nodes of two ranks need 4 ranks")
    nbytes = 4 * 4096
    for segment in (2.0, TINY):
        collectives = opened(2, segment_mb=segment)
        buffer = collectives.buffer(nbytes)
        collective = collectives.allreduce(buffer, dtype_of("float32"))
        sent = collectives.runtime.allgather_object(collective.internode_bytes)
        assert sum(sent) == 2 * nbytes
        assert max(sent) == min(sent)
    flat = opened(0)
    alone = flat.allreduce(flat.buffer(nbytes), dtype_of("float32"))
    assert alone.internode_bytes == 0


def test_many_in_flight_in_any_order_of_start(opened: Open) -> None:
    for width in WIDTHS:
        collectives = opened(width, segment_mb=TINY, credit_mb=1e-6)
        rank, size = collectives.runtime.rank, collectives.runtime.size
        counts = [1, 300, 5, 2000, 64, 999]
        bound: list[tuple[Buffer, Collective]] = []
        for index, count in enumerate(counts):
            buffer = collectives.buffer(4 * count)
            label = f"bucket {index}"
            bound.append((buffer, collectives.allreduce(buffer, dtype_of("float32"), label=label)))
        for run in range(2):
            for index, (buffer, _) in enumerate(bound):
                buffer.own.view(np.float32)[:] = whole(rank, counts[index], run)
            order = np.random.default_rng([rank, run]).permutation(len(counts))
            for index in order:
                assert bound[index][1].done
                bound[index][1].start(priority=int(index) % 3)
            for buffer, collective in bound:
                collective.wait()
                assert collective.done
                assert collective.finished_s >= collective.started_s
                count = buffer.nbytes // 4
                np.testing.assert_array_equal(buffer.own.view(np.float32), total(size, count, run))


def test_eager_takes_any_array_again_and_again(opened: Open) -> None:
    for width in (0, 2):
        eager = Eager(opened(width))
        rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
        names = ("float16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64")
        for name in names:
            for average in (False, True) if name.startswith("float") else (False,):
                counts = [0, 1, 3000]
                if name == "float32":  # every size of the staging buffer, and more than it holds
                    counts += [100_000, 140_000, 1_100_000]
                for count in counts:
                    values = (whole(rank, count) + 10).astype(name)
                    eager.allreduce(torch.from_numpy(values.view(np.uint8)), name, average=average)
                    wanted = (total(size, count) + 10 * size) / (size if average else 1)
                    np.testing.assert_array_equal(values, wanted.astype(name))
        with pytest.raises(ValueError, match="cannot be reduced"):
            eager.allreduce(torch.zeros(4, dtype=torch.uint8), "bool", average=False)


def settle(collectives: Collectives, collective: Collective, begun: bool) -> None:
    """Let the messages of a stuck run arrive, or a later test would get them.

    A rank that has not ``begun`` to send any posts those of the first step now.
    """
    for segment in collective._segments:
        for stage in segment.stages:
            if not begun and stage.program.__class__.__name__ == "_Messages":
                next(iter(stage.program.run()))
    while collectives._completions._requests:
        collectives._completions.poll()
        time.sleep(1e-4)
    MPI.COMM_WORLD.Barrier()


@pytest.mark.parametrize(("width", "transport"), [(0, "auto"), (0, "mpi_host"), (1, "auto")])
def test_a_missing_rank_is_named_in_time(opened: Open, width: int, transport: str) -> None:
    collectives = opened(width, timeout_s=1.0, node_transport=transport, rail_algorithm="direct")
    runtime = collectives.runtime
    if runtime.size == 1:
        pytest.skip("a rank alone waits for nobody")
    last = runtime.size - 1
    buffer = collectives.buffer(4 << 16)
    collective = collectives.allreduce(buffer, dtype_of("float32"), label="bucket 7")
    if runtime.rank != last:
        collective.start()
        with pytest.raises(CollectiveTimeout) as told:
            collective.wait()
        text = str(told.value)
        assert "no collective moved for 1 s (comm.timeout_s = 1)" in text
        assert f"bucket 7 segment 0 at level {'rail' if width else 'node'}" in text
        assert f"rank {last}" in text
        for present in set(range(last)) - {runtime.rank}:
            assert f"rank {present}" not in text
        with pytest.raises(CollectiveTimeout):  # and it stays said
            collective.wait()
    MPI.COMM_WORLD.Barrier()
    settle(collectives, collective, begun=runtime.rank != last)


def test_a_stuck_node_is_seen_from_another(opened: Open) -> None:
    """The missing rank's own node names it; the others name the one they wait for."""
    collectives = opened(2, timeout_s=1.0, rail_algorithm="direct")
    runtime = collectives.runtime
    if runtime.size < 4:
        pytest.skip("two nodes of two ranks need 4 ranks")
    collective = collectives.allreduce(
        collectives.buffer(1 << 18), dtype_of("float32"), label="bucket 0"
    )
    if runtime.rank != 3:
        collective.start()
        with pytest.raises(CollectiveTimeout) as told:
            collective.wait()
        level, whom = ("node", 3) if runtime.rank == 2 else ("rail", runtime.rank + 2)
        assert f"bucket 0 segment 0 at level {level}" in str(told.value)
        assert f"rank {whom}" in str(told.value)
    MPI.COMM_WORLD.Barrier()
    settle(collectives, collective, begun=runtime.rank < 2)


def test_a_missing_control_message_is_told() -> None:
    # Not closed: MPI cannot free a communicator on which a barrier was given up.
    size = MPI.COMM_WORLD.size
    runtime = Runtime(MPI.COMM_WORLD.Dup(), topology_of(size, 0), timeout_s=0.5)
    if runtime.size == 1:
        pytest.skip("a rank alone waits for nobody")
    if runtime.rank == 0:
        with pytest.raises(CollectiveTimeout, match=r"of rank 0 .*timeout_s = 0\.5.*is missing"):
            runtime.barrier()
        MPI.COMM_WORLD.Barrier()
    else:
        MPI.COMM_WORLD.Barrier()
        runtime.barrier()  # the late ranks find that everyone else has been here


class Full:
    """/dev/shm without room, from the given call on."""

    def __init__(self, good: int = 0) -> None:
        self.good = good

    def __call__(self, handle: int, start: int, length: int) -> None:
        if self.good:
            self.good -= 1
            os.ftruncate(handle, length)
        else:
            raise OSError(28, "No space left on device")


@pytest.mark.parametrize("width", [0, 2, 3])
def test_without_room_all_ranks_fall_back_and_rank_0_warns(
    opened: Open,
    width: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    collectives = opened(width)
    rank, size = collectives.runtime.rank, collectives.runtime.size
    if size == 1:
        pytest.skip("a rank alone shares no memory")
    first = collectives.buffer(4000)  # while there still is room
    if rank == size - 1:
        monkeypatch.setattr(os, "posix_fallocate", Full())
    buffer = collectives.buffer(4000)
    told = capfd.readouterr().err
    assert first.shared
    assert not buffer.shared
    assert collectives.shared is None
    assert told.count("hpcsync: warning: /dev/shm: No space left on device") == (rank == 0)
    assert ("use mpi_host instead" in told) == (rank == 0)
    assert set(collectives.describe_transports().values()) == {"mpi_host"}
    monkeypatch.undo()
    for each in (buffer, first):  # the older one is bound anew, without shared memory
        collective = collectives.allreduce(each, dtype_of("float32"))
        each.own.view(np.float32)[:] = whole(rank, 1000)
        collective.start()
        collective.wait()
        np.testing.assert_array_equal(each.own.view(np.float32), total(size, 1000))


@pytest.mark.parametrize("width", [0, 3])
def test_shared_memory_that_was_asked_for_is_an_error_on_all_ranks(
    opened: Open, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    collectives = opened(width, node_transport="shared_memory")
    if collectives.runtime.size == 1:
        assert not collectives.buffer(100).shared
        return
    if collectives.runtime.rank == 0:
        monkeypatch.setattr(os, "posix_fallocate", Full())
    with pytest.raises(UserError, match=r"comm\.transport\.node: shared_memory .*--shm-size"):
        collectives.buffer(4000)


def test_control_messages(opened: Open) -> None:
    runtime = opened().runtime
    rank, size = runtime.rank, runtime.size
    assert runtime.allreduce_scalar([rank, -rank]) == [sum(range(size)), -sum(range(size))]
    assert runtime.allreduce_scalar([rank], "max") == [size - 1]
    assert runtime.allreduce_scalar([rank], "min") == [0]
    assert runtime.allreduce_scalar([]) == []
    big = {"rank": rank, "text": "x" * 100_000 * rank}
    for root in (0, size - 1):
        assert runtime.bcast(big, root) == {"rank": root, "text": "x" * 100_000 * root}
    assert runtime.allgather_object(big)[-1]["rank"] == size - 1
    assert runtime.allgather_object(None) == [None] * size
    array = np.full((3, 5), rank, np.int16)
    runtime.broadcast_array(array, size - 1)
    assert (array == size - 1).all()
    runtime.barrier()


def test_segments_and_bounds(opened: Open) -> None:
    """What is on the wire is what was cut: all elements, once."""
    collectives = opened(1, segment_mb=TINY)
    assert choice.segments(collectives.config, collectives.topology, 1 << 20) == (
        1024 if MPI.COMM_WORLD.size > 1 else 64
    )
    bounds = schedules.chunk_bounds(1000, 7, 16)
    assert (bounds[0], bounds[-1]) == (0, 1000)
    config = dataclasses.replace(collectives.config, segment_mb=1000.0)
    assert choice.segments(config, collectives.topology, 1 << 20) == 1


def test_a_buffer_bound_in_parts(opened: Open) -> None:
    """Collectives over parts of one buffer do not disturb each other."""
    collectives = opened(2)
    rank, size = collectives.runtime.rank, collectives.runtime.size
    buffer = collectives.buffer(4 * 3000)
    memory = buffer.own.view(np.float32)
    parts = [(0, 7), (64, 1000), (1100, 1900)]
    bound = [
        collectives.allreduce(buffer, dtype_of("float32"), count=count, offset=4 * start)
        for start, count in parts
    ]
    memory[:] = -1
    for start, count in parts:
        memory[start : start + count] = whole(rank, count)
    collectives.runtime.barrier()
    for collective in bound:
        collective.start()
    for (start, count), collective in zip(parts, bound, strict=True):
        collective.wait()
        np.testing.assert_array_equal(memory[start : start + count], total(size, count))
    assert (memory[7:64] == -1).all()


def test_waiting_costs_little_of_a_core(opened: Open) -> None:
    """Not a timing: a rank that spins would use all of the time it waits."""
    collectives = opened(0)
    runtime = collectives.runtime
    if runtime.size == 1:
        pytest.skip("a rank alone waits for nobody")
    buffer = collectives.buffer(4000)
    collective = collectives.allreduce(buffer, dtype_of("float32"))
    if runtime.rank == runtime.size - 1:
        time.sleep(1.0)
    before = time.process_time()
    collective.start()
    collective.wait()
    assert time.process_time() - before < 0.5


def test_private_memory_can_be_reduced_too(opened: Open) -> None:
    collectives = opened(0)
    rank, size = collectives.runtime.rank, collectives.runtime.size
    buffer = private_buffer(400)
    buffer.own.view(np.float32)[:] = whole(rank, 100)
    collective = collectives.allreduce(buffer, dtype_of("float32"))
    collective.start()
    collective.wait()
    np.testing.assert_array_equal(buffer.own.view(np.float32), total(size, 100))
