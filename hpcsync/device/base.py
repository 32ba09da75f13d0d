"""The contract of a device: memory, streams and events; and the element types that it can add.

    stream   work in the order in which it is given; giving it returns at once
    event    a point in a stream: another stream can wait for it, and the host can ask

On the host work is done while it is given, so its events are always ready and what is written
for queues runs there unchanged.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .gpu_kernels import GpuKernels

Array = NDArray[Any]


@dataclass(frozen=True)
class DType:
    """An element type: how it is stored and in what it is added.

    Attributes:
        name: as torch and NumPy call it, e.g. ``bfloat16``.
        storage: the NumPy type of its bytes (``uint16`` for bfloat16, which NumPy lacks).
        accumulate: the NumPy type in which sums are made; low precision is added in float32.
        maximum: a reduction takes the largest value in place of the sum; int32 only.
    """

    name: str
    storage: np.dtype[Any]
    accumulate: np.dtype[Any]
    maximum: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return int(self.storage.itemsize)

    @property
    def floating(self) -> bool:
        return self.accumulate.kind == "f"


def _plain(name: str) -> DType:
    return DType(name, np.dtype(name), np.dtype(name))


_DTYPES = {
    "bfloat16": DType("bfloat16", np.dtype("uint16"), np.dtype("float32")),
    "float16": DType("float16", np.dtype("float16"), np.dtype("float32")),
    "int32 max": DType("int32 max", np.dtype("int32"), np.dtype("int32"), maximum=True),
    **{
        name: _plain(name)
        for name in ("float32", "float64", "int8", "uint8", "int16", "int32", "int64")
    },
}


def dtype_of(kind: object) -> DType:
    """The DType of a name, a NumPy dtype or a torch dtype.

    Raises:
        ValueError: elements of that type cannot be added here.
    """
    name = kind if isinstance(kind, str) else str(kind).removeprefix("torch.")
    if name not in _DTYPES:
        with contextlib.suppress(TypeError):
            name = np.dtype(kind).name  # type: ignore[call-overload]
    if name not in _DTYPES:
        known = ", ".join(each.name for each in _DTYPES.values() if not each.maximum)
        raise ValueError(f"dtype {name} cannot be reduced; use one of: {known}")
    return _DTYPES[name]


class Arithmetic(ABC):
    """Sums and copies of flat arrays."""

    @abstractmethod
    def reduce(
        self, outs: Sequence[Array], sources: Sequence[Array], dtype: DType, divisor: int = 1
    ) -> None:
        """Write ``(sources[0] + sources[1] + ...) / divisor`` to every array of ``outs``.

        The additions are made from left to right in ``dtype.accumulate`` and rounded once; a type
        with ``maximum`` takes the largest value instead.
        Arrays are 1-D, of equal length and of ``dtype.storage``; an output may be one of the
        sources. Integers have no divisor.
        """

    @abstractmethod
    def copy(self, out: Array, source: Array) -> None:
        """Copy ``source`` to ``out``; both 1-D, of equal length and type."""


class Event(ABC):
    """A point in a stream's work."""

    __slots__ = ()

    @abstractmethod
    def ready(self) -> bool:
        """Whether all work before it is done; never waits."""

    @abstractmethod
    def synchronize(self) -> None:
        """Sleep until it is ready; for setting up and for what MPI itself needs."""

    def reached_ns(self) -> int:
        """When it became ready, by the clock of ``trace.recorder.now``; of an event recorded with
        ``timed`` that is ready."""
        raise NotImplementedError("work on the host is timed by the host")


class SharedEvent(Event):
    """An event of this process that the others of the node can open.

    Attributes:
        handle: for ``Device.open_event``.
    """

    __slots__ = ()

    handle: bytes


class Stream(Arithmetic):
    """A queue of a device's work.

    ``with stream:`` sends the kernels and torch operations of this thread to it; nothing may be
    yielded inside. Arrays of queued work must live until it is done: who gives it keeps them.

    Attributes:
        device: that it belongs to.
    """

    device: Device

    @abstractmethod
    def record(self, event: Event | None = None, *, timed: bool = False) -> Event:
        """An event at the end of what was given so far.

        Args:
            event: to be recorded anew, a ``SharedEvent`` of this process; who waited for it before
                is not disturbed.
            timed: ``reached_ns`` will be asked; costs a little more.
        """

    @abstractmethod
    def wait(self, event: Event) -> None:
        """Do what is given from now on after the event; the host goes on at once."""

    @abstractmethod
    def copy(self, out: Array, source: Array) -> None:
        """Copy ``source`` to ``out``, 1-D and of equal length and type; each lies in the device's
        memory, in a peer's, or in pinned memory of the host."""

    @abstractmethod
    def fill(self, out: Array, byte: int) -> None:
        """Set every byte of a 1-D array."""

    @abstractmethod
    def apply(self, operation: Callable[[], object]) -> None:
        """Do torch operations, whose results the host does not look at, in the order of the
        stream; what ``operation`` refers to is kept until then."""

    @abstractmethod
    def __enter__(self) -> Stream: ...

    @abstractmethod
    def __exit__(self, *_: object) -> None: ...

    def synchronize(self) -> None:
        """Sleep until all work given so far is done."""
        self.record().synchronize()


@dataclass(frozen=True)
class Probe:
    """How a child opens a device anew, to try what it can do.

    Attributes:
        device: its class, as ``package.module:Class``, made of the index.
        identity: what outcomes depend on: versions of driver and libraries, names of devices.
        refusal: why nothing may be tried beside this process; empty if it may.
    """

    device: str
    index: int
    identity: Mapping[str, str]
    refusal: str = ""


class Device(ABC):
    """Memory and streams, chosen once a process.

    Arrays of device memory look like NumPy's as far as ``shape``, ``dtype``, ``nbytes``, slices,
    ``view`` and ``__dlpack__`` go; where work is queued, only streams may touch what they hold.

    Attributes:
        name: ``cpu`` or ``cuda``.
        queued: whether streams work beside the host.
        index: which of several of its kind, as torch counts them.
        identity: a name that no other device of the job has; empty for the host's processor.
        profiled: ``range`` marks profiles.
    """

    name: str
    queued = False
    index = 0
    identity = ""
    profiled = False

    @property
    def probe(self) -> Probe | None:
        """How it is tried; None where all that the contract promises is certain."""
        return None

    @property
    def kernels(self) -> GpuKernels | None:
        """For codecs, where work is queued: each call goes to the stream that the calling thread
        is ``with``."""
        return None

    def describe(self) -> str:
        """The device in words, for the banner."""
        return self.name

    def range(self, text: str) -> AbstractContextManager[object]:
        """A named range in profiles of the device, where there are any; it may be left on another
        thread than it was entered on."""
        return contextlib.nullcontext()

    def peak_bytes(self) -> int:
        """Most of the device's memory that this process has taken at once; 0 where that is not
        counted."""
        return 0

    @abstractmethod
    def current(self) -> Stream:
        """The stream in which this thread computes with torch."""

    @abstractmethod
    def stream(self) -> Stream:
        """One of the streams for communication, of high priority; the next one each time."""

    def copies(self) -> tuple[Stream, Stream]:
        """Streams for copies to the host, and from it, on which no other work waits."""
        return self.stream(), self.stream()

    @abstractmethod
    def empty(self, nbytes: int, *, shared: bool = False) -> Array:
        """Memory with any contents, 1-D uint8.

        Args:
            shared: other processes of the node will open it.

        Raises:
            DeviceError: there is not enough, or this device shares none.
        """

    @abstractmethod
    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Host memory that streams copy to and from beside the host's work, 1-D uint8; it goes
        back to a pool with its last reference."""

    @abstractmethod
    def offer(self, array: Array) -> bytes:
        """What another process of the node needs to ``open`` shared memory."""

    @abstractmethod
    def open(self, offer: bytes) -> Array:
        """Another process's memory, 1-D uint8.

        Raises:
            DeviceError: it cannot be reached from here; the text says why.
        """

    @abstractmethod
    def shared_event(self) -> SharedEvent:
        """An event for ``Stream.record``; ready until it is recorded."""

    @abstractmethod
    def open_event(self, handle: bytes) -> Event:
        """Another process's event: a wait for it means what was recorded there last, so its host
        must have told that it recorded."""
