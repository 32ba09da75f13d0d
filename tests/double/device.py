"""A device without hardware and with real asynchrony, for tests.

Each stream is a thread that runs its queue with random delays. Nothing orders streams but events,
no stream waits for the host or the host for a stream unless told so, and copies and sums are done
in two parts with time between. So what lacks a wait finds poison, or half of what it wants, under
some seed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import pickle
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcsync.device import CpuDevice, Event, Stream, host
from hpcsync.device.base import Device
from hpcsync.device.cuda_launch import Launch, Launcher
from hpcsync.device.gpu_kernels import GpuKernels
from hpcsync.errors import DeviceError
from tests.double.memory import DoubleArray, Pool, raw_of
from tests.double.streams import Chance, DoubleShared, DoubleStream, Foreign
from tests.shim import host as shim

_OWN = "device", "shared"
_LAUNCH = threading.Lock()  # the shim runs one kernel at a time
MOST_STREAMS = 8  # for communication, of a device


class Machine:
    """What the devices of a job share: memory, shared events, and the first error of a stream.

    Args:
        seed: of all delays.
        capacity: bytes of device memory that may be in use at once; None for any.
        unreachable: pairs of identities of devices without peer access.
    """

    def __init__(
        self,
        seed: object = 0,
        capacity: int | None = None,
        unreachable: frozenset[tuple[str, str]] = frozenset(),
    ) -> None:
        self.seed, self.capacity, self.unreachable = seed, capacity, unreachable
        self.pool = Pool()
        self.shared: dict[bytes, DoubleShared] = {}
        self.offered: dict[int, str] = {}
        self.devices: list[DoubleDevice] = []
        self.error: BaseException | None = None
        self.closed = False

    def device(self, number: int = 0, identity: str = "") -> DoubleDevice:
        """A device of its own streams; those of one identity share the hardware."""
        made = DoubleDevice(self, number, identity or f"double:{number}")
        self.devices.append(made)
        return made

    def reseed(self, seed: object) -> None:
        """Other delays from now on."""
        self.seed = seed
        for device in self.devices:
            device.reseed()

    def synchronize(self) -> None:
        """Wait for all that was given to all streams."""
        for device in self.devices:
            for stream in device.streams:
                stream.synchronize()

    def check(self) -> None:
        """Raise what a stream's work raised."""
        if self.error is not None:
            raise AssertionError(f"a stream's work failed: {self.error!r}") from self.error

    def close(self) -> None:
        """End the streams' threads; work that was not done is dropped."""
        self.closed = True
        for device in self.devices:
            for stream in device.streams:
                stream.close()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class DoubleDevice(Device):
    """The device of one rank.

    Args:
        machine: of the job.
        number: tells this rank's delays from the others'.

    Attributes:
        streams: all of them.
        cpu: what does the sums.
        idle: a stream that nothing is given to.
        late: delays of the host.
    """

    name = "double"
    queued = True

    def __init__(self, machine: Machine, number: int, identity: str) -> None:
        self.machine, self.number, self.identity = machine, number, identity
        self.cpu: CpuDevice = host()
        self._local = threading.local()
        self._handles = itertools.count()
        self.compute = DoubleStream(self, "compute")
        self.streams = [self.compute]
        # Few streams hide a missing wait where both sides happen to be one; so their number varies.
        count = 1 + Chance((machine.seed, number, "streams")).below(MOST_STREAMS)
        self._comm = [self.new_stream(f"comm{index}") for index in range(count)]
        self._next = itertools.cycle(self._comm)
        self._copies = self.new_stream("down"), self.new_stream("up")
        self.idle = self.new_stream("idle")
        self.reseed()

    def new_stream(self, name: str) -> DoubleStream:
        """Another stream to compute in, by ``with``."""
        made = DoubleStream(self, name)
        self.streams.append(made)
        return made

    def reseed(self) -> None:
        self.late = Chance((self.machine.seed, self.number, "host"), pace=1)
        for stream in self.streams:
            stream.reseed()

    @property
    def stack(self) -> list[DoubleStream]:
        """The streams that the calling thread is ``with``."""
        found: list[DoubleStream] = self._local.__dict__.setdefault("stack", [])
        return found

    @functools.cached_property
    def _kernels(self) -> GpuKernels:
        return GpuKernels(Launcher(self._function, processors=1), self.empty)

    @property
    def kernels(self) -> GpuKernels:
        return self._kernels

    def _function(self, name: str) -> Launch:
        call = shim.function(name, backwards=False)

        def launch(grid: tuple[int], block: tuple[int], arguments: tuple[Any, ...]) -> None:
            assert self.stack, f"{name} is started outside of any stream"
            given = tuple(np.array(each) if each.ndim else each for each in arguments)

            def work() -> None:
                with _LAUNCH:
                    call(grid, block, given)

            self.stack[-1].give(work)

        return launch

    def current(self) -> DoubleStream:
        return self.stack[-1] if self.stack else self.compute

    def stream(self) -> DoubleStream:
        return next(self._next)

    def copies(self) -> tuple[DoubleStream, DoubleStream]:
        return self._copies

    def empty(self, nbytes: int, *, shared: bool = False) -> Any:
        capacity = self.machine.capacity
        used = self.machine.pool.used
        if capacity is not None and sum(used.get(kind, 0) for kind in _OWN) + nbytes > capacity:
            raise DeviceError(f"the device has no room for {nbytes} bytes")
        return DoubleArray(self.machine.pool.take("shared" if shared else "device", nbytes))

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        return self.machine.pool.take("pinned", nbytes)

    def offer(self, array: Any) -> bytes:
        raw = raw_of(array)
        slab = self.machine.pool.slab_of(raw)
        assert slab is not None, "the array is not this device's"
        assert slab.kind == "shared", "only memory made with shared=True can be offered"
        at = int(raw.ctypes.data) - slab.start
        return pickle.dumps((self.identity, slab.number, at, raw.nbytes))

    def open(self, offer: bytes) -> Any:
        identity, number, at, nbytes = pickle.loads(offer)
        if {(identity, self.identity), (self.identity, identity)} & self.machine.unreachable:
            raise DeviceError(f"{self.identity} cannot reach the memory of {identity}")
        return DoubleArray(self.machine.pool.again(number)[at : at + nbytes])

    def shared_event(self) -> DoubleShared:
        handle = f"{self.number}/{next(self._handles)}".encode()
        made = DoubleShared(self, handle)
        self.machine.shared[handle] = made
        return made

    def open_event(self, handle: bytes) -> Event:
        return Foreign(self.machine.shared[handle])

    # ---- for tests -----------------------------------------------------------------------------

    def read(self, array: Any) -> NDArray[Any]:
        """A copy of device memory once all streams of the machine are at their end."""
        self.machine.synchronize()
        raw = raw_of(array)
        if not isinstance(raw, np.ndarray):
            from torch.utils._python_dispatch import _disable_current_modes

            with _disable_current_modes():
                raw = raw.detach().numpy()
        return raw.copy()

    def write(self, array: Any, values: NDArray[Any], stream: Stream | None = None) -> None:
        """Give a stream (the current one) work that sets device memory to values of the host."""
        to = self.machine.pool.bare(raw_of(array))
        held = np.array(values, dtype=to.dtype)
        made = stream or self.current()
        assert isinstance(made, DoubleStream)
        made.give(lambda: to.__setitem__(slice(None), held))


@contextlib.contextmanager
def machine(seed: object = 0, **options: Any) -> Iterator[Machine]:
    """A machine for one test."""
    made = Machine(seed, **options)
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-4)
    try:
        yield made
    finally:
        sys.setswitchinterval(before)
        made.close()
    made.check()
    made.pool.check()
