"""The coded form of a sparse piece, in NumPy: the same bits as cuda/cpu/sparse.cpp.

    header    kind (uint32), entries (uint32)
    indices   by kind, the shortest that fits:
              BYTES    entries of each block of 256 elements (uint8), indices in it (uint8)
              WORDS    entries of each block of 65536 (uint32), indices in it (uint16)
              BITMAP   a bit an element, the lowest of a byte first
              DENSE    nothing: every element is an entry
    values    bfloat16, in the order of their indices

All is little endian, and nothing is aligned. POISON is a header alone: the values held a NaN or
Inf, and all elements decode to NaN. At 1% an entry takes 3.4 bytes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .base import Bytes, Floats
from .rounding import random_at

POISON, BYTES, WORDS, BITMAP, DENSE = range(5)
HEADER = 8
SMALL, LARGE = 256, 65536  # elements of a block with indices of one byte, of two bytes
_BLOCKS = {BYTES: (SMALL, "u1", "u1"), WORDS: (LARGE, "<u4", "<u2")}
INF_BITS = 0x7F800000

Indices = NDArray[np.int64]


def bits_of(values: Floats) -> NDArray[np.uint32]:
    """The values' bits."""
    return values.view(np.uint32)


def magnitudes(values: Floats) -> NDArray[np.uint32]:
    """|values| as bits, which are ordered as they are; then come Inf and NaN."""
    return bits_of(values) & np.uint32(0x7FFFFFFF)


def to_bf16(values: Floats) -> NDArray[np.uint16]:
    """Finite values as bfloat16, to nearest even; none becomes infinite."""
    size = magnitudes(values)
    size = size + (np.uint32(0x7FFF) + ((size >> np.uint32(16)) & np.uint32(1)))
    size = np.where(size < INF_BITS, size, np.uint32(0x7F7FFFFF))
    sign = bits_of(values) & np.uint32(0x80000000)
    return ((sign | size) >> np.uint32(16)).astype(np.uint16)


def from_bf16(codes: NDArray[np.uint16]) -> Floats:
    """What bfloat16 codes stand for."""
    return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)


def index_bytes(kind: int, count: int, entries: int) -> int:
    """Bytes of what stands between the header and the values."""
    if kind == BYTES:
        return -(-count // SMALL) + entries
    if kind == WORDS:
        return 4 * -(-count // LARGE) + 2 * entries
    return -(-count // 8) if kind == BITMAP else 0


def kind_of(count: int, entries: int, full: bool) -> int:
    """The shortest kind, the first of equals.

    Args:
        full: some block of 256 elements has 256 entries, which BYTES cannot say.
    """
    kinds = (WORDS, BITMAP) if full else (BYTES, WORDS, BITMAP)
    best = min(kinds, key=lambda kind: index_bytes(kind, count, entries))
    shorter = index_bytes(best, count, entries) + 2 * entries < 2 * count
    return best if shorter else DENSE


def most_bytes(count: int, most: int, *, full: bool = True) -> int:
    """Bytes of ``most`` entries; with ``full``, wherever they stand."""
    if count == 0:
        return 0
    most = min(most, count)
    kind = kind_of(count, most, full)
    entries = count if kind == DENSE else most
    return HEADER + index_bytes(kind, count, entries) + 2 * entries


def chosen(values: Floats, k: int, minimum: float, seed: int) -> Indices:
    """Indices, in order, of the ``k`` largest magnitudes from ``minimum`` on; never of zeros.

    Of those that equal the least of them, evenly spread ones go, from a place on that the seed
    decides. There is no NaN or Inf among the values.
    """
    size = magnitudes(values)
    lowest = max(1, int(bits_of(np.array([minimum], np.float32))[0]))
    high = np.flatnonzero(size >= lowest)
    if high.shape[0] <= k:
        return high
    cut = np.partition(size, size.shape[0] - k)[size.shape[0] - k]
    above = np.flatnonzero(size > cut)
    equal = np.flatnonzero(size == cut)
    wanted, ties = k - above.shape[0], equal.shape[0]
    start = int(random_at(seed, np.zeros(1, np.uint32))[0]) * ties >> 32
    turn = (np.arange(ties) + start) % ties * wanted % ties
    return np.sort(np.concatenate([above, equal[turn < wanted]]))


def pack(values: Floats, places: Indices, out: Bytes, error: Floats | None) -> int:
    """Code the elements at ``places``; what rounding loses goes to ``error``. The bytes used."""
    count, entries = values.shape[0], places.shape[0]
    blocks = np.bincount(places // SMALL, minlength=-(-count // SMALL))
    kind = kind_of(count, entries, bool(np.any(blocks == SMALL)))
    if kind == DENSE:
        places, entries = np.arange(count), count
    sent = values[places]
    codes = to_bf16(sent)
    if error is not None:
        error[places] = sent - from_bf16(codes)
    head = np.array([kind, entries], "<u4").tobytes()
    body = _indices(kind, places, count)
    coded = head + body + codes.astype("<u2").tobytes()
    out[: len(coded)] = np.frombuffer(coded, np.uint8)
    return len(coded)


def poison(out: Bytes) -> int:
    """Code a piece of which every element is NaN; the bytes used."""
    out[:HEADER] = 0
    return HEADER


def unpack(data: Bytes, count: int) -> tuple[Indices, Floats] | None:
    """Indices and values of a coded piece of ``count`` elements; None for poison."""
    kind, entries = (int(each) for each in np.frombuffer(data[:HEADER].tobytes(), "<u4"))
    if kind == POISON:
        return None
    stop = HEADER + index_bytes(kind, count, entries)
    body = data[HEADER:stop].tobytes()
    values = from_bf16(np.frombuffer(data[stop : stop + 2 * entries].tobytes(), "<u2"))
    if kind == DENSE:
        return np.arange(count), values
    if kind == BITMAP:
        marks = np.unpackbits(np.frombuffer(body, np.uint8), bitorder="little")
        return np.flatnonzero(marks[:count]), values
    block, counts_type, index_type = _BLOCKS[kind]
    blocks = -(-count // block)
    counts = np.frombuffer(body, counts_type, blocks)
    within = np.frombuffer(body, index_type, entries, counts.nbytes)
    return np.repeat(np.arange(blocks) * block, counts) + within, values


def _indices(kind: int, places: Indices, count: int) -> bytes:
    """What stands between the header and the values."""
    if kind == DENSE:
        return b""
    if kind == BITMAP:
        marks = np.zeros(count, np.bool_)
        marks[places] = True
        return np.packbits(marks, bitorder="little").tobytes()
    block, counts_type, index_type = _BLOCKS[kind]
    counts = np.bincount(places // block, minlength=-(-count // block))
    return counts.astype(counts_type).tobytes() + (places % block).astype(index_type).tobytes()
