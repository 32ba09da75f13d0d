"""What bench_codecs times: operations on memory of their own, with the bytes that each touches.

Touched bytes are the least that an operation can do with: every array that it reads, and every
one that it writes, once. B is the piece in float32, C its coded form, E the error store:

    encode      B + C + 2 E
    decode      C + B
    decode_add  C + 2 B                of B, only the cache lines in which anything is added
    combine     2 B + 2 C + 2 E        one other rank's piece; own values read and overwritten
    exchange    2 B + 2 C + 2 E        of codecs whose coded forms are added: all but the network
    sum S -> O  (S + O) B              the outputs are among the sources, as in a node
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcsync import codecs
from hpcsync.codecs import Matrix, Moment, PieceCodec, Settings, SumCodec
from hpcsync.codecs.base import OWNER, SENDER, Floats
from hpcsync.device import dtype_of, get
from hpcsync.device.kernels import empty_bytes

# threshold: from where a hundredth of a normal distribution lies.
SETTINGS = Settings(threshold=2.576)
LINE = 64  # bytes of a cache line
SUMS = ((2, 1), (2, 2), (4, 1), (4, 4))


@dataclass(frozen=True, kw_only=True)
class Operation:
    """Something to time.

    Attributes:
        touched: bytes read and written, at least.
        source: bytes of float32 that go in or come out.
        reset: sets the memory back before a sample; not timed.
    """

    codec: str
    name: str
    touched: int
    source: int
    run: Callable[[], object]
    reset: Callable[[], object] = lambda: None


def normal(count: int, seed: int = 1) -> Floats:
    """Standard normal elements."""
    return np.random.default_rng(seed).standard_normal(count, np.float32)


def heavy(count: int, seed: int = 2) -> Floats:
    """Student's t with 3 degrees of freedom: a few elements are far larger than the others."""
    generator = np.random.default_rng(seed)
    chi = sum(generator.standard_normal(count, np.float32) ** 2 for _ in range(3))
    values: Floats = generator.standard_normal(count, np.float32) / np.sqrt(chi / np.float32(3))
    return values


def matrices(count: int) -> tuple[list[Matrix], int]:
    """Square matrices of 1024 rows at most that fill a piece, and its elements in them."""
    side = max(1, min(1024, math.isqrt(count)))
    used = count // side**2 * side**2
    return [Matrix(start, (side, side)) for start in range(0, used, side**2)], used


def operations(codec: Any, count: int) -> list[Operation]:
    """All operations of a codec on ``count`` elements."""
    if isinstance(codec, PieceCodec):
        return _piece_operations(codec, count)
    return [_exchange(codec, count)]


def _piece_operations(codec: PieceCodec, count: int) -> list[Operation]:
    values, moment = normal(count), Moment(seed=1, shared_seed=2)
    sender, owner = codec.store(count, SENDER), codec.store(count, OWNER)
    kept = sender.nbytes if sender else 0
    coded, out = empty_bytes(codec.capacity(count)), empty_bytes(codec.capacity(count))
    used = codec.encode(values, coded, codec.store(count, SENDER), moment)
    data, raw = coded[:used], values.nbytes
    decoded, total, own = np.zeros_like(values), np.zeros_like(values), normal(count, 3)

    def operation(name: str, touched: int, run: Callable[[], object], **more: Any) -> Operation:
        return Operation(codec=codec.name, name=name, touched=touched, source=raw, run=run, **more)

    codec.decode(data, decoded)
    lines = np.count_nonzero(np.logical_or.reduceat(decoded != 0, range(0, count, LINE // 4)))
    added = min(raw, LINE * int(lines))
    both = 2 * raw + 2 * used + 2 * kept
    return [
        operation(
            "encode",
            raw + used + 2 * kept,
            lambda: codec.encode(values, out, sender, moment),
        ),
        operation("decode", used + raw, lambda: codec.decode(data, decoded)),
        operation("decode_add", used + 2 * added, lambda: codec.decode_add(data, total)),
        operation("combine", both, lambda: codec.combine(own, 0, [data], 2, out, owner, moment)),
    ]


def _exchange(codec: SumCodec, count: int) -> Operation:
    found, count = matrices(count) if codec.whole else ([], count)
    values, moment = normal(count), Moment(seed=1, shared_seed=2)
    own, store = values.copy(), codec.store(count, found)
    arrays = [np.zeros(form.count, form.dtype) for form in codec.forms(count, found, 2)]
    kept = store.nbytes if store else 0
    coded = sum(array.nbytes for array in arrays)

    def run() -> None:
        for _ in codec.rounds(own, arrays, found, 2, 2, store, moment):
            pass

    def reset() -> None:
        own[:] = values

    touched = 2 * own.nbytes + 2 * coded + 2 * kept
    return Operation(
        codec=codec.name, name="exchange", touched=touched, source=own.nbytes, run=run, reset=reset
    )


def sums(count: int) -> list[Operation]:
    """The node's sum: the mean of some buffers, written to one of them or to all."""
    device, dtype, found = get("cpu"), dtype_of("float32"), []
    for sources, outs in SUMS:
        held = [normal(count, seed) for seed in range(sources)]

        def run(held: list[Floats] = held, outs: int = outs) -> None:
            device.reduce(held[:outs], held, dtype, len(held))

        found.append(
            Operation(
                codec="sum",
                name=f"{sources} -> {outs}",
                touched=(sources + outs) * held[0].nbytes,
                source=sources * held[0].nbytes,
                run=run,
            )
        )
    return found


# -- what comes out ----------------------------------------------------------------------


def through(codec: Any, values: Floats) -> tuple[Floats, int]:
    """What ``values`` become on one rank, and the coded bytes."""
    moment, count = Moment(seed=1, shared_seed=2), values.shape[0]
    if isinstance(codec, PieceCodec):
        coded, out = empty_bytes(codec.capacity(count)), np.empty_like(values)
        used = codec.encode(values, coded, codec.store(count, SENDER), moment)
        codec.decode(coded[:used], out)
        return out, used
    found, count = matrices(count) if codec.whole else ([], count)
    out = values[:count].copy()
    arrays = [np.zeros(form.count, form.dtype) for form in codec.forms(count, found, 1)]
    for _ in codec.rounds(out, arrays, found, 1, 1, codec.store(count, found), moment):
        pass
    return out, sum(array.nbytes for array in arrays)


def quality(name: str, count: int) -> dict[str, Any]:
    """Coded over raw bytes, relative errors (2-norm), and how many elements came through."""
    codec = codecs.build(name, SETTINGS)
    found: dict[str, Any] = {"codec": name}
    for kind, make in (("normal", normal), ("heavy", heavy)):
        values = make(count)
        out, used = through(codec, values)
        values = values[: out.shape[0]]
        found[f"error_{kind}"] = float(
            np.linalg.norm((out - values).astype(np.float64)) / np.linalg.norm(values)
        )
        found[f"ratio_{kind}"] = used / values.nbytes
        found[f"kept_{kind}"] = np.count_nonzero(out) / values.shape[0]
    return found
