"""Values that kernels are tried with, and what it means for results to be the same."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

LENGTHS = [0, 1, 2, 5, 15, 16, 17, 63, 64, 65, 128, 200, 255, 256, 257, 300, 511, 512, 513]
LENGTHS += [1000, 1023, 1024, 1025, 1500, 2048, 2049, 5003]
KINDS = ["normal", "zeros", "denormal", "huge", "tiny", "mixed", "nan", "inf"]
SEED = 0x123456789ABCDEF


def values_of(kind: str, n: int, seed: int = 0) -> Floats:
    """``n`` values: of one kind, or ``mixed`` so that each block of 256 is of another."""
    random = np.random.default_rng([seed, n])
    normal = random.standard_normal(n).astype(np.float32)
    scales = {"zeros": 0.0, "denormal": 1e-41, "huge": 1e38, "tiny": 1e-38}
    with np.errstate(all="ignore"):
        if kind == "mixed":
            power = random.integers(-42, 38, -(-n // 256))
            values = normal * np.repeat(10.0**power, 256)[:n].astype(np.float32)
        else:
            values = normal * np.float32(scales.get(kind, 1.0))
    if n and kind in ("nan", "inf", "mixed"):
        values[random.integers(n)] = {"nan": np.nan, "inf": -np.inf}.get(kind, -0.0)
    return np.asarray(values, np.float32)


def same(made: NDArray[Any], wanted: NDArray[Any]) -> None:
    """Equal bit for bit; any NaN is as good as any other."""
    assert made.dtype == wanted.dtype
    assert made.shape == wanted.shape
    if made.dtype == np.float32:
        np.testing.assert_array_equal(np.isnan(made), np.isnan(wanted))
        made, wanted = (
            np.where(np.isnan(each), 0, each).view(np.uint32) for each in (made, wanted)
        )
    np.testing.assert_array_equal(made, wanted)
