"""What bench_codecs times on a GPU does what it is called, run on the host by tests/shim."""

from __future__ import annotations

import numpy as np
import pytest

from hpcsync import codecs
from hpcsync.codecs import Moment, PieceCodec
from hpcsync.device import cuda_kernels
from tests.shim import host
from tools import gpu_work
from tools.codec_work import SETTINGS, normal

pytestmark = pytest.mark.skipif(bool(host.MISSING), reason=host.MISSING)

COUNT = 2048 + 77


@pytest.fixture(scope="module")
def kernels() -> cuda_kernels.CudaKernels:
    """The GPU's kernels, on the host."""
    return cuda_kernels.CudaKernels(host.launcher())


@pytest.fixture
def memory() -> gpu_work.Memory:
    """Guarded host memory."""
    return gpu_work.Memory(host.Memory, lambda held: held.address)


@pytest.mark.parametrize("name", [name for name in gpu_work.CODECS if name != "topk"])
def test_pieces_are_coded_as_on_the_cpu(
    name: str, kernels: cuda_kernels.CudaKernels, memory: gpu_work.Memory
) -> None:
    """Two encodes, so that the error store counts, then the others."""
    piece = gpu_work.Piece(name, COUNT, kernels, memory)
    codec = codecs.build(name, SETTINGS, native=False)
    assert isinstance(codec, PieceCodec)
    store, coded = codec.store(COUNT, "sender"), np.zeros(codec.capacity(COUNT), np.uint8)
    moment = Moment(seed=gpu_work.SEED)
    operations = {each.name: each for each in piece.operations()}
    for _ in range(2):
        operations["encode"].run()
        codec.encode(normal(COUNT), coded, store, moment)
    assert (piece.out.values == coded).all()
    codec.encode(normal(COUNT), coded, None, moment)
    decoded = np.empty(COUNT, np.float32)
    codec.decode(coded, decoded)
    operations["decode"].run()
    assert (piece.decoded.values == decoded).all()
    operations["decode_add"].run()
    assert (piece.decoded.values == decoded + decoded).all()
    own, out = normal(COUNT, 3), np.zeros_like(coded)
    codec.combine(own, 0, [coded], 2, out, store, moment)
    operations["combine"].run()
    assert (piece.out.values == out).all()
    assert (piece.own.values == own).all()
    assert operations["decode"].touched == coded.nbytes + 4 * COUNT


def test_topk_is_coded_as_on_the_cpu(
    kernels: cuda_kernels.CudaKernels, memory: gpu_work.Memory
) -> None:
    """Two encodes, so that the error store counts, then the others."""
    piece = gpu_work.TopK(COUNT, kernels, memory)
    codec = codecs.build("topk", SETTINGS, native=False)
    assert isinstance(codec, PieceCodec)
    store, coded = codec.store(COUNT, "sender"), np.zeros(codec.capacity(COUNT), np.uint8)
    operations = {each.name: each for each in piece.operations()}
    for _ in range(2):
        operations["encode"].run()
        used = codec.encode(normal(COUNT), coded, store, Moment(seed=gpu_work.SEED))
    assert int(piece.said.values[0]) == used
    assert (piece.out.values[:used] == coded[:used]).all()
    decoded = np.empty(COUNT, np.float32)
    codec.decode(piece.coded.values, decoded)
    operations["decode"].run()
    operations["decode_add"].run()
    assert (piece.decoded.values == decoded + decoded).all()
    assert 0 < np.count_nonzero(decoded) < COUNT // 50


def test_sums_are_means(kernels: cuda_kernels.CudaKernels) -> None:
    """Of as many buffers as they are called, written to as many."""
    put: list[host.Memory] = []

    def keep(values: np.ndarray) -> host.Memory:
        put.append(host.Memory(values))
        return put[-1]

    memory = gpu_work.Memory(keep, lambda held: held.address)
    for operation in gpu_work.sums(COUNT, kernels, memory):
        sources, outs = map(int, operation.name.split(" -> "))
        held = put[:sources]
        del put[:sources]
        total = normal(COUNT, 0)
        for seed in range(1, sources):
            total += normal(COUNT, seed)
        operation.run()
        for each in held[:outs]:
            assert (each.values == total / sources).all()
