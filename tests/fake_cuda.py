"""torch.cuda and CuPy as far as hpcsync.device.cuda uses them, on host memory.

Streams do their work when they are told to (``Fake.run``), in the order that their events ask
for, or at once while ``Fake.prompt``; kernels are those of tests/shim. What would be an error of
CUDA is one here: a thread without a device, a handle of this process, memory of nobody.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from hpcsync import cuda_state
from hpcsync.device import cuda_events, cuda_kernels, cuda_launch, cuda_modules
from tests.shim import host

TICK_NS = 1000


class CUDARuntimeError(RuntimeError):
    """As CuPy's."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"cudaError{status}: told")


class Fake:
    """The driver.

    Attributes:
        prompt: work is done when it is given.
        room: bytes that may be allocated for sharing.
        cached: bytes that torch keeps and could give back.
        peers: whether GPUs read each other.
        failing: calls of the runtime that end in an error.
        bus: of the one device.
        calls: what was asked for, by name.
        lent: streams that torch was told of, memory by memory.
    """

    def __init__(self) -> None:
        self.prompt, self.room, self.cached, self.peers = True, 1 << 30, 0, True
        self.failing: set[str] = set()
        self.bus, self.buses = "0000:01:00.0", {"0000:01:00.0": 0, "0000:02:00.0": 1}
        self.calls: list[str] = []
        self.memory: dict[int, Any] = {}
        self.opened: list[int] = []
        self.exported: dict[bytes, Event] = {}
        self.streams: dict[int, FakeStream] = {}
        self.local = threading.local()
        self.lock = threading.RLock()
        self.clock_ns = 0
        self.ranges: list[str] = []
        self.lent: list[FakeStream] = []
        self.default = FakeStream(self, handle=0)

    def now(self) -> int:
        self.clock_ns += TICK_NS
        return self.clock_ns

    def told(self) -> None:
        """Raises AssertionError: the thread has no device."""
        assert getattr(self.local, "torch", None) == 0, "torch has no device in this thread"
        assert getattr(self.local, "cupy", None) == 0, "CuPy has no device in this thread"

    def fail(self, name: str) -> None:
        self.calls.append(name)
        if name in self.failing:
            raise CUDARuntimeError(801)

    def run(self) -> None:
        """Do all work; raises AssertionError if streams wait for each other."""
        with self.lock:
            while any(stream.queue for stream in self.streams.values()):
                moved = [stream.step() for stream in list(self.streams.values())]
                assert any(moved), "streams wait for each other"


class FakeStream:
    """torch.cuda.Stream."""

    def __init__(self, fake: Fake, handle: int = -1, priority: int = 0) -> None:
        self.fake, self.priority = fake, priority
        self.cuda_stream = 16 * len(fake.streams) if handle < 0 else handle
        self.queue: deque[Callable[[], bool]] = deque()
        fake.streams[self.cuda_stream] = self

    def give(self, work: Callable[[], object]) -> None:
        def done() -> bool:
            work()
            return True

        with self.fake.lock:
            self.queue.append(done)
            if self.fake.prompt:
                self.fake.run()

    def wait_event(self, event: Event) -> None:
        self.fake.told()
        mark = event.mark
        with self.fake.lock:
            self.queue.append(lambda: mark is None or bool(mark))

    def step(self) -> bool:
        if self.queue and self.queue[0]():
            self.queue.popleft()
            return True
        return False


class Event:
    """torch.cuda.Event."""

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
    ) -> None:
        assert not (enable_timing and interprocess)
        self.timing, self.interprocess = enable_timing, interprocess
        self.mark: list[int] | None = None

    def record(self, stream: FakeStream) -> None:
        stream.fake.told()
        self.mark = mark = []
        stream.give(lambda: mark.append(stream.fake.now()))

    def query(self) -> bool:
        return self.mark is None or bool(self.mark)

    def synchronize(self) -> None:
        if self.mark is not None and not self.mark:
            raise AssertionError("nobody does the work")

    def elapsed_time(self, end: Event) -> float:
        assert self.timing
        assert end.timing
        assert self.mark
        assert end.mark
        return (end.mark[0] - self.mark[0]) / 1e6


class Array:
    """cupy.ndarray of one dimension."""

    def __init__(self, shape: tuple[int], dtype: Any, memptr: Any) -> None:
        self.dtype, self.shape, self.data = np.dtype(dtype), shape, memptr
        self.nbytes = shape[0] * self.dtype.itemsize

    @property
    def values(self) -> np.ndarray:
        """What it holds, for tests."""
        kind = ctypes.c_uint8 * max(self.nbytes, 1)
        return np.frombuffer(kind.from_address(self.data.ptr), np.uint8, self.nbytes).view(
            self.dtype
        )

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"data": (self.data.ptr, False), "shape": self.shape, "strides": None}

    def __getitem__(self, part: slice) -> Array:
        start, stop, _ = part.indices(self.shape[0])
        offset = start * self.dtype.itemsize
        moved = types.SimpleNamespace(ptr=self.data.ptr + offset, mem=self.data.mem)
        return Array((max(0, stop - start),), self.dtype, moved)

    def view(self, dtype: Any) -> Array:
        return Array((self.nbytes // np.dtype(dtype).itemsize,), dtype, self.data)


class Runtime(types.SimpleNamespace):
    """cupy.cuda.runtime."""

    memcpyDefault = 4  # noqa: N815
    CUDARuntimeError = CUDARuntimeError

    def __init__(self, fake: Fake) -> None:
        super().__init__()
        self.fake = fake

    def setDevice(self, index: int) -> None:  # noqa: N802
        self.fake.local.cupy = index

    def getDevice(self) -> int:  # noqa: N802
        return int(getattr(self.fake.local, "cupy", 0))

    def deviceGetPCIBusId(self, index: int) -> str:  # noqa: N802
        return self.fake.bus

    def deviceGetByPCIBusId(self, bus: str) -> int:  # noqa: N802
        if bus not in self.fake.buses:
            raise CUDARuntimeError(101)
        return self.fake.buses[bus]

    def deviceCanAccessPeer(self, index: int, other: int) -> int:  # noqa: N802
        return int(self.fake.peers)

    def malloc(self, nbytes: int) -> int:
        self.fake.told()
        self.fake.calls.append("malloc")
        if nbytes > self.fake.room:
            raise CUDARuntimeError(2)
        self.fake.room -= nbytes
        made = (ctypes.c_uint8 * nbytes)()
        self.fake.memory[ctypes.addressof(made)] = made
        return ctypes.addressof(made)

    def free(self, address: int) -> None:
        self.fake.room += len(self.fake.memory.pop(address))

    def memcpyAsync(self, to: int, of: int, n: int, kind: int, stream: int) -> None:  # noqa: N802
        self.fake.told()
        assert kind == self.memcpyDefault
        self.fake.streams[stream].give(lambda: ctypes.memmove(to, of, n))

    def memsetAsync(self, to: int, byte: int, n: int, stream: int) -> None:  # noqa: N802
        self.fake.told()
        self.fake.streams[stream].give(lambda: ctypes.memset(to, byte, n))

    def ipcGetMemHandle(self, address: int) -> bytes:  # noqa: N802
        self.fake.fail("ipcGetMemHandle")
        assert address in self.fake.memory, "handles are of whole allocations"
        return address.to_bytes(64, "little")

    def ipcOpenMemHandle(self, handle: bytes) -> int:  # noqa: N802
        self.fake.fail("ipcOpenMemHandle")
        address = int.from_bytes(handle, "little")
        self.fake.opened.append(address)
        return address

    def ipcCloseMemHandle(self, address: int) -> None:  # noqa: N802
        self.fake.opened.remove(address)


def _torch_cuda(fake: Fake) -> dict[str, Any]:
    """What stands in torch.cuda's place."""

    class Stream(FakeStream):
        def __init__(self, device: Any = None, priority: int = 0) -> None:
            super().__init__(fake, priority=priority)

    class TorchEvent(Event):
        def ipc_handle(self) -> bytes:
            assert self.interprocess
            if "ipcGetEventHandle" in fake.failing:
                raise RuntimeError("CUDA error: not supported\nmore")
            handle = len(fake.exported).to_bytes(64, "little")
            fake.exported[handle] = self
            return handle

        @classmethod
        def from_ipc_handle(cls, device: Any, handle: bytes) -> Event:
            assert len(handle) == 64
            assert device == torch.device("cuda", 0)
            if handle not in fake.exported:
                raise RuntimeError("CUDA error: invalid resource handle\nmore")
            return fake.exported[handle]

    @contextlib.contextmanager
    def stream(which: FakeStream) -> Iterator[None]:
        before = current_stream(0)
        fake.local.stream = which
        try:
            yield
        finally:
            fake.local.stream = before

    def current_stream(index: int) -> FakeStream:
        found: FakeStream = getattr(fake.local, "stream", fake.default)
        return found

    def set_device(index: int) -> None:
        if "set_device" in fake.failing:
            raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable")
        fake.local.torch = index

    def empty_cache() -> None:
        fake.room, fake.cached = fake.room + fake.cached, 0

    def range_end(number: int) -> None:
        fake.ranges.append(f"end {number}")

    def range_start(text: str) -> int:
        fake.ranges.append(text)
        return len(fake.ranges)

    return {
        "Event": TorchEvent,
        "Stream": Stream,
        "stream": stream,
        "current_stream": current_stream,
        "set_device": set_device,
        "empty_cache": empty_cache,
        "mem_get_info": lambda index: (fake.room, 1 << 34),
        "max_memory_allocated": lambda index: 1000,
        "get_device_properties": lambda index: types.SimpleNamespace(
            uuid="GPU-one", name="NVIDIA H200", total_memory=139 << 30
        ),
        "nvtx": types.SimpleNamespace(range_start=range_start, range_end=range_end),
    }


def _cupy(fake: Fake) -> types.SimpleNamespace:
    def alloc_pinned_memory(nbytes: int) -> bytearray:
        fake.told()
        fake.fail("hostAlloc")
        return bytearray(nbytes)

    def unowned(address: int, nbytes: int, owner: object, device: int) -> Any:
        assert device == 0
        return types.SimpleNamespace(address=address, owner=owner)

    def pointer(memory: Any, offset: int) -> Any:
        return types.SimpleNamespace(ptr=memory.address + offset, mem=memory)

    class Stream:
        """In which the thread's kernels go."""

        @staticmethod
        @contextlib.contextmanager
        def _inside(handle: int) -> Iterator[None]:
            stack = fake.local.__dict__.setdefault("kernels", [])
            stack.append(handle)
            try:
                yield
            finally:
                stack.pop()

        @classmethod
        def from_external(cls, given: Any) -> Any:
            version, handle = given.__cuda_stream__()
            assert version == 0
            entered: Any = threading.local()

            class Context:
                def __enter__(self) -> None:
                    context = cls._inside(handle)
                    context.__enter__()
                    entered.__dict__.setdefault("list", []).append(context)

                def __exit__(self, *_: object) -> None:
                    entered.list.pop().__exit__(None, None, None)

            return Context()

    return types.SimpleNamespace(
        __version__="14.0",
        ndarray=Array,
        cuda=types.SimpleNamespace(
            runtime=Runtime(fake),
            alloc_pinned_memory=alloc_pinned_memory,
            UnownedMemory=unowned,
            MemoryPointer=pointer,
            Stream=Stream,
        ),
    )


def _kernels(fake: Fake) -> cuda_kernels.CudaKernels:
    """The shim's, each start an item of the stream that the thread is in."""

    def function(name: str) -> Any:
        plain = host.function(name, backwards=False)

        def call(grid: tuple[int], block: tuple[int], arguments: tuple[Any, ...]) -> None:
            fake.told()
            handle = fake.local.kernels[-1]
            fake.streams[handle].give(lambda: plain(grid, block, arguments))

        return call

    return cuda_kernels.CudaKernels(cuda_launch.Launcher(function, processors=1))


def install(monkeypatch: pytest.MonkeyPatch, gpus: int = 1) -> Fake:
    """Put it in the place of torch.cuda and CuPy."""
    fake = Fake()
    for name, value in _torch_cuda(fake).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setitem(sys.modules, "cupy", _cupy(fake))
    kernels = _kernels(fake)
    monkeypatch.setattr(cuda_modules, "load", lambda index: kernels)
    monkeypatch.setattr(cuda_events, "now", fake.now)
    given = [cuda_state.Gpu(f"GPU {index}", f"{index}") for index in range(gpus)]
    state = cuda_state.CudaState(driver=13000, gpus=given, torch_cuda="13.0", cupy="14.0")
    monkeypatch.setattr(cuda_state, "require", lambda: state)
    plain = {"empty": torch.empty, "zeros": torch.zeros}

    def made(name: str) -> Any:
        def make(*given: Any, device: Any = None, **options: Any) -> torch.Tensor:
            if str(device).startswith("cuda") and fake.failing & {"torch.empty"}:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return plain[name](*given, **options)

        return make

    for name in plain:
        monkeypatch.setattr(torch, name, made(name))
    lend = lambda tensor, stream: fake.lent.append(stream)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "record_stream", lend)
    return fake
