"""Host memory, added by the native kernels, or by NumPy in blocks that stay in cache.

NumPy adds the element types that have no kernel, and all of them where there are no kernels; its
results are the kernels', bit for bit (but for the payload of a NaN).

A block is read from every source, added, and written to every output while it is still in
cache: summing p buffers into p buffers costs one read and one write of each, where two passes
(reduce, then gather) would read everything twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import DeviceError
from .base import Arithmetic, Array, Device, DType, Event, SharedEvent, Stream
from .kernels import Kernels, address, f32, pointers, size_t

# 128 KiB of float32: with a block a source and the accumulator it stays within a core's L2.
_BLOCK = 32768


_NATIVE = {"float32": "add_f32", "bfloat16": "add_bf16", "float16": "add_f16"}


class CpuDevice(Device, Arithmetic):
    """Host memory, and sums on it, which release the interpreter lock.

    Args:
        kernels: the native ones; None for NumPy alone.
    """

    name = "cpu"

    def __init__(self, kernels: Kernels | None = None) -> None:
        self._local = threading.local()
        types = (None, address, size_t, address, size_t, size_t, f32)
        self._adds = (
            {dtype: kernels.function(name, *types) for dtype, name in _NATIVE.items()}
            if kernels
            else {}
        )
        self._stream = HostStream(self)

    def current(self) -> Stream:
        return self._stream

    def stream(self) -> Stream:
        return self._stream

    def empty(self, nbytes: int, *, shared: bool = False) -> Array:
        if shared:
            raise DeviceError("host memory is shared by the transport shared_memory")
        return np.empty(nbytes, np.uint8)

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        return np.empty(nbytes, np.uint8)

    def offer(self, array: Array) -> bytes:
        raise DeviceError("host memory is shared by the transport shared_memory")

    def open(self, offer: bytes) -> Array:
        raise DeviceError("host memory is shared by the transport shared_memory")

    def shared_event(self) -> SharedEvent:
        return _DONE

    def open_event(self, handle: bytes) -> Event:
        return _DONE

    def reduce(
        self, outs: Sequence[Array], sources: Sequence[Array], dtype: DType, divisor: int = 1
    ) -> None:
        assert divisor == 1 or dtype.floating, f"no mean of {dtype.name}"
        if dtype.maximum:
            self._largest(outs, sources)
            return
        if add := self._adds.get(dtype.name):
            # Named, for the call works on their memory.
            to, of = pointers(outs), pointers(sources)
            add(to, len(outs), of, len(sources), sources[0].shape[0], divisor)
            return
        block = self._reduce_widened if dtype.storage != dtype.accumulate else self._reduce_plain
        count = sources[0].shape[0]
        with np.errstate(all="ignore"):  # NaN and Inf are passed on, and judged later
            for start in range(0, count, _BLOCK):
                part = slice(start, min(start + _BLOCK, count))
                first = outs[0][part]
                block(first, [source[part] for source in sources], dtype, divisor)
                for out in outs[1:]:
                    out[part] = first

    def copy(self, out: Array, source: Array) -> None:
        out[:] = source

    def _largest(self, outs: Sequence[Array], sources: Sequence[Array]) -> None:
        largest = np.maximum.reduce(list(sources))
        for out in outs:
            out[:] = largest

    def _scratch(self, dtype: DType) -> Array:
        """A block of accumulators of the calling thread's own."""
        held: dict[str, Array] = self._local.__dict__
        name = dtype.accumulate.name
        if name not in held:
            held[name] = np.empty(_BLOCK, dtype.accumulate)
        return held[name]

    def _reduce_plain(self, out: Array, sources: list[Array], dtype: DType, divisor: int) -> None:
        # `out` may be any of the sources, so it is written by the last operation only.
        value = sources[0]
        scratch = self._scratch(dtype)[: out.shape[0]]
        for index, source in enumerate(sources[1:], start=1):
            last = index == len(sources) - 1 and divisor == 1
            value = np.add(value, source, out=out if last else scratch)
        if divisor != 1:
            divide(value, divisor, out)
        elif value is not out:
            out[:] = value

    def _reduce_widened(self, out: Array, sources: list[Array], dtype: DType, divisor: int) -> None:
        total = self._scratch(dtype)[: out.shape[0]]
        total[:] = widen(sources[0], dtype)
        for source in sources[1:]:
            np.add(total, widen(source, dtype), out=total)
        if divisor != 1:
            divide(total, divisor, total)
        out[:] = narrow(total, dtype)


class _Done(SharedEvent):
    """Of work that was done when it was given."""

    __slots__ = ()
    handle = b""

    def ready(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


_DONE = _Done()


class HostStream(Stream):
    """Does everything at once, on the calling thread."""

    def __init__(self, device: CpuDevice) -> None:
        self.device = device
        self._adds = device

    def reduce(
        self, outs: Sequence[Array], sources: Sequence[Array], dtype: DType, divisor: int = 1
    ) -> None:
        self._adds.reduce(outs, sources, dtype, divisor)

    def copy(self, out: Array, source: Array) -> None:
        self._adds.copy(out, source)

    def record(self, event: Event | None = None, *, timed: bool = False) -> Event:
        return _DONE

    def wait(self, event: Event) -> None:
        event.synchronize()

    def fill(self, out: Array, byte: int) -> None:
        out.view(np.uint8)[:] = byte

    def apply(self, operation: Callable[[], object]) -> None:
        operation()

    def __enter__(self) -> HostStream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def divide(values: Array, divisor: int, out: Array) -> None:
    """Divide; by a power of two as a product, which is the same bits and faster."""
    if divisor & (divisor - 1) == 0:
        np.multiply(values, values.dtype.type(1.0 / divisor), out=out)
    else:
        np.divide(values, divisor, out=out)


def widen(values: Array, dtype: DType) -> Array:
    """Low-precision storage as float32, exactly."""
    if dtype.name == "bfloat16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32)


def narrow(values: Array, dtype: DType) -> Array:
    """float32 rounded to nearest even in low-precision storage; NaN stays NaN."""
    if dtype.name != "bfloat16":
        return values.astype(dtype.storage)
    bits = values.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(
        16
    )
    # Rounding up could carry a NaN's payload into its sign or make it Inf: keep it quiet NaN.
    quiet = (bits >> np.uint32(16)) | np.uint32(0x0040)
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)
