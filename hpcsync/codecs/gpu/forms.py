"""Which codec has which form on a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from ...device.base import Array, Device, Event, Stream
from ...errors import ConfigError
from ..base import Codec, Form, Matrix, Moment, PieceCodec, Store, SumCodec
from ..bf16 import Bf16
from ..fp8 import Fp8
from ..fp16 import Fp16
from ..int4 import Int4
from ..int8 import Int8
from ..int8_shared import SharedScale
from ..none import Uncoded
from ..onebit import OneBit
from ..powersgd import PowerSGD
from ..randomk import RandomK
from ..threshold import Threshold
from ..topk import TopK
from .pieces import Blocked, Plain, QueuedPieces, RotatedInt4, Signs
from .powersgd import LowRank
from .room import Length, Room
from .sparse import Sparse
from .sums import Groups, Integers, QueuedSums

# By the very class: of a class made from one of these nobody knows what else it does.
_PIECES: dict[type[Codec], type[QueuedPieces[Any]]] = {
    Uncoded: Plain,
    Bf16: Blocked,
    Fp16: Blocked,
    Fp8: Blocked,
    Int8: Blocked,
    Int4: RotatedInt4,
    OneBit: Signs,
    TopK: Sparse,
    Threshold: Sparse,
}
_SUMS: dict[type[Codec], type[QueuedSums[Any]]] = {
    SharedScale: Integers,
    RandomK: Groups,
    PowerSGD: LowRank,
}


class Coder(Protocol):
    """A codec of pieces, on the host or on a stream; see ``PieceCodec``."""

    name: str

    def capacity(self, count: int) -> int: ...

    def expected(self, count: int) -> float: ...

    def store(self, count: int, role: str) -> Store | None: ...

    def encode(
        self, values: Array, out: Array, store: Store | None, moment: Moment
    ) -> int | Length: ...

    def decode(self, data: Array, out: Array) -> None: ...

    def decode_add(self, data: Array, out: Array) -> None: ...

    def combine(
        self,
        own: Array,
        place: int,
        others: Sequence[Array],
        divisor: int,
        out: Array,
        store: Store | None,
        moment: Moment,
    ) -> int | Length: ...


class Summer(Protocol):
    """A codec of sums, on the host or on a stream; see ``SumCodec`` and ``QueuedSums``."""

    def forms(self, count: int, matrices: Sequence[Matrix], ranks: int) -> tuple[Form, ...]: ...

    def store(self, count: int, matrices: Sequence[Matrix]) -> Store | None: ...

    def rounds(
        self,
        values: Array,
        arrays: Sequence[Array],
        matrices: Sequence[Matrix],
        ranks: int,
        divisor: int,
        store: Store | None,
        moment: Moment,
    ) -> Iterator[int] | Iterator[int | Event]: ...


def coder(codec: PieceCodec, stream: Stream | None, most: int, ranks: int) -> Coder:
    """The codec for pieces of up to ``most`` elements of an exchange between ``ranks`` ranks.

    Args:
        stream: that works on them; None for pieces in host memory.
    """
    if stream is None:
        return codec
    return _PIECES[type(codec)](codec, Room(stream), most, ranks)


def summer(
    codec: SumCodec, stream: Stream | None, count: int, matrices: Sequence[Matrix]
) -> Summer:
    """The codec for pieces of ``count`` elements with these tensors.

    Args:
        stream: that works on them; None for pieces in host memory.
    """
    if stream is None:
        return codec
    return _SUMS[type(codec)](codec, Room(stream), count, matrices)


def require(codec: Codec, device: Device) -> None:
    """Check that pieces in the device's memory can be coded.

    Raises:
        ConfigError: they cannot.
    """
    known = [*_PIECES, *_SUMS]
    if not device.queued or type(codec) in known:
        return
    names = ", ".join(sorted(each.name for each in known if each is not Uncoded))
    raise ConfigError(
        f"compress.codec = {codec.name!r}: cannot code gradients on {device.name}; use one of "
        f"{names}, or none, or train.device=cpu"
    )
