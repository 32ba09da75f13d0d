"""The GPU kernels of the sparse codecs, each function a row of kernels on the current stream.

As ``cuda_kernels``, whose conventions hold: addresses of device memory, nothing waits. How many
bytes a piece takes is written to device memory; whoever sends it must fetch that number first.
"""

from __future__ import annotations

import numpy as np

from .cuda_kernels import ROW
from .cuda_launch import THREADS, Address, Launcher, count, flag, pointer, seeded

TILE = 4096  # elements of cuda/gpu/sparse.h's tiles
STATE_WORDS, BINS = 16, 2048
COUNT_WORD = 8  # of the State: how many elements go
SET, ADD, CLEAR = range(3)


def tiles_of(n: int) -> int:
    return -(-n // TILE)


def encode_scratch(n: int) -> int:
    """How many uint32 ``CudaSparse.encode`` needs; their contents do not matter."""
    return STATE_WORDS + BINS + tiles_of(n) * (TILE // 256 + 4) + n


def decode_scratch(n: int) -> int:
    """How many uint32 decode, decode_add and clear need; their contents do not matter."""
    return tiles_of(n) + 1


class CudaSparse:
    """The functions of ``hpcsync_kernels.h`` whose names begin with sparse or groups."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher

    # ---- coding --------------------------------------------------------------------------------

    def encode(
        self,
        x: Address,
        divisor: float,
        momentum: float,
        velocity: Address | None,
        error: Address | None,
        n: int,
        k: int,
        minimum: float,
        seed: int,
        scratch: Address,
        out: Address,
        used: Address,
    ) -> None:
        """``sparse_encode``; the bytes used are written to the uint64 at ``used``.

        Args:
            k: at least 1.
            scratch: ``encode_scratch(n)`` uint32.
        """
        assert n > 0, "no elements have no coded form"
        assert k > 0, "at least one element goes"
        start, one = self.launcher, 1
        room, values = pointer(scratch), pointer(error or x)
        lowest = np.uint32(max(1, int(np.float32(minimum).view(np.uint32))))
        tiles, small = tiles_of(n), tiles_of(n) * (TILE // 256)
        piece = (values, count(n))
        start.threads("sparse_begin", STATE_WORDS + BINS + small, room, count(n))
        self._sums("sparse_add", x, divisor, momentum, velocity, error, n, lowest, room)
        for stage in range(3):
            if stage:
                start.threads("sparse_refine", n, *piece, np.int32(stage), room)
            wanted = np.uint32(min(k, n))
            start.blocks("sparse_find", one, count(n), wanted, lowest, np.int32(stage), room)
            if stage == 0:
                start.blocks("sparse_collect", tiles, *piece, room)
        start.warps("sparse_equals", tiles, *piece, room)
        tables = scratch + 4 * (STATE_WORDS + BINS + small)
        unused, goes = scratch + 4 * (STATE_WORDS - 1), scratch + 4 * COUNT_WORD
        self._scan(tables + 8 * tiles, tiles, unused)
        start.blocks("sparse_choose", tiles, *piece, seeded(seed), room)
        self._scan(tables + 12 * tiles, tiles, goes)
        start.blocks("sparse_plan", one, count(n), room, pointer(out), pointer(used))
        stores = (pointer(velocity), pointer(error))
        start.blocks("sparse_write", tiles, values, *stores, count(n), room, pointer(out))

    def accumulate(
        self,
        x: Address,
        divisor: float,
        momentum: float,
        velocity: Address | None,
        error: Address | None,
        n: int,
        bad: Address,
    ) -> None:
        """``sparse_accumulate``; the uint32 at ``bad`` becomes 1 where a sum is not finite."""
        stores = (velocity, error)
        self._sums("sparse_accumulate", x, divisor, momentum, *stores, n, pointer(bad))

    def momentum(
        self, x: Address, momentum: float, velocity: Address, n: int, bad: Address
    ) -> None:
        """``sparse_momentum``; the uint32 at ``bad`` becomes 1 where a sum is not finite."""
        given = (pointer(x), np.float32(momentum), pointer(velocity), count(n), pointer(bad))
        self.launcher.warps("sparse_momentum", -(-n // ROW), *given)

    def _sums(
        self,
        name: str,
        x: Address,
        divisor: float,
        momentum: float,
        velocity: Address | None,
        error: Address | None,
        n: int,
        *further: np.generic,
    ) -> None:
        factors = (np.float32(divisor), np.float32(momentum))
        stores = (pointer(velocity), pointer(error))
        self.launcher.warps(name, -(-n // ROW), pointer(x), *factors, *stores, count(n), *further)

    def _scan(self, numbers: Address, length: int, total: Address) -> None:
        given = (pointer(numbers), count(length), pointer(total))
        self.launcher.blocks("sparse_scan", 1, *given)

    # ---- decoding ------------------------------------------------------------------------------

    def decode(self, data: Address, n: int, scratch: Address, out: Address) -> None:
        """``sparse_decode``, with ``decode_scratch(n)`` uint32 of scratch."""
        self._zero(out, n)
        self._apply(SET, data, n, scratch, out)

    def decode_add(self, data: Address, n: int, scratch: Address, out: Address) -> None:
        """``sparse_decode_add``, with ``decode_scratch(n)`` uint32 of scratch."""
        self._apply(ADD, data, n, scratch, out)

    def clear(self, data: Address, n: int, scratch: Address, field: Address) -> None:
        """``sparse_clear``, with ``decode_scratch(n)`` uint32 of scratch."""
        self._apply(CLEAR, data, n, scratch, field)

    def _apply(self, mode: int, data: Address, n: int, scratch: Address, out: Address) -> None:
        if n == 0:
            return
        tiles, coded, before = tiles_of(n), (pointer(data), count(n)), pointer(scratch)
        self.launcher.warps("entries_count", tiles, *coded, before)
        self._scan(scratch, tiles, scratch + 4 * tiles)
        blocks = max(-(-tiles * 32 // THREADS), -(-n // (4 * THREADS)))
        self.launcher.blocks("entries_apply", blocks, *coded, before, np.int32(mode), pointer(out))

    def _zero(self, out: Address, n: int) -> None:
        self.launcher.threads("entries_zero", n, pointer(out), count(n))

    # ---- random-k ------------------------------------------------------------------------------

    def groups_take(
        self, x: Address, n: int, groups: int, seed: int, clear: bool, out: Address
    ) -> None:
        """``groups_take``."""
        given = (pointer(x), count(n), np.uint32(groups), seeded(seed), flag(clear), pointer(out))
        self.launcher.threads("groups_take", 16 * groups if n else 0, *given)

    def groups_put(
        self,
        data: Address,
        n: int,
        groups: int,
        seed: int,
        divisor: float,
        scale: float,
        out: Address,
    ) -> None:
        """``groups_put``."""
        self._zero(out, n)
        given = (pointer(data), count(n), np.uint32(groups), seeded(seed))
        factors = (np.float32(divisor), np.float32(scale))
        threads = 16 * groups if n else 0
        self.launcher.threads("groups_put", threads, *given, *factors, pointer(out))

    def groups_settle(
        self, x: Address | None, n: int, groups: int, seed: int, bad: Address, told: Address
    ) -> None:
        """Zero in x what ``groups_take`` took, unless the uint32 at ``bad`` is set.

        Args:
            told: a float32, which becomes NaN if it is, else 0.
        """
        given = (pointer(x), count(n), np.uint32(groups), seeded(seed), pointer(bad))
        self.launcher.threads("groups_settle", 16 * groups, *given, pointer(told))

    def groups_spoil(self, told: Address, n: int, out: Address) -> None:
        """Make n values NaN if the float32 at ``told`` is not finite."""
        self.launcher.threads("groups_spoil", n, pointer(told), count(n), pointer(out))
