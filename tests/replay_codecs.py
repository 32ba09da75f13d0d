"""Codecs of a user's own, as a replay log meets them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcsync.codecs import Matrix, Moment, PieceCodec, Settings, Store, SumCodec
from hpcsync.codecs.base import Bytes, Floats, Form


class Doubled(Store):
    """A store that holds its values otherwise than it tells them."""

    def __init__(self, count: int) -> None:
        super().__init__(count, ())
        self._twice = np.zeros(count, np.float32)

    @property
    def fields(self) -> tuple[str, ...]:
        return ("error",)

    def read(self, field: str) -> Floats:
        values: Floats = self._twice / np.float32(2)
        return values

    def write(self, field: str, values: Floats) -> None:
        self._twice[:] = values * np.float32(2)


class Halves(PieceCodec):
    """float16, with an error store of its own kind."""

    name = "halves"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)

    def capacity(self, count: int) -> int:
        return 2 * count

    def store(self, count: int, role: str) -> Store | None:
        return Doubled(count)

    def encode(self, values: Floats, out: Bytes, store: Store | None, moment: Moment) -> int:
        assert store is not None
        held = values + store.read("error")
        coded = held.astype(np.float16)
        store.write("error", np.where(np.isfinite(coded), held - coded.astype(np.float32), 0))
        out[: 2 * values.shape[0]] = coded.view(np.uint8)
        return 2 * int(values.shape[0])

    def decode(self, data: Bytes, out: Floats) -> None:
        out[:] = data[: 2 * out.shape[0]].view(np.float16)

    def decode_add(self, data: Bytes, out: Floats) -> None:
        out += data[: 2 * out.shape[0]].view(np.float16)


class Learning(SumCodec):
    """What is decoded depends on a scale that all ranks' stores have learnt alike: the sums alone
    do not tell it."""

    name = "learning"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)

    def forms(self, count: int, matrices: Sequence[Matrix], ranks: int) -> tuple[Form, ...]:
        return (Form("float32", count),)

    def store(self, count: int, matrices: Sequence[Matrix]) -> Store | None:
        return Store(count, ["scale"])

    def rounds(
        self,
        values: Floats,
        arrays: Sequence[NDArray[Any]],
        matrices: Sequence[Matrix],
        ranks: int,
        divisor: int,
        store: Store | None,
        moment: Moment,
    ) -> Iterator[int]:
        assert store is not None
        arrays[0][:] = values
        yield 0
        values[:] = arrays[0] / np.float32(divisor) * (1 + store.read("scale"))
        learnt = 0.5 * store.read("scale") + 0.1 * np.abs(arrays[0])
        store.write("scale", np.where(np.isfinite(learnt), learnt, 0).astype(np.float32))
