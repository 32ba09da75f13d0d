"""Memory of the test double's devices: poisoned when made and when freed, and never the host's.

A handle (``DoubleArray``, or NumPy's array of pinned memory) keeps its block. When the last one is
gone the block is poisoned and may be given to somebody else, whatever work on it is still queued;
a queue keeps bare views, which do not hold the block.
"""

from __future__ import annotations

import bisect
import ctypes
import sys
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

POISON = 0xFF  # NaN in every floating type, -1 in every signed integer
GUARD = 256  # bytes on either side that nobody may touch
CANARY = 0xA5


@dataclass(frozen=True)
class Slab:
    """Memory that stays as long as its machine; blocks of it come and go.

    Attributes:
        start: address of the first usable byte.
        number: of the slab, in the order of making.
    """

    number: int
    kind: str
    raw: NDArray[np.uint8]
    start: int
    nbytes: int

    @property
    def bytes(self) -> NDArray[np.uint8]:
        """The usable bytes, held by nobody."""
        at = self.start - int(self.raw.ctypes.data)
        return self.raw[at : at + self.nbytes]

    def check(self) -> None:
        """See that nothing beside it was written to."""
        at = self.start - int(self.raw.ctypes.data)
        before, behind = self.raw[at - GUARD : at], self.raw[at + self.nbytes :][:GUARD]
        assert (before == CANARY).all(), "device memory before an array was written to"
        assert (behind == CANARY).all(), "device memory behind an array was written to"


class Block:
    """One allocation; its end poisons the memory."""

    def __init__(self, pool: Pool, slab: Slab) -> None:
        self.pool, self.slab = pool, slab
        pool.used[slab.kind] = pool.used.get(slab.kind, 0) + slab.nbytes

    def __del__(self) -> None:
        if sys.is_finalizing():  # NumPy is no longer there
            return
        self.slab.bytes[:] = POISON
        self.pool.used[self.slab.kind] -= self.slab.nbytes
        self.pool.free[self.slab.kind, self.slab.nbytes].append(self.slab)


@dataclass
class Pool:
    """All memory of a machine.

    Attributes:
        free: slabs that can be given out again, by kind and size.
        used: bytes in use, by kind.
    """

    free: dict[tuple[str, int], deque[Slab]] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    _slabs: list[Slab] = field(default_factory=list)
    _by_address: list[tuple[int, Slab]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, kind: str, nbytes: int) -> NDArray[np.uint8]:
        """Poisoned memory of the kind; the array and its views keep it."""
        room = -(-max(nbytes, 1) // 256) * 256
        free = self.free.setdefault((kind, room), deque())
        try:
            slab = free.popleft()
        except IndexError:
            slab = self._make(kind, room)
        slab.bytes[:] = POISON
        return self._held(slab, Block(self, slab))[:nbytes]

    def again(self, number: int) -> NDArray[np.uint8]:
        """A slab as another process sees it: the array does not keep it."""
        return self._held(self._slabs[number], None)

    def slab_of(self, array: NDArray[Any]) -> Slab | None:
        """Where an array lies; None if it is not the machine's."""
        return self.slab_at(int(array.ctypes.data), array.nbytes)

    def slab_at(self, address: int, nbytes: int) -> Slab | None:
        """Where memory lies; None if it is not the machine's."""
        with self._lock:
            index = bisect.bisect_right(self._by_address, address, key=lambda each: each[0])
            slab = self._by_address[index - 1][1] if index else None
        if slab is None or address + nbytes > slab.start + slab.nbytes:
            return None
        return slab

    def bare(self, array: NDArray[Any]) -> NDArray[Any]:
        """The same memory, held by nobody; it must be the machine's."""
        slab = self.slab_of(array)
        assert slab is not None, "the memory is neither a device's nor pinned"
        assert array.flags.c_contiguous, "streams take contiguous arrays"
        at = int(array.ctypes.data) - slab.start
        return slab.bytes[at : at + array.nbytes].view(array.dtype).reshape(array.shape)

    def check(self) -> None:
        """See that nobody wrote beside arrays."""
        for slab in list(self._slabs):
            slab.check()

    def _make(self, kind: str, nbytes: int) -> Slab:
        raw = np.full(nbytes + 2 * GUARD + 256, CANARY, np.uint8)
        start = int(raw.ctypes.data) + GUARD
        start += -start % 256
        with self._lock:
            slab = Slab(len(self._slabs), kind, raw, start, nbytes)
            self._slabs.append(slab)
            bisect.insort(self._by_address, (start, slab), key=lambda each: each[0])
        return slab

    def _held(self, slab: Slab, block: Block | None) -> NDArray[np.uint8]:
        holder = (ctypes.c_uint8 * slab.nbytes).from_address(slab.start)
        holder.keeps = (block, self)  # type: ignore[attr-defined]
        return np.frombuffer(holder, np.uint8)


class DoubleArray:
    """Device memory as the host sees it: shape and type, but no values.

    Args:
        raw: the memory.
    """

    __slots__ = ("_raw",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, raw: NDArray[Any]) -> None:
        self._raw = raw

    @property
    def shape(self) -> tuple[int, ...]:
        return self._raw.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._raw.dtype

    @property
    def nbytes(self) -> int:
        return self._raw.nbytes

    @property
    def size(self) -> int:
        return self._raw.size

    @property
    def ndim(self) -> int:
        return self._raw.ndim

    @property
    def itemsize(self) -> int:
        return self._raw.itemsize

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, part: slice) -> DoubleArray:
        if not isinstance(part, slice):
            raise TypeError(f"the host cannot look at device memory: [{part!r}]")
        return DoubleArray(self._raw[part])

    def view(self, dtype: Any) -> DoubleArray:
        return DoubleArray(self._raw.view(dtype))

    def reshape(self, *shape: Any) -> DoubleArray:
        made = self._raw.reshape(*shape)
        assert np.shares_memory(made, self._raw) or not made.size
        return DoubleArray(made)

    def __dlpack__(self, **options: Any) -> Any:
        return self._raw.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._raw.__dlpack_device__()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (int(self._raw.ctypes.data), False),
            "strides": None if self._raw.flags.c_contiguous else self._raw.strides,
            "version": 3,
        }

    def __repr__(self) -> str:
        return f"DoubleArray({self.dtype}, {self.shape})"

    def _closed(self, *_: Any, **__: Any) -> Any:
        raise TypeError("the host cannot look at device memory; give a stream the work")

    __array__ = __iter__ = __setitem__ = __bool__ = __float__ = __int__ = __index__ = _closed
    __eq__ = __ne__ = __lt__ = __gt__ = __add__ = __sub__ = __mul__ = _closed
    tobytes = item = tolist = copy = astype = sum = fill = _closed


def raw_of(array: Any) -> NDArray[Any]:
    """The memory behind any array of a device or of the host; for the double's own use."""
    return array._raw if isinstance(array, DoubleArray) else array


def halves(count: int, cut: int) -> Iterator[slice]:
    """A range in two parts."""
    yield slice(0, cut)
    yield slice(cut, count)
