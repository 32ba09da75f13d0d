"""The GPU kernels of low-rank factors, run on the host by tests/shim, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from hpcsync.codecs.factors import Factors
from hpcsync.device.cuda_factors import CudaFactors, scratch
from tests.shim import host
from tests.shim.cases import same
from tests.shim.host import Memory, address

pytestmark = pytest.mark.skipif(bool(host.MISSING), reason=host.MISSING)

Floats = NDArray[np.float32]

SHAPES = [(1, 1), (1, 5), (3, 2), (2, 16), (5, 17), (31, 15), (33, 64), (64, 80), (70, 131)]
RANKS = [1, 3, 4, 9]


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def gpu(request: pytest.FixtureRequest) -> CudaFactors:
    """The kernels, with threads and blocks in order, and in the opposite order."""
    return CudaFactors(host.launcher(request.param))


def normal(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def matrix(seed: int, shape: tuple[int, int]) -> Floats:
    """Of very different magnitudes."""
    powers = np.random.default_rng(seed).integers(-30, 18, shape)
    return normal(seed + 1, *shape) * (10.0**powers).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("held", [True, False])
def test_rows(gpu: CudaFactors, shape: tuple[int, int], rank: int, held: bool) -> None:
    m, error, q = matrix(1, shape), matrix(3, shape) if held else None, normal(5, rank, shape[1])
    p = np.full((rank, shape[0]), np.nan, np.float32)
    memories = [None if each is None else Memory(each) for each in (m, error, q, p)]
    at = [address(each) for each in memories]
    assert at[0] is not None
    assert at[2] is not None
    assert at[3] is not None
    gpu.rows(at[0], at[1], *shape, at[2], rank, at[3])
    Factors().rows(m, error, q, p)
    for memory, wanted in zip(memories, (m, error, q, p), strict=True):
        if memory is not None and wanted is not None:
            same(memory.values, wanted.reshape(-1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", RANKS)
def test_columns(gpu: CudaFactors, shape: tuple[int, int], rank: int) -> None:
    m, p = matrix(1, shape), normal(5, rank, shape[0])
    q = np.full((rank, shape[1]), np.nan, np.float32)
    work = np.full(scratch(*shape, rank), np.nan, np.float32)
    memories = [Memory(each) for each in (m, p, q, work)]
    at = [each.address for each in memories]
    gpu.columns(at[0], *shape, at[1], rank, at[2], at[3])
    Factors().columns(m, p, q)
    for memory, wanted in zip(memories[:3], (m, p, q), strict=True):
        same(memory.values, wanted.reshape(-1))
    assert np.isfinite(memories[3].values).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("held", [True, False])
def test_apply(gpu: CudaFactors, shape: tuple[int, int], rank: int, held: bool) -> None:
    m, error = matrix(1, shape), matrix(3, shape) if held else None
    p, own, mean = normal(5, rank, shape[0]), normal(6, rank, shape[1]), normal(7, rank, shape[1])
    memories = [None if each is None else Memory(each) for each in (m, error)]
    factors = [Memory(each) for each in (p, own, mean)]
    at = [address(each) for each in memories]
    assert at[0] is not None
    gpu.apply(at[0], at[1], *shape, *(each.address for each in factors), rank)
    Factors().apply(m, error, p, own, mean)
    for memory, wanted in zip(memories, (m, error), strict=True):
        if memory is not None and wanted is not None:
            same(memory.values, wanted.reshape(-1))


@pytest.mark.parametrize("n", [1, 15, 16, 17, 255, 300, 1000])
@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("kind", ["normal", "zeros", "same", "tiny", "huge", "nan", "inf"])
def test_orthogonalise(gpu: CudaFactors, n: int, rank: int, kind: str) -> None:
    scale = {"zeros": 0, "tiny": 1e-41, "huge": 1e37}.get(kind, 1)
    x = normal(1, rank, n) * np.float32(scale)
    if kind == "same":
        x[:] = x[0]
    if kind in ("nan", "inf"):
        x[rank // 2, n // 2] = float(kind)
    memory = Memory(x)
    gpu.orthogonalise(memory.address, rank, n)
    with np.errstate(all="ignore"):
        Factors().orthogonalise(x)
    same(memory.values, x.reshape(-1))
