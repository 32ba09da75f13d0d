"""Buffers of a model in a device's memory, such as running means: all ranks go on with rank 0's.

    rank 0    bytes of the buffers -> arena \\
                                             sum over ranks -> arena -> buffers, but on rank 0
    others                   zeros -> arena /

What is added are integers, so that no bit changes. It goes the way of gradients: streams and
events order it, and the host waits for other hosts only, and for what MPI itself sends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from ..collectives import Collective, Collectives
from ..device import Event, Stream, dtype_of

_GROUP = 1 << 24  # bytes that travel together
_ALIGN = 64  # bytes
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Group:
    """Tensors that travel together.

    Attributes:
        start, stop: which of all tensors.
        places: of each in the arena, with its shape.
        flat: all of them.
    """

    start: int
    stop: int
    places: Sequence[Tensor]
    flat: Tensor
    collective: Collective


class DeviceBuffers:
    """Sets tensors of the collectives' device to those of rank 0; its calls are collective.

    Memory is taken for them when shapes or types are not those of the call before: ``_GROUP``
    bytes, or more for a larger tensor.
    """

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives
        self._forms: list[tuple[torch.Size, torch.dtype]] = []
        self._groups: list[_Group] = []
        self._last: Event | None = None  # where the arena was used last

    def prepare(self, tensors: Sequence[Tensor]) -> None:
        """Take the memory that ``broadcast`` of such tensors works in; the host may wait.

        Raises:
            AgreedError: some rank's device has no room; a DeviceError, too.
        """
        self._fit(_values(tensors))

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Set them in place, in the order of the current stream; of the same shapes and types on
        all ranks.

        Raises:
            AgreedError: as ``prepare``.
            CollectiveTimeout: a rank does not come.
        """
        values = _values(tensors)
        self._fit(values)
        if not values:
            return
        stream = self._collectives.device.current()
        if self._last is not None:  # that may have been in another stream
            stream.wait(self._last)
        for group in self._groups:
            self._exchange(group, values[group.start : group.stop], stream)
        self._last = stream.record()
        self._collectives.recorder.later.settle()  # no step does, where no gradient is exchanged

    def close(self) -> None:
        """Free what is bound, once the device has done with it."""
        if self._last is not None and self._collectives.progress.sound:
            self._collectives.progress.settle(self._last)
        for group in self._groups:
            group.collective.close()
        self._groups, self._forms, self._last = [], [], None

    def _fit(self, values: Sequence[Tensor]) -> None:
        forms = [(each.shape, each.dtype) for each in values]
        if forms != self._forms:
            self.close()
            self._bind(values)
            self._forms = forms

    def _bind(self, values: Sequence[Tensor]) -> None:
        groups = list(_groups(values))
        if not groups:
            return
        arena = self._collectives.arena(
            max(starts[-1] for _, starts in groups), bindings=len(groups)
        )
        memory = from_dlpack(arena.own)
        for first, starts in groups:
            mine = values[first : first + len(starts) - 1]
            collective = self._collectives.allreduce(
                arena, dtype_of("int32"), count=starts[-1] // 4, label="buffers of the model"
            )
            places = [
                memory[start : start + each.nbytes].view(each.dtype).view(each.shape)
                for each, start in zip(mine, starts, strict=False)
            ]
            flat = memory[: starts[-1]]
            self._groups.append(_Group(first, first + len(mine), places, flat, collective))

    def _exchange(self, group: _Group, values: Sequence[Tensor], stream: Stream) -> None:
        collective, root = group.collective, self._collectives.runtime.rank == 0
        if root:
            stream.apply(lambda: _copy(group.places, values))
        else:
            stream.apply(group.flat.zero_)
        collective.start(after=[stream.record()])
        collective.wait()
        collective.join(stream)
        if not root:
            stream.apply(lambda: _copy(values, group.places))


def _values(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same memory as whole numbers, past autograd's eyes; without tensors of no elements."""
    given = [each.data for each in tensors if each.numel()]
    return [each.view(_WHOLE.get(each.itemsize, each.dtype)) for each in given]


def _groups(values: Sequence[Tensor]) -> Iterator[tuple[int, list[int]]]:
    """The first tensor of each group, and the bytes of the arena where its tensors start, and
    where the last one ends."""
    first, starts = 0, [0]
    for index, each in enumerate(values):
        starts.append(-(-(starts[-1] + each.nbytes) // _ALIGN) * _ALIGN)
        if starts[-1] >= _GROUP:
            yield first, starts
            first, starts = index + 1, [0]
    if len(starts) > 1:
        yield first, starts


def _copy(outs: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source, in one kernel a type."""
    for dtype in dict.fromkeys(each.dtype for each in outs):
        mine = [place for place, each in enumerate(outs) if each.dtype == dtype]
        torch._foreach_copy_([outs[place] for place in mine], [sources[place] for place in mine])
