"""int4: 4 bits an element, after a rotation that spreads outliers over their block.

Each block of 256 values is rotated by a Hadamard matrix (Suresh et al. 2017, arXiv 1611.00429),
and its coefficients become whole numbers in -8..7 times one float32 scale: 132 bytes for 1024,
0.129 of float32. cuda/hpcsync_block_int4.h states the maths, the layout and the end of a piece.

The error store is that of LoCo (Xie et al. 2024, arXiv 2407.04480): 8 bits an element, here of the
rotated error, so that coding needs no rotation back, with a power of two for each block. With
h = g + e and d what h decodes to,

    e' = keep * e + (1 - keep) * (h - d)

    sum of d = sum of g - (e' - e at first) / (1 - keep)

so any ``keep`` below 1 loses nothing: sums of decoded steps stay as near to the sums of what was
put in as errors are small. The bound is least at 0, which is the default and is classic error
feedback. The 8 bits lose some: errors are rounded at random without bias, so that this part grows
as the root of the number of steps, from less than a hundredth of a step's own error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ctypes import c_int
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..device.kernels import Kernels, address, f32, pointer, pointers, size_t, u64
from .base import Bytes, Floats, Moment, PieceCodec, Settings, Store
from .rotation import BLOCK, rotate, unrotate
from .rounding import FLOAT_MAX, random_at, units

ZERO = 8  # nibbles hold q + 8
STORE_SEED = 0x5851F42D4C957F2D
SCALE_MASK = np.uint32(0xFFFFF000)  # 12 significant bits: q * scale is exact

Array = NDArray[Any]


def blocks_of(count: int) -> int:
    return -(-count // BLOCK)


# ---- scale, quantiser, nibbles ---------------------------------------------------------------


def _rows(values: Array) -> Array:
    """A row for each block, the last filled up with zeros."""
    rows = np.zeros((blocks_of(values.shape[0]), BLOCK), values.dtype)
    rows.reshape(-1)[: values.shape[0]] = values
    return rows


def _spread(of_blocks: Array, count: int) -> Array:
    """For each of ``count`` elements its block's value."""
    return np.repeat(of_blocks, BLOCK)[:count]


def block_scales(h: Floats, stochastic: bool) -> tuple[Floats, Floats]:
    """Scale and inverse of each block of coefficients: ``hpcsync_int4_scale``."""
    rows = _rows(h)
    most, least = rows.max(axis=1), rows.min(axis=1)
    negative = -least > most
    largest = np.abs(np.where(negative, least, most))  # no -0
    if stochastic:
        highest = np.float32(FLOAT_MAX / np.float32(7)).view(np.uint32) & SCALE_MASK
        bits = np.minimum(
            ((largest / np.float32(7)).view(np.uint32) + ~SCALE_MASK) & SCALE_MASK, highest
        )
        signs = np.zeros_like(bits)
    else:
        bits = (largest * np.float32(0.125)).view(np.uint32) & SCALE_MASK
        signs = np.where(negative, np.uint32(0), np.uint32(1 << 31))
    scale = (bits | signs).view(np.float32)
    coded = bits >= 0x00800000
    inverse = np.where(coded, np.float32(1) / scale, np.float32(0))
    scale = np.where(coded, scale, np.float32(0))
    finite = np.isfinite(most) & np.isfinite(least)
    return np.where(finite, scale, np.float32(np.nan)), np.where(finite, inverse, np.float32(0))


def quantise(h: Floats, inverse: Floats, seed: int | None) -> Floats:
    """Whole numbers -8..7 as float32; 0 where h is not finite."""
    y = h * _spread(inverse, h.shape[0])
    q = np.rint(y) if seed is None else np.floor(y + units(seed, h.shape[0]))
    return np.where(np.isnan(q), np.float32(0), np.minimum(q, np.float32(7)))


def pack(q: Array, out: Bytes) -> None:
    """Whole numbers -8..7 as nibbles into ``(count + 1) // 2`` bytes: ``hpcsync_int4_pack``."""
    nibbles = (q.astype(np.int32) + ZERO).astype(np.uint8)
    whole = nibbles.shape[0] // BLOCK * BLOCK
    # [block, half, nibble of a word, word] to bytes of words.
    words = nibbles[:whole].reshape(-1, 2, 8, 16).transpose(0, 1, 3, 2)
    out[: whole // 2] = (words[..., 0::2] | (words[..., 1::2] << 4)).reshape(-1)
    end = np.zeros((nibbles.shape[0] - whole + 1) // 2 * 2, np.uint8)
    end[: nibbles.shape[0] - whole] = nibbles[whole:]
    out[whole // 2 : whole // 2 + end.shape[0] // 2] = end[0::2] | (end[1::2] << 4)


def unpack(data: Bytes, count: int) -> NDArray[np.int8]:
    """The ``count`` whole numbers that were packed."""
    whole = count // BLOCK * BLOCK
    q = np.empty(count, np.int8)
    pairs = np.stack([data & 15, data >> 4], axis=-1).astype(np.int8) - np.int8(ZERO)
    words = pairs[: whole // 2].reshape(-1, 2, 16, 8).transpose(0, 1, 3, 2)
    q[:whole] = words.reshape(-1)
    q[whole:] = pairs[whole // 2 :].reshape(-1)[: count - whole]
    return q


# ---- error store -----------------------------------------------------------------------------


class RotatedStore(Store):
    """Errors of a piece as coefficients of 8 bits with a power of two for each block.

    ``read`` and ``write`` speak of values, not coefficients. All values that a store can hold are
    exact in float32 both ways: a store written with what another one read is alike. Values from
    elsewhere are rounded to the nearest that it can hold.
    """

    def __init__(self, count: int) -> None:
        super().__init__(count, ())
        self.errors = np.zeros(count, np.int8)
        self.exponents = np.zeros(blocks_of(count), np.uint8)  # as in a float32; 0 is 0
        self.arrays = {"errors": self.errors, "exponents": self.exponents}

    @property
    def fields(self) -> tuple[str, ...]:
        return ("error",)

    def memory(self) -> Mapping[str, Array]:
        return self.arrays

    def units(self) -> Floats:
        """The unit of each block."""
        return (self.exponents.astype(np.uint32) << np.uint32(23)).view(np.float32)

    def coefficients(self) -> Floats:
        held: Floats = self.errors.astype(np.float32) * _spread(self.units(), self.count)
        return held

    def read(self, field: str) -> Floats:
        with np.errstate(over="ignore"):
            values = unrotate(self.errors).astype(np.float32) * _spread(self.units(), self.count)
        return np.clip(values, -FLOAT_MAX, FLOAT_MAX)

    def write(self, field: str, values: Floats) -> None:
        rotated = rotate(values)
        # The least power of two of which 127 suffice.
        mantissas, exponents = np.frexp(np.abs(_rows(rotated)).max(axis=1, initial=0))
        exponents = exponents + np.where(mantissas * 128 > 127, 127 - 6, 127 - 7)
        self.exponents[:] = np.clip(np.where(mantissas == 0, 0, exponents), 1, 253)
        steps = np.rint(rotated * _spread(_per_unit(self.exponents), self.count))
        self.errors[:] = np.clip(steps, -127, 127)


def _per_unit(exponents: NDArray[np.uint8]) -> Floats:
    return ((254 - exponents.astype(np.uint32)) << np.uint32(23)).view(np.float32)


def _dither(seed: int, count: int) -> Floats:
    """128 + u for each coefficient, u in [0, 1): ``hpcsync_int4_dither``."""
    c = np.arange(count, dtype=np.uint32)
    words = random_at(seed ^ STORE_SEED, (c >> 8 << 4) | (c & 15)) + (c >> 4 & 15) * 0x9E37
    dithers: Floats = ((words & np.uint32(0xFFFF)) | np.uint32(0x43000000)).view(np.float32)
    return dithers


def _keep(lost: Floats, scale: Floats, store: RotatedStore, keep: float, seed: int) -> None:
    """Put what was lost into the store, but in blocks whose scale is NaN."""
    count, finite = store.count, np.isfinite(scale)
    bound = np.abs(scale)
    if keep:
        share, rest = np.float32(keep), np.float32(1) - np.float32(keep)
        lost = share * store.coefficients() + rest * lost
        bound = np.abs(_rows(lost)).max(axis=1, initial=0)
    above = (bound.view(np.uint32) + np.uint32(0x00040000)) >> np.uint32(23)
    made = np.where(above > 7, above - np.uint32(6), np.uint32(1)).astype(np.uint8)
    errors = lost * _spread(_per_unit(made), count) + _dither(seed, count)
    chosen = _spread(finite, count)
    store.errors[chosen] = errors[chosen].astype(np.int32) - 128
    store.exponents[finite] = made[finite]


# ---- codec -----------------------------------------------------------------------------------


class Int4(PieceCodec):
    """4-bit whole numbers of rotated blocks, with an error store of 8 bits.

    Args:
        keep: share of the old error in the new one, LoCo's beta, in [0, 1).
    """

    name = "int4"
    block = BLOCK

    def __init__(self, settings: Settings, kernels: Kernels | None, keep: float = 0.0) -> None:
        super().__init__(settings)
        assert 0.0 <= keep < 1.0, "keep is a share below 1"
        self.keep = keep
        self.native = kernels is not None
        if kernels is None:
            return
        error = (address, address, f32)
        random = (c_int, u64, address)
        self._encode = kernels.function("int4_encode", None, address, *error, size_t, *random)
        self._decode = kernels.function("int4_decode", None, address, size_t, address)
        self._decode_add = kernels.function("int4_decode_add", None, address, size_t, address)
        sources = (address, size_t, address, size_t, size_t, f32)
        self._combine = kernels.function("int4_combine", None, *sources, *error, *random)

    def capacity(self, count: int) -> int:
        return 4 * blocks_of(count) + (count + 1) // 2

    def store(self, count: int, role: str) -> Store | None:
        return RotatedStore(count) if self.settings.error_feedback else None

    def encode(self, values: Floats, out: Bytes, store: Store | None, moment: Moment) -> int:
        if self.native:
            self._encode(
                pointer(values),
                *self._held(store),
                values.shape[0],
                *self._drawn(moment),
                pointer(out),
            )
        else:
            self._reference(values, out, store, moment)
        return self.capacity(values.shape[0])

    def decode(self, data: Bytes, out: Floats) -> None:
        if self.native:
            self._decode(pointer(data), out.shape[0], pointer(out))
        else:
            out[:] = self._decoded(data, out.shape[0])

    def decode_add(self, data: Bytes, out: Floats) -> None:
        if self.native:
            self._decode_add(pointer(data), out.shape[0], pointer(out))
        else:
            with np.errstate(all="ignore"):
                out += self._decoded(data, out.shape[0])

    def combine(
        self,
        own: Floats,
        place: int,
        others: Sequence[Bytes],
        divisor: int,
        out: Bytes,
        store: Store | None,
        moment: Moment,
    ) -> int:
        if not self.native:
            return super().combine(own, place, others, divisor, out, store, moment)
        count, sources = own.shape[0], pointers(others)
        self._combine(
            pointer(own), place, sources, len(others), count, float(divisor),
            *self._held(store), *self._drawn(moment), pointer(out),
        )  # fmt: skip
        return self.capacity(count)

    def _held(self, store: Store | None) -> tuple[int | None, int | None, float]:
        if store is None:
            return None, None, 0.0
        assert isinstance(store, RotatedStore)
        return pointer(store.errors), pointer(store.exponents), self.keep

    def _drawn(self, moment: Moment) -> tuple[int, int]:
        return int(self.settings.stochastic), moment.seed & ((1 << 64) - 1)

    def _reference(self, values: Floats, out: Bytes, store: Store | None, moment: Moment) -> None:
        count = values.shape[0]
        with np.errstate(all="ignore"):
            h = rotate(values)
            if isinstance(store, RotatedStore):
                h += store.coefficients()
            scale, inverse = block_scales(h, self.settings.stochastic)
            q = quantise(h, inverse, moment.seed if self.settings.stochastic else None)
            if isinstance(store, RotatedStore):
                lost = h - q * _spread(scale, count)
                _keep(lost, scale, store, self.keep, moment.seed)
        head = 4 * blocks_of(count)
        out[:head] = scale.view(np.uint8)
        pack(q, out[head:])

    def _decoded(self, data: Bytes, count: int) -> Floats:
        head = 4 * blocks_of(count)
        scale = np.frombuffer(data[:head].tobytes(), np.float32)
        q = unpack(data[head : self.capacity(count)], count)
        with np.errstate(all="ignore"):
            return unrotate(q).astype(np.float32) * _spread(scale, count)
