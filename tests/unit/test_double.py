"""The test double keeps its promises: real queues, poisoned memory, and an MPI of its own."""

from __future__ import annotations

import gc
import itertools
import threading
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.dlpack import from_dlpack

from hpcsync.device import dtype_of
from hpcsync.errors import DeviceError
from tests.double.device import Machine, machine
from tests.double.job import Rank, job
from tests.shim import host as shim

F32 = np.dtype("float32")
RANKS = 3


def test_what_a_stream_is_given_is_done_in_order() -> None:
    for seed in range(8):
        with machine(seed) as made:
            device = made.device()
            stream = device.stream()
            found: list[int] = []
            for number in range(20):
                stream.apply(partial(found.append, number))
            stream.synchronize()
            assert found == list(range(20))


def test_a_stream_does_not_wait_for_another_unless_told() -> None:
    with machine() as made:
        device = made.device()
        first, second = device.stream(), device.stream()
        gate = threading.Event()
        first.apply(gate.wait)
        event = first.record()
        second.synchronize()  # does not hang
        assert not event.ready()
        second.wait(event)
        after = second.record()
        assert not after.ready()
        gate.set()
        after.synchronize()
        assert event.ready()


def test_a_wait_is_for_the_record_of_its_time() -> None:
    with machine() as made:
        device, peer = made.device(0), made.device(1)
        event = device.shared_event()
        assert event.ready(), "never recorded"
        stream, gate = device.stream(), threading.Event()
        stream.record(event)
        foreign = peer.open_event(event.handle)
        other = peer.stream()
        other.wait(foreign)
        ended = other.record()
        stream.apply(gate.wait)
        stream.record(event)
        ended.synchronize()
        assert not foreign.ready()
        gate.set()
        foreign.synchronize()


def test_memory_is_poisoned_when_made_and_when_freed() -> None:
    with machine() as made:
        device = made.device()
        array = device.empty(1024)
        assert np.isnan(device.read(array.view(F32))).all()
        device.write(array.view(F32), np.ones(256, F32))
        tensor = from_dlpack(array).view(torch.float32)
        part = array[:512]
        del array
        assert device.read(part)[:4].view(F32) == 1, "a slice holds it"
        bare = made.pool.bare(part._raw)
        del part
        assert tensor[255] == 1, "a tensor holds it"
        del tensor
        gc.collect()
        assert (bare == 0xFF).all()
        again = device.empty(1000)
        assert again._raw.ctypes.data == bare.ctypes.data, "it is given out anew"


def test_queued_work_does_not_hold_arrays() -> None:
    with machine() as made:
        device = made.device()
        stream, gate = device.stream(), threading.Event()
        source, out = device.empty(256), device.empty(256)
        device.write(source, np.arange(256) % 256)
        made.synchronize()
        stream.apply(gate.wait)
        stream.copy(out, source)
        del source
        gate.set()
        assert (device.read(out) == 0xFF).all()


def test_the_host_cannot_look() -> None:
    with machine() as made:
        array = made.device().empty(64).view(F32)
        assert (array.shape, array.dtype, array.nbytes) == ((16,), F32, 64)
        for look in (
            lambda: np.asarray(array),
            lambda: array[0],
            lambda: list(array),
            lambda: array + array,
            lambda: bool(array),
            lambda: array.tobytes(),
            lambda: memoryview(array),
        ):
            with pytest.raises(TypeError):
                look()


def test_only_device_and_pinned_memory_goes_through_streams() -> None:
    with machine() as made:
        device = made.device()
        stream = device.stream()
        out, pinned = device.empty(64), device.pinned(64)
        pinned[:] = 7
        stream.copy(out, pinned)
        assert (device.read(out) == 7).all()
        with pytest.raises(AssertionError, match="neither"):
            stream.copy(out, np.zeros(64, np.uint8))


def test_memory_of_peers() -> None:
    with machine(unreachable=frozenset({("double:0", "double:2")})) as made:
        first, second, third = (made.device(number) for number in range(3))
        array = first.empty(256, shared=True)
        seen = second.open(first.offer(array[64:]))
        stream = second.stream()
        stream.fill(seen, 3)
        assert (first.read(array)[64:] == 3).all()
        with pytest.raises(DeviceError):
            third.open(first.offer(array))


def test_an_error_of_a_stream_is_told() -> None:
    made = Machine()
    stream = made.device().stream()
    stream.apply(lambda: 1 / 0)
    with pytest.raises(AssertionError, match="division"):
        stream.synchronize()
    made.close()


def test_there_is_only_so_much_memory() -> None:
    with machine(capacity=2048) as made:
        device = made.device()
        held = device.empty(2000)
        with pytest.raises(DeviceError):
            device.empty(512)
        del held
        device.empty(512)


@pytest.mark.skipif(bool(shim.MISSING), reason=shim.MISSING)
def test_kernels_are_work_of_the_stream_that_the_thread_is_with() -> None:
    with machine() as made:
        device = made.device()
        stream, gate = device.stream(), threading.Event()
        x, y, out = (device.empty(4096).view(F32) for _ in range(3))
        for array in (x, y):
            device.write(array, np.arange(1024, dtype=F32), stream)
        stream.apply(gate.wait)
        with stream:
            addresses = [each.__cuda_array_interface__["data"][0] for each in (x, y, out)]
            device.kernels.blocks.add("f32", addresses[2:], addresses[:2], 1024, 2.0)
        assert not stream.record().ready()
        gate.set()
        assert (device.read(out) == np.arange(1024)).all()
        with pytest.raises(AssertionError, match="outside"):
            device.kernels.blocks.add("f32", addresses[2:], addresses[:2], 1024)


# ---- MPI --------------------------------------------------------------------------------


def test_control_messages() -> None:
    def body(rank: Rank) -> object:
        runtime = rank.runtime
        runtime.barrier()
        gathered = runtime.allgather_object("x" * rank.rank)
        told = runtime.bcast(rank.rank, 1)
        sums = runtime.allreduce_scalar([rank.rank, 1.0])
        return gathered, told, sums, runtime.gather_object(rank.rank, 2)

    for seed in range(4):
        with job(RANKS, seed) as made:
            results = made.run(body)
        for rank, (gathered, told, sums, collected) in enumerate(results):
            assert gathered == ["", "x", "xx"]
            assert (told, sums) == (1, [3.0, 3.0])
            assert collected == ([0, 1, 2] if rank == 2 else None)


@pytest.mark.parametrize(
    ("per_node", "algorithm"),
    [*itertools.product([1, 2, 4], ["auto", "ring", "halving", "native"]), (4, "direct")],
)
def test_exchanges_of_the_host(per_node: int, algorithm: str) -> None:
    def body(rank: Rank) -> bool:
        collectives = rank.collectives(device=False)
        buffer = collectives.buffer(20_000)
        values = buffer.own.view(np.float32)
        sums = collectives.allreduce(buffer, dtype_of("float32"), algorithm=algorithm)
        right = True
        for turn in range(3):
            values[:] = np.arange(5000) + rank.rank + turn
            sums.start()
            sums.wait()
            right &= bool((values == 4 * (np.arange(5000) + turn) + 6).all())
            rank.runtime.barrier()
        return right

    with job(4, (per_node, algorithm), per_node=per_node) as made:
        assert made.run(body) == [True] * 4


def test_messages_of_device_memory_only_where_mpi_takes_it() -> None:
    def body(rank: Rank) -> None:
        array = rank.device.empty(64)
        rank.comm.Isend([array, "BYTE"], 1 - rank.rank).Free()

    with pytest.raises(AssertionError, match="device memory"), job(2, aware=False) as made:
        made.run(body)


def test_a_send_that_is_not_over_shows_what_is_written_meanwhile() -> None:
    def body(rank: Rank) -> bool:
        data = np.full(1000, rank.rank, np.uint8)
        if rank.rank:
            request = rank.comm.Irecv([data, "BYTE"], 0, 5)
            request.Wait()
            return bool((data == 0).all())
        request = rank.comm.Isend([data, "BYTE"], 1, 5)
        data[:] = 9
        request.Wait()
        return True

    found = set()
    for seed in range(12):
        with job(2, seed) as made:
            found.add(made.run(body)[1])
    assert False in found


def test_what_one_rank_raises_ends_the_others() -> None:
    def body(rank: Rank) -> None:
        if rank.rank == 1:
            raise ValueError("one of them")
        rank.runtime.barrier()

    with pytest.raises(ValueError, match="one of them"), job(RANKS) as made:
        made.run(body)


def test_a_message_stays_what_it_was_when_its_send_starts_again() -> None:
    turns = 30

    def body(rank: Rank) -> list[int]:
        data, other = np.zeros(8, np.uint8), 1 - rank.rank
        begin = rank.comm.Recv_init if rank.rank else rank.comm.Send_init
        request, found = begin([data, "BYTE"], other, 5), []
        for turn in range(turns):
            if not rank.rank:
                data[:] = turn
            request.Start()
            request.Wait()
            found.append(int(data[0]))
        return found

    with job(2, "again") as made:
        assert made.run(body)[1] == [*range(turns)]
