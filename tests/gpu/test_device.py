"""The CUDA device on a real one: streams, events, memory, and torch's and CuPy's view of them."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from torch.utils.dlpack import from_dlpack

from hpcsync.device import Device, dtype_of
from hpcsync.device.cpu import CpuDevice
from hpcsync.device.cuda_kernels import SUMS
from hpcsync.device.cuda_launch import address_of
from hpcsync.errors import DeviceError
from hpcsync.parallel.placement import get
from tests.gpu.ranks import busy, read, write

pytestmark = pytest.mark.gpu

N = 100_003


@pytest.fixture(scope="module")
def device() -> Device:
    return get("cuda")


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("n", [1, 257, N])
def test_sums(device: Device, name: str, n: int) -> None:
    kind = dtype_of(name)
    random = np.random.default_rng(n)
    values = [random.integers(0, 200, n).astype(kind.storage) for _ in range(3)]
    if name == "bfloat16":
        values = [each.view(np.uint16) for each in values]
    arrays = [device.empty(n * kind.itemsize).view(kind.storage) for _ in values]
    for array, each in zip(arrays, values, strict=True):
        write(device, array, each)
    divisor = 3 if kind.floating else 1
    wanted = np.empty_like(values[0])
    CpuDevice().reduce([wanted], values, kind, divisor)
    stream = device.stream()
    stream.reduce(arrays[1:], arrays, kind, divisor)
    device.current().wait(stream.record())
    for array in arrays[1:]:
        np.testing.assert_array_equal(read(device, array).view(kind.storage), wanted)


def test_torch_sees_the_same_memory(device: Device) -> None:
    array = device.empty(4 * N, shared=True).view(np.float32)
    tensor = from_dlpack(array[3:])
    assert tensor.data_ptr() == address_of(array) + 12
    tensor.fill_(2.5)
    assert (read(device, array)[3:] == 2.5).all()


def test_a_stream_waits_for_the_computation(device: Device) -> None:
    """What is read is what the computation makes late, though the host waits for nothing."""
    stream, host = device.stream(), device.pinned(4 * N)
    for run in range(5):
        busy()
        made = torch.full((N,), float(run), device="cuda")
        stream.wait(device.current().record())
        stream.copy(host, _bytes(made))
        end = stream.record()
        end.synchronize()
        assert end.ready()
        assert (host.view(np.float32) == run).all()


def test_the_computation_waits_for_a_stream(device: Device) -> None:
    stream, memory = device.stream(), device.empty(4 * N)
    tensor = from_dlpack(memory.view(np.float32))
    for run in range(5):
        stream.apply(busy)
        stream.apply(lambda run=run: tensor.fill_(float(run)))
        device.current().wait(stream.record())
        assert float((tensor + 1).sum()) == N * (run + 1)
        device.stream().wait(device.current().record())


def test_kernels_and_torch_share_a_queue(device: Device) -> None:
    stream, kind = device.stream(), dtype_of("float32")
    array = device.empty(4 * N).view(np.float32)
    tensor = from_dlpack(array)
    with stream:
        busy()
        tensor.fill_(1.0)
        for _ in range(4):
            stream.reduce([array], [array, array], kind)
            tensor.add_(1.0)
    stream.synchronize()
    assert float(tensor.mean()) == 31.0


def test_events_are_not_ready_before_their_work(device: Device) -> None:
    stream = device.stream()
    stream.apply(lambda: torch.cuda._sleep(2_000_000_000))  # a second or so
    event = stream.record()
    early = event.ready()
    event.synchronize()
    assert event.ready()
    assert not early, "the work was over before it could be asked"


def test_timed_events_are_between_the_hosts_readings(device: Device) -> None:
    stream = device.stream()
    stream.record(timed=True).synchronize()
    for _ in range(5):
        before = time.perf_counter_ns()
        first = stream.record(timed=True)
        stream.apply(busy)
        last = stream.record(timed=True)
        last.synchronize()
        after = time.perf_counter_ns()
        assert before - 200_000 <= first.reached_ns() <= last.reached_ns() <= after + 200_000


def test_any_thread_may_call(device: Device) -> None:
    faults: list[BaseException] = []

    def work() -> None:
        try:
            stream, memory = device.stream(), device.empty(64)
            stream.fill(memory, 5)
            host = device.pinned(64)
            stream.copy(host, memory)
            stream.synchronize()
            assert (host == 5).all()
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_no_room_is_told_in_one_line(device: Device) -> None:
    for shared in (False, True):
        with pytest.raises(DeviceError, match="has no room for 4194304 MiB") as refused:
            device.empty(4 << 40, shared=shared)
        assert "\n" not in str(refused.value)
    assert device.empty(16, shared=True).nbytes == 16


def _bytes(tensor: torch.Tensor) -> object:
    """A tensor as the device's arrays are."""
    import cupy

    return cupy.asarray(tensor).view(np.uint8)
