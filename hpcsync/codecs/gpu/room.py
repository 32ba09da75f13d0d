"""Memory of a stream's device, as codecs need it: scratch, lengths, stores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ...device.base import Array, Stream
from ...device.cuda_launch import Address, address_of
from ...device.gpu_kernels import GpuKernels
from ..base import Floats, Store


@dataclass(frozen=True, slots=True)
class Length:
    """Bytes that a piece takes, as far as the host knows them.

    Attributes:
        cell: a uint64 in device memory, written by the stream's work.
        more: to be added to it.
    """

    cell: Array
    more: int = 0

    def plus(self, more: int) -> Length:
        return replace(self, more=self.more + more)


class Room:
    """A stream, its device's kernels, and memory there.

    Attributes:
        stream: that does all work.
        kernels: of its device, for calls inside ``with room.stream``.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        kernels = stream.device.kernels
        assert kernels is not None, f"{stream.device.name} queues no work"
        self.kernels: GpuKernels = kernels

    def empty(self, count: int, dtype: DTypeLike = np.uint8) -> Array:
        """Device memory with any contents, 1-D, for work of the stream."""
        kind = np.dtype(dtype)
        nbytes = count * kind.itemsize
        with self.stream:  # so that no other stream has a say in when it may be used
            memory = self.stream.device.empty(max(nbytes, 8))
        return memory[:nbytes].view(kind)

    def zeros(self, count: int, dtype: DTypeLike = np.uint8) -> Array:
        """Device memory of zeros, 1-D, for work of the stream."""
        made = self.empty(count, dtype)
        if count:
            self.stream.fill(made, 0)
        return made

    def down(self, array: Array) -> NDArray[Any]:
        """What an array of device memory holds after all that the stream was given; waits."""
        host = self.stream.device.pinned(max(array.nbytes, 1))[: array.nbytes].view(array.dtype)
        if array.shape[0]:
            self.stream.copy(host, array)
            self.stream.synchronize()
        return np.array(host)

    def up(self, array: Array, values: NDArray[Any]) -> None:
        """Set an array of device memory, after all that the stream was given; waits."""
        host = self.stream.device.pinned(max(array.nbytes, 1))[: array.nbytes].view(array.dtype)
        host[:] = values
        if array.shape[0]:
            self.stream.copy(array, host)
            self.stream.synchronize()


class QueuedStore(Store):
    """A codec's store in device memory; ``read`` and ``write`` wait for the stream.

    Args:
        make: makes the store as it is on the host, whose arrays these are, and which knows what
            its fields are made of.
    """

    def __init__(self, make: Callable[[], Store], room: Room) -> None:
        model = make()
        self.count = model.count
        self._make, self._room, self._fields = make, room, model.fields
        self.arrays = {
            name: room.zeros(each.shape[0], each.dtype) for name, each in model.arrays.items()
        }

    @property
    def fields(self) -> tuple[str, ...]:
        return self._fields

    def read(self, field: str) -> Floats:
        return self._down().read(field)

    def memory(self) -> Mapping[str, NDArray[Any]]:
        """None: what there is, is not the host's to save and set."""
        return {}

    def write(self, field: str, values: Floats) -> None:
        model = self._down()
        model.write(field, values)
        for name, each in model.arrays.items():
            self._room.up(self.arrays[name], each)

    def _down(self) -> Store:
        """A store on the host that holds the same."""
        model = self._make()
        for name, each in self.arrays.items():
            model.arrays[name][:] = self._room.down(each)
        return model


def array_of(store: Store | None, name: str) -> Address | None:
    """Where an array of a store begins; None if there is none."""
    if store is None or name not in store.arrays:
        return None
    return address_of(store.arrays[name])
