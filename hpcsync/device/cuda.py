"""NVIDIA GPUs: torch's streams, events and memory, CuPy's kernels, CUDA's IPC.

The streams of communication come from torch's pool of high priority, and CuPy knows them by their
handles: kernels, copies and torch operations of a ``with stream`` go into one queue. A process
uses one device; every thread that calls in is told so first, as CUDA asks each thread.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import cuda_state
from ..errors import DeviceError
from . import cuda_kernels, cuda_launch, cuda_modules
from .base import Array, Device, DType, Event, Probe, SharedEvent, Stream, dtype_of
from .cuda_events import CudaEvent, CudaSharedEvent, Events
from .cuda_memory import CudaMemory
from .gpu_kernels import GpuKernels

_cuda: Any = torch.cuda  # which has few types
_HIGH = -1  # any priority above that of computing
# With the computation's and the copies' within the eight queues that CUDA gives a process: more
# streams would wait for each other.
_STREAMS = 4


class CudaStream(Stream):
    """A stream of torch's.

    Args:
        ours: not the one that computes: what its work refers to must be kept.
    """

    device: CudaDevice

    def __init__(self, device: CudaDevice, stream: torch.cuda.Stream, ours: bool) -> None:
        self.device, self.torch, self._ours = device, stream, ours
        self.handle = int(stream.cuda_stream)
        self._cupy = cuda_modules.on_stream(self.handle)
        self._entered = threading.local()
        self._kept: deque[tuple[CudaEvent, Callable[[], object]]] = deque()
        self._kept_lock = threading.Lock()

    def reduce(
        self, outs: Sequence[Array], sources: Sequence[Array], dtype: DType, divisor: int = 1
    ) -> None:
        if max(len(outs), len(sources)) > cuda_launch.MOST_ARRAYS:
            raise DeviceError(
                f"a GPU adds at most {cuda_launch.MOST_ARRAYS} buffers at once, not "
                f"{max(len(outs), len(sources))}; set comm.algorithm=ring"
            )
        with self:
            to, of = ([cuda_launch.address_of(each) for each in some] for some in (outs, sources))
            self.device.kernels.blocks.reduce(dtype, to, of, int(sources[0].shape[0]), divisor)

    def copy(self, out: Array, source: Array) -> None:
        assert out.nbytes == source.nbytes, "copies are of equal length"
        if source.nbytes:
            self.device.use()
            runtime, to, of = self.device.cupy.cuda.runtime, _address(out), _address(source)
            runtime.memcpyAsync(to, of, source.nbytes, runtime.memcpyDefault, self.handle)

    def fill(self, out: Array, byte: int) -> None:
        if out.nbytes:
            self.device.use()
            self.device.cupy.cuda.runtime.memsetAsync(_address(out), byte, out.nbytes, self.handle)

    def apply(self, operation: Callable[[], object]) -> None:
        with self:
            operation()
        if self._ours:
            # torch may give memory away whose last reference goes, as far as its own stream has
            # come: this one may be behind.
            self._kept.append((self.record(), operation))
        over = []  # freed without the lock
        with self._kept_lock:
            while self._kept and self._kept[0][0].ready():
                over.append(self._kept.popleft())

    def record(self, event: Event | None = None, *, timed: bool = False) -> CudaEvent:
        self.device.use()
        if event is None:
            return self.device.events.record(self.torch, timed=timed)
        assert isinstance(event, CudaSharedEvent), "only shared events are recorded again"
        event.event.record(self.torch)
        return event

    def wait(self, event: Event) -> None:
        self.device.use()
        if isinstance(event, CudaEvent):
            self.torch.wait_event(event.event)
        else:  # of the host, and past
            event.synchronize()

    def __enter__(self) -> CudaStream:
        self.device.use()
        entered: list[AbstractContextManager[Any]] = self._entered.__dict__.setdefault("list", [])
        context = _cuda.stream(self.torch)
        context.__enter__()
        self._cupy.__enter__()
        entered.append(context)
        return self

    def __exit__(self, *_: object) -> None:
        self._cupy.__exit__(None, None, None)
        self._entered.list.pop().__exit__(None, None, None)


class CudaDevice(Device):
    """One GPU.

    Memory that ``empty`` gives ``with`` one of the streams of communication is for that stream.

    Args:
        index: as torch counts those that this process sees.

    Raises:
        DeviceError: it cannot be used.
    """

    name = "cuda"
    queued = True

    def __init__(self, index: int = 0) -> None:
        self.index, self.cupy = index, _start(index)
        self._local = threading.local()
        self.use()
        self.identity = str(_cuda.get_device_properties(index).uuid)
        self.memory = CudaMemory(self.cupy, index, self.use)
        self.events = Events(index, self.use)
        self._own = [
            CudaStream(self, _cuda.Stream(index, priority=_HIGH), ours=True)
            for _ in range(_STREAMS + 2)
        ]
        self._known = {stream.handle: stream for stream in self._own}
        self._streams = itertools.cycle(self._own[:_STREAMS])
        self._load()

    def use(self) -> None:
        """Make this the device of the calling thread, for torch and CuPy, and leave it so: others
        may have chosen another one since."""
        told = getattr(self._local, "told", False)
        if not told or self.cupy.cuda.runtime.getDevice() != self.index:
            _cuda.set_device(self.index)
            self.cupy.cuda.runtime.setDevice(self.index)
            self._local.told = True

    @functools.cached_property
    def probe(self) -> Probe:
        state = cuda_state.look()
        busy = "the GPU is in exclusive mode, where a second process cannot try it"
        exclusive = state.gpus[self.index].mode == cuda_state.EXCLUSIVE
        return Probe(
            f"{__name__}:{type(self).__name__}",
            self.index,
            cuda_state.identity(state),
            busy if exclusive else "",
        )

    @functools.cached_property
    def kernels(self) -> GpuKernels:
        return GpuKernels(cuda_modules.load(self.index).launcher, self.empty)

    def _load(self) -> None:
        """Start every kernel of sums once: CUDA may wait for all streams to load one."""
        stream, room = self.stream(), self.empty(8)
        for name in cuda_kernels.SUMS:
            dtype = dtype_of(name)
            one = room.view(dtype.storage)[:1]
            stream.reduce([one], [one], dtype)
        stream.synchronize()

    def describe(self) -> str:
        properties = _cuda.get_device_properties(self.index)
        return f"cuda: {properties.name}, {round(properties.total_memory / 2**30)} GiB"

    @contextlib.contextmanager
    def range(self, text: str) -> Iterator[None]:
        if not self.profiled:
            yield
            return
        # Not range_push: that is a stack a thread.
        opened = _cuda.nvtx.range_start(text)
        try:
            yield
        finally:
            _cuda.nvtx.range_end(opened)

    def peak_bytes(self) -> int:
        return int(_cuda.max_memory_allocated(self.index)) + self.memory.shared_peak

    def current(self) -> CudaStream:
        self.use()
        stream = _cuda.current_stream(self.index)
        handle = int(stream.cuda_stream)
        if handle not in self._known:
            self._known[handle] = CudaStream(self, stream, ours=False)
        return self._known[handle]

    def stream(self) -> CudaStream:
        return next(self._streams)

    def copies(self) -> tuple[CudaStream, CudaStream]:
        down, up = self._own[_STREAMS:]
        return down, up

    def empty(self, nbytes: int, *, shared: bool = False) -> Array:
        if shared:
            return self.memory.shared(nbytes)
        stream = self.current()
        array, owner = self.memory.private(nbytes)
        if stream not in self._own:
            # torch's pool keeps the order of the stream that allocates, and of no other: work
            # before may still use this memory, and later work must not while ours does.
            made = stream.record()
            for each in self._own:
                each.wait(made)
                owner.record_stream(each.torch)
        return array

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        return self.memory.pinned(nbytes)

    def offer(self, array: Array) -> bytes:
        return self.memory.offer(array)

    def open(self, offer: bytes) -> Array:
        return self.memory.open(offer)

    def shared_event(self) -> SharedEvent:
        return self.events.shared()

    def open_event(self, handle: bytes) -> Event:
        return self.events.open(handle)


def _start(index: int) -> Any:
    """CuPy, once the device has answered."""
    state = cuda_state.require()
    if not 0 <= index < len(state.gpus):
        raise DeviceError(
            f"there is no cuda:{index}: this process sees {len(state.gpus)} GPUs; ask for as many "
            "as ranks on a node (Slurm: --gpus-per-task=1 --gpu-bind=none), or see "
            "CUDA_VISIBLE_DEVICES"
        )
    cupy: Any = importlib.import_module("cupy")
    try:
        _cuda.set_device(index)
        torch.zeros(1, device=f"cuda:{index}")
        cupy.cuda.runtime.setDevice(index)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        raise DeviceError(cuda_state.explain(error, state, index)) from None
    return cupy


def _address(array: Any) -> int:
    """Of an array in the device's or in the host's memory."""
    if isinstance(array, np.ndarray):
        return int(array.ctypes.data)
    return cuda_launch.address_of(array)
