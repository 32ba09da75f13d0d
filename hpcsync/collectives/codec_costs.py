"""What codecs and sums cost an element here: processor time on the host, time on a device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..codecs import Codec, Matrix, Moment, PieceCodec, SumCodec
from ..codecs.base import OWNER, SENDER, Floats
from ..codecs.gpu.forms import coder, summer
from ..codecs.gpu.room import Room
from ..config import CommConfig
from ..device import Event, Stream, dtype_of
from ..device.base import Array
from ..device.kernels import empty_bytes
from . import choice
from .costs import CodecCost

PIECE = 1 << 16  # elements
PIECES = 16  # more than a core's cache holds, as gradients are
_WORK_S = 6e-3  # for each function of a codec
_MOST_CALLS = 15
_TOGETHER = 8  # calls that a device is given at once
_WHOLE = 1 << 20  # most elements of the matrix on which codecs of whole tensors are timed


class _Bench:
    """Memory of the host, or of a stream's device, and the time of what works on it."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream
        self._room = None if stream is None else Room(stream)

    def place(self, values: NDArray[Any]) -> Array:
        """A copy of the values."""
        if self._room is None:
            return values.copy()
        made = self._room.empty(values.shape[0], values.dtype)
        self._room.up(made, values)
        return made

    def zeros(self, count: int, dtype: DTypeLike) -> Array:
        return np.zeros(count, dtype) if self._room is None else self._room.zeros(count, dtype)

    def bytes(self, count: int) -> Array:
        return empty_bytes(count) if self._room is None else self._room.empty(count)

    def seconds(self, work: Callable[[int], object]) -> float:
        """Time of one call, the median of several; the first is not counted."""
        work(0)
        if self.stream is not None:
            self.stream.synchronize()
        began = time.perf_counter()
        times: list[float] = []
        while len(times) < 2 or (
            len(times) < _MOST_CALLS and time.perf_counter() - began < _WORK_S
        ):
            times.append(self._time(work, len(times) + 1))
        return median(times)

    def _time(self, work: Callable[[int], object], at: int) -> float:
        if self.stream is None:
            before = time.thread_time()
            work(at)
            return time.thread_time() - before
        before = time.perf_counter()
        for index in range(_TOGETHER):
            work(at + index)
        self.stream.synchronize()
        return (time.perf_counter() - before) / _TOGETHER


def adding_s(source: Floats, stream: Stream | None) -> float:
    """Seconds to add an element to another; ``source`` has ``PIECES`` pieces."""
    bench, kind = _Bench(stream), dtype_of("float32")
    values, target = bench.place(source), bench.zeros(PIECE, np.float32)
    if stream is None:
        return bench.seconds(lambda at: np.add(target, _piece(values, at), out=target)) / PIECE
    return (
        bench.seconds(lambda at: stream.reduce([target], [target, _piece(values, at)], kind))
        / PIECE
    )


def codec_cost(
    codec: Codec,
    comm: CommConfig,
    source: Floats,
    ranks: int,
    shapes: Sequence[Sequence[int]],
    stream: Stream | None,
) -> CodecCost:
    """What a codec costs.

    Args:
        source: ``PIECES`` pieces of values.
        ranks: between which it codes.
        shapes: of the parameters, for codecs of whole tensors.
        stream: that codes; None on the host.
    """
    segment, bench = float(choice.coded_segment(comm, codec)), _Bench(stream)
    with np.errstate(all="ignore"):
        if isinstance(codec, SumCodec):
            return _sum_cost(codec, source, max(ranks, 2), shapes, segment, bench)
        assert isinstance(codec, PieceCodec)
        return _piece_cost(codec, source, segment, bench)


def _piece_cost(codec: PieceCodec, source: Floats, segment: float, bench: _Bench) -> CodecCost:
    code = coder(codec, bench.stream, PIECE, 2)
    values, total = bench.place(source), bench.zeros(PIECE, np.float32)
    coded, out = (bench.bytes(codec.capacity(PIECE)) for _ in range(2))
    sender, owner = code.store(PIECE, SENDER), code.store(PIECE, OWNER)

    def moment(at: int) -> Moment:
        return Moment(at, at, at)

    encode = bench.seconds(lambda at: code.encode(_piece(values, at), coded, sender, moment(at)))
    decode = bench.seconds(lambda at: code.decode(coded, total))
    decode_add = bench.seconds(lambda at: code.decode_add(coded, total))
    combine = bench.seconds(
        lambda at: code.combine(_piece(values, at), 0, [coded], 2, out, owner, moment(at))
    )
    return CodecCost(
        codec.expected(PIECE) / PIECE,
        encode / PIECE,
        decode / PIECE,
        decode_add / PIECE,
        combine / PIECE,
        segment_bytes=segment,
    )


def _sum_cost(
    codec: SumCodec,
    source: Floats,
    ranks: int,
    shapes: Sequence[Sequence[int]],
    segment: float,
    bench: _Bench,
) -> CodecCost:
    tensors = [tuple(shape) for shape in shapes] if codec.whole else []
    if not tensors:
        tensors = [(256, PIECE // 256)]
    nbytes = elements = rounds = 0
    for shape in tensors:
        forms = codec.forms(math.prod(shape), (Matrix(0, shape),), ranks)
        nbytes += sum(np.dtype(form.dtype).itemsize * form.count for form in forms)
        elements += math.prod(shape)
        rounds = max(rounds, len(forms))
    typical = max(tensors, key=math.prod)
    columns = math.prod(typical[1:])
    if math.prod(typical) > _WHOLE and columns <= _WHOLE:
        typical = (_WHOLE // columns, columns)
    count = min(math.prod(typical), _WHOLE)
    matrices = (Matrix(0, typical if math.prod(typical) == count else (count,)),)
    code = summer(codec, bench.stream, count, matrices)
    forms = codec.forms(count, matrices, ranks)
    arrays = [bench.zeros(form.count, form.dtype) for form in forms]
    values = bench.place(np.resize(source, count))
    store = code.store(count, matrices)

    def run(at: int) -> None:
        moment = Moment(at, at, at)
        for told in code.rounds(values, arrays, matrices, ranks, 1, store, moment):
            if isinstance(told, Event):
                told.synchronize()

    half = bench.seconds(run) / count / 2
    each = nbytes / max(elements, 1)
    return CodecCost(each, half, half, 0.0, 0.0, max(rounds, 1), segment)


def _piece(source: Array, at: int) -> Array:
    start = at % PIECES * PIECE
    return source[start : start + PIECE]
