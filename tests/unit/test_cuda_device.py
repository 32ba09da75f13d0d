"""The CUDA device with stand-ins for torch.cuda and CuPy: what it asks of them, and its errors."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from hpcsync.device import cuda_events, cuda_memory
from hpcsync.device.base import dtype_of
from hpcsync.device.cpu import CpuDevice
from hpcsync.device.cuda import CudaDevice, CudaStream
from hpcsync.device.cuda_kernels import SUMS
from hpcsync.device_probe.trials import FailedError, sums
from hpcsync.errors import DeviceError
from tests.fake_cuda import Fake, install
from tests.shim import host

pytestmark = pytest.mark.skipif(bool(host.MISSING), reason=host.MISSING)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return install(monkeypatch)


@pytest.fixture
def device(fake: Fake) -> CudaDevice:
    return CudaDevice(0)


def test_one_device_is_chosen(device: CudaDevice) -> None:
    assert (device.name, device.queued, device.identity) == ("cuda", True, "GPU-one")
    assert device.kernels is device.kernels
    assert device.describe() == "cuda: NVIDIA H200, 139 GiB"


def test_streams_of_communication_go_round_and_have_priority(
    device: CudaDevice, fake: Fake
) -> None:
    made = [device.stream() for _ in range(8)]
    assert made[:4] == made[4:]
    assert len({stream.handle for stream in made}) == 4
    assert all(fake.streams[stream.handle].priority < 0 for stream in made)
    assert device.current().handle == 0
    assert device.current() is device.current()


def test_what_is_with_a_stream_goes_there(device: CudaDevice, fake: Fake) -> None:
    outer, inner = device.stream(), device.stream()
    with outer:
        with inner, inner:
            assert device.current().handle == inner.handle
            assert fake.local.kernels == [outer.handle, inner.handle, inner.handle]
        assert device.current().handle == outer.handle
    assert device.current().handle == 0
    assert fake.local.kernels == []


@pytest.mark.parametrize("name", SUMS)
def test_sums_are_those_of_the_host(device: CudaDevice, name: str) -> None:
    kind, stream, n = dtype_of(name), device.stream(), 300
    random = np.random.default_rng(3)
    arrays = [device.empty(n * kind.itemsize).view(kind.storage) for _ in range(3)]
    for array in arrays:
        array.values[:] = random.integers(0, 100, n).astype(kind.storage)
    sources = [array.values.copy() for array in arrays]
    divisor = 3 if kind.floating else 1
    wanted = np.empty_like(sources[0])
    CpuDevice().reduce([wanted], sources, kind, divisor)
    stream.reduce(arrays[1:], arrays, kind, divisor)
    for array, held in zip(arrays, [sources[0], wanted, wanted], strict=True):
        np.testing.assert_array_equal(array.values, held)


def test_too_many_buffers_are_refused_in_one_line(device: CudaDevice) -> None:
    array = device.empty(4).view(np.float32)
    with pytest.raises(
        DeviceError, match=r"at most 64 buffers at once, not 65; set comm.algorithm"
    ):
        device.stream().reduce([array], [array] * 65, dtype_of("float32"))


def test_work_waits_for_events_and_the_host_for_none(device: CudaDevice, fake: Fake) -> None:
    fake.prompt = False
    first, second = device.stream(), device.stream()
    memory, host_memory = device.empty(16), device.pinned(16)
    host_memory[:] = 0
    second.fill(memory, 1)
    middle = second.record()
    first.wait(middle)
    first.copy(host_memory, memory)
    end = first.record()
    assert not middle.ready()
    assert not end.ready()
    fake.run()
    assert middle.ready()
    assert end.ready()
    end.synchronize()
    assert (host_memory == 1).all()


def test_memory_is_safe_in_all_streams(device: CudaDevice, fake: Fake) -> None:
    """torch may give a block whose last use is still queued in the computation's stream."""
    fake.prompt, fake.lent[:] = False, []
    before, stream, host_memory = device.pinned(8), device.stream(), device.pinned(8)
    before[:], host_memory[:] = 1, 0
    device.current().copy(host_memory, before)
    memory = device.empty(8)
    stream.copy(memory, host_memory)
    fake.streams[stream.handle].step()
    assert (host_memory == 0).all()
    fake.run()
    assert (memory.values == 1).all()
    assert [each.cuda_stream for each in fake.lent] == [each.handle for each in device._own]
    with stream:
        assert device.current() is stream
        device.empty(8)
    assert len(fake.lent) == len(device._own), "in a stream of ours the pool has its order"


def test_copies_have_streams_of_their_own(device: CudaDevice) -> None:
    others = {device.stream().handle for _ in range(20)}
    down, up = device.copies()
    assert len({down.handle, up.handle} - others) == 2
    assert device.copies() == (down, up)


def test_events_of_the_host_are_past(device: CudaDevice) -> None:
    device.stream().wait(CpuDevice().current().record())


def test_nothing_to_copy_is_not_asked_for(device: CudaDevice) -> None:
    empty = device.empty(0)
    device.stream().copy(empty, device.empty(0))
    device.stream().fill(empty, 0)
    with pytest.raises(AssertionError, match="equal length"):
        device.stream().copy(device.empty(4), device.empty(8))


def test_every_thread_is_told_its_device(device: CudaDevice) -> None:
    faults: list[BaseException] = []
    stream, memory = device.stream(), device.empty(8)

    def work() -> None:
        try:
            stream.fill(memory, 3)
            assert stream.record().ready()
            device.empty(4, shared=True)
            with stream:
                pass
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not faults


class Operand:
    """A torch operation that notes the stream it was done in."""

    def __init__(self, device: CudaDevice) -> None:
        self.device = device

    def __call__(self) -> None:
        seen.append(self.device.current().handle)


seen: list[int] = []


def test_torch_operations_are_kept_until_they_are_done(device: CudaDevice, fake: Fake) -> None:
    def given(to: CudaStream) -> weakref.ref[Operand]:
        operand = Operand(device)
        to.apply(operand)
        assert seen.pop() == to.handle
        return weakref.ref(operand)

    fake.prompt = False
    stream = device.stream()
    first = given(stream)
    gc.collect()
    assert first() is not None
    fake.run()
    given(stream)
    gc.collect()
    assert first() is None
    last = given(device.current())
    gc.collect()
    assert last() is None, "torch keeps the order of its own stream"


def test_timed_events_stand_on_the_hosts_clock(device: CudaDevice, fake: Fake) -> None:
    stream = device.stream()
    for wait_ns in (0, 3_000_000_000):  # the second after the clock is to be aligned anew
        fake.clock_ns += wait_ns
        anchors = device.events
        event = stream.record(timed=True)
        reached = fake.clock_ns
        assert event.ready()
        assert abs(event.reached_ns() - reached) <= 2000
        assert anchors._clock is not None
        assert fake.clock_ns - anchors._clock.anchor().host_ns < 1_000_000


def test_a_busy_device_does_not_hold_the_clock_up(device: CudaDevice, fake: Fake) -> None:
    stream = device.stream()
    stream.record(timed=True)
    clock = device.events._clock
    assert clock is not None
    before = clock.anchor()
    fake.clock_ns += 3_000_000_000
    fake.prompt = False
    event = stream.record(timed=True)
    assert clock._anchor is before
    fake.run()
    assert abs(event.reached_ns() - fake.clock_ns) <= 100_000


def test_a_clock_that_cannot_be_renewed_is_not_tried_at_once(
    device: CudaDevice, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.stream().record(timed=True)
    clock = device.events._clock
    assert clock is not None
    tried: list[int] = []
    plain = clock._try

    def late(limit_ns: int) -> Any:
        tried.append(limit_ns)
        fake.clock_ns += 100_000
        return plain(limit_ns) if limit_ns > 100_000 else None

    monkeypatch.setattr(clock, "_try", late)
    before = clock.anchor()
    fake.clock_ns += 1_200_000_000
    assert [clock.anchor() for _ in range(100)] == [before] * 100
    assert tried == [60_000]
    fake.clock_ns += 50_000_000
    assert clock.anchor() is before
    assert tried == [60_000] * 2
    fake.clock_ns += 3_000_000_000  # it may be off by 90 us now
    assert clock.anchor() is not before
    assert tried[2] > 170_000
    fake.clock_ns += 3_600_000_000_000
    clock.anchor()
    assert tried[3] == 1_000_000, "nobody waits longer"


def test_a_device_that_reaches_no_event_is_told(
    device: CudaDevice, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.prompt = False
    monkeypatch.setattr(cuda_events, "now", lambda: fake.now() * 1_000_000)
    with pytest.raises(DeviceError, match="reached no event of an idle stream"):
        device.stream().record(timed=True)


def test_the_device_is_chosen_again_after_others_chose(device: CudaDevice, fake: Fake) -> None:
    fake.local.torch = fake.local.cupy = 1
    device.stream().record()
    fake.told()


def test_threads_give_work_to_one_stream(
    device: CudaDevice, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread sees work done, and takes what another has taken in between."""
    stream = device.stream()
    fake.prompt = False
    given = [Given() for _ in range(2)]
    alive = weakref.ref(given[1])
    for each in given:
        stream.apply(each)
    given.clear()
    del each
    events = [event for event, _ in stream._kept]
    asked: list[bool] = []

    def ready() -> bool:
        # What another thread would do here.
        asked.append(stream._kept_lock.acquire(blocking=False))
        if asked[-1]:
            stream._kept_lock.release()
            stream._kept.popleft()
        return len(asked) == 1

    monkeypatch.setattr(type(events[0]), "ready", lambda event: ready())
    stream.apply(lambda: None)
    assert not any(asked)
    gc.collect()
    assert alive() is not None, "its work is not done"


class Given:
    """Work that can be watched."""

    def __call__(self) -> None:
        pass


# ---- between processes -------------------------------------------------------------------------


def test_shared_memory_goes_through_a_handle_of_whole_blocks(
    device: CudaDevice, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = device.empty(1000, shared=True)
    assert all(len(block) % (2 << 20) == 0 for block in fake.memory.values())
    offer = device.offer(memory[100:200])
    monkeypatch.setattr(cuda_memory, "PROCESS", b"another process.")
    opened = device.open(offer)
    assert opened.nbytes == 100
    memory.values[:] = 7
    assert (opened.values == 7).all()
    assert len(fake.opened) == 1
    del opened
    gc.collect()
    assert not fake.opened, "closed with the last reference"
    taken = fake.room
    del memory
    gc.collect()
    assert fake.room == taken + (2 << 20)
    assert device.peak_bytes() == 1000 + (2 << 20)


def test_own_memory_and_events_are_opened_without_cuda(device: CudaDevice, fake: Fake) -> None:
    memory, event = device.empty(64, shared=True), device.shared_event()
    opened = device.open(device.offer(memory))
    assert opened.data.ptr == memory.data.ptr
    assert not fake.opened
    assert device.open_event(event.handle) is event


def test_shared_events_are_recorded_again(
    device: CudaDevice, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    event, stream = device.shared_event(), device.stream()
    assert event.ready(), "until it is recorded"
    monkeypatch.setattr(cuda_events, "_own", {})
    foreign = device.open_event(event.handle)
    fake.prompt = False
    for _ in range(2):
        assert stream.record(event) is event
        assert not foreign.ready()
        device.current().wait(foreign)
        fake.run()
        assert foreign.ready()


def test_gpus_that_cannot_reach_each_other(
    device: CudaDevice, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.bus = "0000:02:00.0"
    other = CudaDevice(0)
    memory = other.empty(8, shared=True)
    offer = other.offer(memory)
    monkeypatch.setattr(cuda_memory, "PROCESS", b"another process.")
    device.open(offer)
    fake.peers = False
    with pytest.raises(DeviceError, match=r"cannot read each other's memory.*mpi_staged"):
        device.open(offer)
    del fake.buses["0000:02:00.0"]
    device.open(offer)
    fake.failing = {"ipcOpenMemHandle"}
    with pytest.raises(DeviceError, match=r"cannot open another rank's memory.*gpu-bind=none"):
        device.open(offer)


def test_devices_that_share_nothing(device: CudaDevice, fake: Fake) -> None:
    memory = device.empty(8, shared=True)
    fake.failing = {"ipcGetMemHandle", "ipcGetEventHandle"}
    with pytest.raises(DeviceError, match=r"shares no memory between processes.*mpi_staged"):
        device.offer(memory)
    with pytest.raises(DeviceError, match=r"shares no events .*\(CUDA error: not supported\)"):
        device.shared_event()
    with pytest.raises(DeviceError, match=r"cannot be opened.*--ipc=host"):
        device.open_event(cuda_events.PROCESS + bytes(8) + b"x" * 64)


# ---- no room -----------------------------------------------------------------------------------


def test_what_torch_keeps_is_given_back_before_memory_is_refused(
    device: CudaDevice, fake: Fake
) -> None:
    fake.room, fake.cached = 1 << 20, 8 << 20
    device.empty(4 << 20, shared=True)
    assert fake.cached == 0
    with pytest.raises(DeviceError) as refused:
        device.empty(100 << 20, shared=True)
    text = str(refused.value)
    assert "no room for 100 MiB of gradients" in text
    assert "nvidia-smi" in text
    assert "\n" not in text


def test_no_room_in_torchs_pool(device: CudaDevice, fake: Fake) -> None:
    fake.failing = {"torch.empty"}
    with pytest.raises(DeviceError, match="cuda:0 has no room for 3 MiB of gradients"):
        device.empty(3 << 20)


def test_no_pinned_memory(device: CudaDevice, fake: Fake) -> None:
    fake.failing = {"hostAlloc"}
    with pytest.raises(DeviceError, match=r"no room for 3 MiB of pinned host memory.*memlock"):
        device.pinned(3 << 20)


# ---- starting ----------------------------------------------------------------------------------


def test_a_device_that_is_not_there(fake: Fake) -> None:
    with pytest.raises(DeviceError, match="there is no cuda:3: this process sees 1 GPUs"):
        CudaDevice(3)


def test_a_device_that_is_taken(fake: Fake) -> None:
    fake.failing = {"set_device"}
    with pytest.raises(DeviceError, match="busy or unavailable: `nvidia-smi`"):
        CudaDevice(0)


# ---- profiles ----------------------------------------------------------------------------------


def test_ranges_only_where_profiles_are_marked(device: CudaDevice, fake: Fake) -> None:
    with device.range("quiet"):
        pass
    device.profiled = True
    with device.range("backward"):
        pass
    assert fake.ranges == ["backward", "end 1"]


def test_streams_are_what_the_contract_says(device: CudaDevice) -> None:
    stream = device.stream()
    assert isinstance(stream, CudaStream)
    assert stream.device is device
    stream.synchronize()
    assert torch.cuda.current_stream(0).cuda_stream == 0


def test_a_gpu_that_flushes_subnormals_is_found(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.utils.dlpack, "from_dlpack", lambda array: torch.zeros(1))
    with pytest.raises(FailedError, match="what torch multiplied"):  # all sums are right
        sums.run(device, "", 0, {})
    plain = CudaStream.reduce

    def flushing(stream: CudaStream, outs: Any, sources: Any, dtype: Any, *divisor: int) -> None:
        plain(stream, outs, sources, dtype, *divisor)
        for out in outs if dtype.name == "float32" else ():
            out.values[np.abs(out.values) < np.finfo(np.float32).tiny] = 0

    monkeypatch.setattr(CudaStream, "reduce", flushing)
    with pytest.raises(FailedError, match="a sum of subnormal float32: "):
        sums.run(device, "", 0, {})
