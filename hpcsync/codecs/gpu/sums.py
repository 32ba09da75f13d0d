"""Codecs whose coded forms are added: what all forms share, shared scales, and random-k."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from ...device import Event
from ...device.base import Array
from ...device.cuda_launch import address_of
from ...errors import HpcsyncError
from ..base import Form, Matrix, Moment, Store, SumCodec
from ..int8_shared import SharedScale, sized
from ..randomk import GROUP, RandomK
from .room import QueuedStore, Room, array_of

Kind = TypeVar("Kind", bound=SumCodec)


@dataclass(frozen=True, slots=True)
class Share:
    """What a rank brings to one exchange; see ``SumCodec.rounds``."""

    values: Array
    arrays: Sequence[Array]
    ranks: int
    divisor: int
    store: Store | None
    moment: Moment


class QueuedSums(ABC, Generic[Kind]):
    """A codec's form on a stream, for pieces of ``count`` elements with these tensors."""

    def __init__(self, codec: Kind, room: Room, count: int, matrices: Sequence[Matrix]) -> None:
        self._codec, self._room, self._stream = codec, room, room.stream

    def forms(self, count: int, matrices: Sequence[Matrix], ranks: int) -> tuple[Form, ...]:
        """As the codec's."""
        return self._codec.forms(count, matrices, ranks)

    def store(self, count: int, matrices: Sequence[Matrix]) -> Store | None:
        """The codec's store in device memory."""
        if self._codec.store(count, matrices) is None:
            return None

        def make() -> Store:
            made = self._codec.store(count, matrices)
            assert made is not None
            return made

        return QueuedStore(make, self._room)

    def rounds(
        self,
        values: Array,
        arrays: Sequence[Array],
        matrices: Sequence[Matrix],
        ranks: int,
        divisor: int,
        store: Store | None,
        moment: Moment,
    ) -> Iterator[int | Event]:
        """As the codec's; where it yields an event it wants to go on when that is ready."""
        return self._rounds(Share(values, arrays, ranks, divisor, store, moment))

    @abstractmethod
    def _rounds(self, share: Share) -> Iterator[int | Event]:
        """The exchange, of the tensors that the form was made for."""


class Integers(QueuedSums[SharedScale]):
    """int8_shared."""

    def __init__(
        self, codec: SharedScale, room: Room, count: int, matrices: Sequence[Matrix]
    ) -> None:
        super().__init__(codec, room, count, matrices)
        self._total = room.zeros(1, "uint32")  # of all numbers, modulo 2^32
        self._told = room.stream.device.pinned(16).view(np.int64)  # what came, and what is

    def _rounds(self, share: Share) -> Iterator[int | Event]:
        values, arrays, store, moment = share.values, share.arrays, share.store, share.moment
        kernels, settings = self._room.kernels.blocks, self._codec.settings
        count, levels, bits = values.shape[0], sized(share.ranks)[1], 8 * arrays[1].dtype.itemsize
        piece = (address_of(values), array_of(store, "error"), count)
        maxima, numbers, total = (address_of(each) for each in (*arrays[:2], self._total))
        checks = settings.verify
        with self._stream:
            kernels.shared_maxima(*piece, maxima)
        yield 0
        if checks:
            self._stream.fill(arrays[2], 0)
        with self._stream:
            kernels.shared_encode(
                *(bits, *piece, maxima, levels, settings.stochastic, moment.seed, numbers),
                # The lower half of a 64-bit number, which is little endian.
                address_of(arrays[2]) if checks else total,
            )
        yield 1
        if checks:
            yield 2
        self._stream.fill(self._total, 0)
        with self._stream:
            kernels.shared_decode(
                bits,
                numbers,
                count,
                maxima,
                levels,
                float(share.divisor),
                address_of(values),
                total,
            )
        if checks:
            yield self._tell(arrays[2])
            if (int(self._told[0]) - int(self._told[1:].view(np.uint32)[0])) % (1 << 32):
                raise HpcsyncError(
                    f"int8_shared: the sum over {share.ranks} ranks of a piece of {count} elements "
                    f"fails its checksum in step {moment.step}: it was changed on its way"
                )

    def _tell(self, came: Array) -> Event:
        self._stream.copy(self._told[:1], came)
        self._stream.copy(self._told[1:].view(np.uint32)[:1], self._total)
        return self._stream.record()


class Groups(QueuedSums[RandomK]):
    """randomk."""

    def __init__(self, codec: RandomK, room: Room, count: int, matrices: Sequence[Matrix]) -> None:
        super().__init__(codec, room, count, matrices)
        self._bad = room.empty(1, "uint32")

    def _rounds(self, share: Share) -> Iterator[int | Event]:
        values, form, moment = share.values, share.arrays[0], share.moment
        count, kernels = values.shape[0], self._room.kernels.sparse
        if count == 0:
            yield 0
            return
        wanted, groups = self._codec.wanted(count), -(-count // GROUP)
        error, own = array_of(share.store, "error"), address_of(values)
        scale = groups / wanted if error is None else 1.0
        data, bad = address_of(form), address_of(self._bad)
        told, picked = address_of(form[-1:]), (count, wanted, moment.shared_seed)
        self._stream.fill(self._bad, 0)
        with self._stream:
            kernels.accumulate(own, 1.0, 0.0, None, error, count, bad)
            kernels.groups_take(own if error is None else error, *picked, False, data)
            kernels.groups_settle(error, *picked, bad, told)
        yield 0
        with self._stream:
            kernels.groups_put(data, *picked, float(share.divisor), scale, own)
            kernels.groups_spoil(told, count, own)
