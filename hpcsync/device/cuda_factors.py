"""The GPU kernels of low-rank factors, which PowerSGD needs.

As ``cuda_kernels``, whose conventions hold: addresses of device memory, nothing waits.
"""

from __future__ import annotations

import numpy as np

from .cuda_launch import Address, Launcher, count, pointer

BLOCK_ROWS, FACTORS, STRIP = 32, 4, 4  # of cuda/gpu/factors.cu
FOUND = 3  # words that ``judge`` writes


def scratch(rows: int, columns: int, rank: int) -> int:
    """How many float32 ``CudaFactors.columns`` needs; their contents do not matter."""
    return -(-rows // BLOCK_ROWS) * rank * columns


class CudaFactors:
    """The functions of ``hpcsync_kernels.h`` for factors.

    A matrix ``m`` is rows x columns, its factors are ``p``, rank x rows, and ``q``, rank x
    columns; all float32 and row-major.
    """

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher

    def rows(
        self,
        m: Address,
        error: Address | None,
        rows: int,
        columns: int,
        q: Address,
        rank: int,
        p: Address,
    ) -> None:
        """``factor_rows``."""
        given = (pointer(m), pointer(error), count(rows), np.uint32(columns), pointer(q))
        self.launcher.warps("factor_rows", -(-rows // 2), *given, np.uint32(rank), pointer(p))

    def columns(
        self,
        m: Address,
        rows: int,
        columns: int,
        p: Address,
        rank: int,
        q: Address,
        scratch: Address,
    ) -> None:
        """``factor_columns``, by way of ``scratch(rows, columns, rank)`` float32."""
        blocks, groups = -(-rows // BLOCK_ROWS), -(-rank // FACTORS)
        given = (pointer(m), count(rows), np.uint32(columns), pointer(p), np.uint32(rank))
        self.launcher.threads(
            "factor_partials", blocks * groups * columns, *given, pointer(scratch)
        )
        size = rank * columns
        self.launcher.threads(
            "factor_total", size, pointer(scratch), count(blocks), count(size), pointer(q)
        )

    def apply(
        self,
        m: Address,
        error: Address | None,
        rows: int,
        columns: int,
        p: Address,
        own: Address,
        mean: Address,
        rank: int,
        found: Address | None = None,
    ) -> None:
        """``factor_apply``.

        Args:
            found: what ``judge`` found. Then a matrix whose ``mean`` is not finite becomes NaN, and
                an error that would not be finite, or of such a matrix, stays as it was.
        """
        given = (pointer(m), pointer(error), count(rows), np.uint32(columns), pointer(p))
        factors = (pointer(own), pointer(mean), np.uint32(rank), pointer(found))
        self.launcher.threads("factor_apply", -(-rows // STRIP) * columns, *given, *factors)

    def judge(
        self,
        m: Address,
        rows: int,
        columns: int,
        p: Address,
        own: Address,
        mean: Address,
        rank: int,
        bound: float,
        found: Address,
    ) -> None:
        """Find what ``apply`` must know of a matrix.

        Args:
            bound: the error is finite if ``rank`` times each of ``own`` is below.
            found: ``FOUND`` uint32, zeros.
        """
        factors = (pointer(own), pointer(mean), count(rank * columns), np.uint32(rank))
        self.launcher.threads(
            "factor_bounds", rank * columns, *factors, np.float32(bound), pointer(found)
        )
        given = (pointer(m), count(rows), np.uint32(columns), pointer(p), pointer(own))
        self.launcher.threads(
            "factor_check", -(-rows // STRIP) * columns, *given, np.uint32(rank), pointer(found)
        )

    def keep(self, q: Address, n: int, found: Address, out: Address) -> None:
        """Copy n values of a mean, unless it is not finite."""
        self.launcher.threads("factor_keep", n, pointer(q), count(n), pointer(found), pointer(out))

    def renew(self, q: Address, rank: int, n: int, fresh: Address) -> None:
        """Rows of zeros become those of ``fresh``, both rank x n."""
        self.launcher.blocks(
            "factor_renew", rank, pointer(q), np.uint32(rank), count(n), pointer(fresh)
        )

    def orthogonalise(self, x: Address, rank: int, n: int) -> None:
        """``orthogonalise``."""
        self.launcher.blocks("orthogonalise", 1, pointer(x), np.uint32(rank), count(n))
