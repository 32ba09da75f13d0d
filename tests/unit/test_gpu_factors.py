"""The GPU kernels of low-rank factors, run on the host by tests/shim, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from hpcsync.codecs.factors import Factors
from hpcsync.device.cuda_factors import FOUND, CudaFactors, scratch
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


@pytest.mark.parametrize("spoilt", [False, True])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("lost", [False, True])
def test_what_is_not_finite_is_not_kept(
    gpu: CudaFactors, spoilt: bool, large: bool, lost: bool
) -> None:
    rank, shape = 3, (33, 40)
    m, error, basis = normal(1, *shape), normal(2, *shape), normal(3, rank, shape[1])
    p, own, mean = normal(4, rank, shape[0]), normal(5, rank, shape[1]), normal(6, rank, shape[1])
    mean[1, 7] = np.nan if spoilt else 1
    own[2, 5] = 2e30 if large else 1
    m[20, 30] = np.inf if lost else 1  # which only a look at a large matrix finds
    wanted_m, wanted_error = m.copy(), error.copy()
    with np.errstate(all="ignore"):
        Factors().apply(wanted_m, wanted_error, p, own, mean)
    if spoilt:
        wanted_m.fill(np.nan)
    memories = [Memory(each) for each in (m, error, basis, p, own, mean)]
    at = [each.address for each in memories]
    found = Memory(np.zeros(FOUND, np.uint32))
    gpu.judge(at[0], *shape, *at[3:], rank, 1e30, found.address)
    gpu.apply(at[0], at[1], *shape, *at[3:], rank, found.address)
    gpu.keep(at[5], mean.size, found.address, at[2])
    kept = error if spoilt or (large and lost) else wanted_error
    wanted = (wanted_m, kept, basis if spoilt else mean)
    for memory, values in zip(memories[:3], wanted, strict=True):
        same(memory.values, values.reshape(-1))


@pytest.mark.parametrize("n", [1, 300, 1000])
def test_rows_of_zeros_are_replaced(gpu: CudaFactors, n: int) -> None:
    q, fresh = normal(1, 5, n), normal(2, 5, n)
    q[1] = q[4] = 0.0
    q[4, -1] = -0.0
    q[2] = 0.0
    q[2, n // 2] = np.nan
    memory, rows = Memory(q), Memory(fresh)
    gpu.renew(memory.address, 5, n, rows.address)
    q[[1, 4]] = fresh[[1, 4]]
    same(memory.values, q.reshape(-1))
