"""Top-k and threshold; how many bytes a piece takes only the device knows."""

from __future__ import annotations

import itertools

from ...device.base import Array
from ...device.cuda_launch import Address, address_of
from ...device.cuda_sparse import decode_scratch, encode_scratch
from ..base import Moment, Store
from ..sparse import ERROR, VELOCITY, SparseCodec
from .pieces import FLOAT32, QueuedPieces, Sum
from .room import Length, Room, array_of


class Sparse(QueuedPieces[SparseCodec]):
    """topk and threshold.

    A length lasts until as many more pieces were coded as there are ranks.
    """

    def __init__(self, codec: SparseCodec, room: Room, most: int, ranks: int) -> None:
        super().__init__(codec, room, most, ranks)
        self._kernels = room.kernels.sparse
        self._momentum = codec.settings.momentum
        words = max(encode_scratch(most), decode_scratch(most)) if most else 1
        self._scratch = room.empty(words, "uint32")
        self._bad = room.empty(1, "uint32")
        cells = room.empty(ranks, "uint64")
        self._cells = itertools.cycle([cells[at : at + 1] for at in range(ranks)])

    def _adds_apart(self, ranks: int) -> bool:
        return ranks > 2

    def encode(
        self, values: Array, out: Array, store: Store | None, moment: Moment
    ) -> int | Length:
        momentum = self._momentum if store else 0.0
        most = self._codec.most(values.shape[0], moment.step)
        return self._encode(values, most, 1, momentum, out, store, moment)

    def decode(self, data: Array, out: Array) -> None:
        with self._stream:
            self._kernels.decode(*self._coded(data, out), address_of(out))

    def decode_add(self, data: Array, out: Array) -> None:
        with self._stream:
            self._kernels.decode_add(*self._coded(data, out), address_of(out))

    def _combine(self, given: Sum) -> int | Length:
        own, place, others, divisor = given.own, given.place, given.others, given.divisor
        store, moment = given.store, given.moment
        velocity = array_of(store, VELOCITY)
        if velocity is not None:
            self._accelerate(own, velocity)
        # The same sums as on the host, in its order.
        if place > 1:
            before = self._total[: own.shape[0]]
            self.decode(others[0], before)
            for data in others[1:place]:
                self.decode_add(data, before)
            self._stream.reduce([own], [before, own], FLOAT32)
        for data in others[place if place > 1 else 0 :]:
            self.decode_add(data, own)
        if store is None:
            if divisor != 1:
                self._stream.reduce([own], [own], FLOAT32, divisor)
            divisor = 1
        most = self._codec.most_of_mean(own.shape[0], moment.step)
        used = self._encode(own, most, divisor, 0.0, given.out, store, moment)
        if velocity is not None:
            with self._stream:
                self._kernels.clear(*self._coded(given.out, own), velocity)
        self.decode(given.out, own)
        return used

    def _encode(
        self,
        values: Array,
        k: int,
        divisor: int,
        momentum: float,
        out: Array,
        store: Store | None,
        moment: Moment,
    ) -> int | Length:
        """Code at most k of v + (m u + values / divisor), whose fields the store holds."""
        count, length = values.shape[0], Length(next(self._cells))
        if count == 0:
            return 0
        velocity = array_of(store, VELOCITY) if momentum else None
        with self._stream:
            self._kernels.encode(
                *(address_of(values), float(divisor), momentum, velocity, array_of(store, ERROR)),
                *(count, k, self._codec.minimum(), moment.seed, address_of(self._scratch)),
                *(address_of(out), address_of(length.cell)),
            )
        return length

    def _accelerate(self, values: Array, velocity: Address) -> None:
        """Momentum correction: values and velocity become m velocity + values."""
        with self._stream:
            self._kernels.momentum(
                address_of(values), self._momentum, velocity, values.shape[0], address_of(self._bad)
            )

    def _coded(self, data: Array, out: Array) -> tuple[Address, int, Address]:
        return address_of(data), out.shape[0], address_of(self._scratch)
