"""The GPU kernels on a real device, by CuPy, against the NumPy reference: the same bits.

The tests of test_gpu_kernels.py and test_gpu_sparse.py try every branch on the host; these show
that a device agrees, at sizes of real pieces. A NaN that arithmetic makes has the sign that the
device gives it, so bf16 and fp16 are compared decoded where there are any.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hpcsync import codecs
from hpcsync.codecs.base import Moment, PieceCodec, Settings
from hpcsync.codecs.sparse import ERROR, SparseCodec
from hpcsync.device import cuda_kernels, cuda_launch, cuda_modules, cuda_sparse
from hpcsync.device.base import dtype_of
from hpcsync.device.cpu import CpuDevice
from tests.shim.cases import KINDS, SEED, same, values_of

pytestmark = pytest.mark.gpu

PIECES = ["bf16", "fp16", "fp8", "int8", "int4", "onebit"]
LENGTHS = [1, 255, 257, 5003, 1_000_003]


@pytest.fixture
def gpu() -> cuda_kernels.CudaKernels:
    import cupy

    return cuda_modules.load(cupy.cuda.Device().id)


def on_device(array: NDArray[Any]) -> Any:
    import cupy

    return cupy.asarray(array)


def address(array: Any) -> int | None:
    return None if array is None else cuda_launch.address_of(array)


def reference(name: str, **settings: object) -> PieceCodec:
    made = codecs.build(name, Settings(**settings), native=False)  # type: ignore[arg-type]
    assert isinstance(made, PieceCodec)
    return made


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "random"])
@pytest.mark.parametrize("name", PIECES)
def test_encode_and_decode(gpu: cuda_kernels.CudaKernels, name: str, stochastic: bool) -> None:
    codec = reference(name, stochastic=stochastic)
    cases = [("mixed", n) for n in LENGTHS] + [(kind, 3000) for kind in KINDS]
    for kind, n in cases:
        values = values_of(kind, n)
        store = codec.store(n, "sender")
        assert store is not None
        held = {field: on_device(array) for field, array in store.arrays.items()}
        x, out = on_device(values), on_device(np.zeros(codec.capacity(n), np.uint8))
        coded = np.zeros(codec.capacity(n), np.uint8)
        for step in range(2):
            moment = Moment(step=step, seed=SEED + step)
            codec.encode(values, coded, store, moment)
            drawn = (stochastic, moment.seed, cuda_launch.address_of(out))
            if name == "onebit":
                gpu.onebit_encode(address(x), address(held["error"]), n, address(out))
            elif name == "int4":
                given = (address(held["errors"]), address(held["exponents"]), 0.0)
                gpu.int4_encode(address(x), *given, n, *drawn)
            else:
                gpu.encode(name, address(x), address(held["error"]), n, *drawn)
            for field, array in held.items():
                same(array.get(), store.arrays[field])
        if np.isfinite(values).all() or name not in ("bf16", "fp16"):
            same(out.get(), coded)
        wanted, made = np.zeros(n, np.float32), on_device(np.zeros(n, np.float32))
        codec.decode(coded, wanted)
        gpu.decode(name, address(out), n, address(made))
        same(made.get(), wanted)
        codec.decode_add(coded, wanted)
        gpu.decode_add(name, address(out), n, address(made))
        same(made.get(), wanted)


@pytest.mark.parametrize("name", PIECES)
def test_combine(gpu: cuda_kernels.CudaKernels, name: str) -> None:
    codec = reference(name)
    for n in LENGTHS:
        others = []
        for rank in range(3):
            coded = np.zeros(codec.capacity(n), np.uint8)
            codec.encode(values_of("normal", n, rank), coded, None, Moment())
            others.append(coded)
        own, coded = values_of("normal", n, 9), np.zeros(codec.capacity(n), np.uint8)
        mine, out = on_device(own), on_device(coded)
        sent = [on_device(each) for each in others]
        codec.combine(own, 1, others, 4, coded, None, Moment(seed=SEED))
        sources = (address(mine), 1, [cuda_launch.address_of(each) for each in sent], n, 4)
        if name == "onebit":
            gpu.onebit_combine(*sources, None, address(out))
        elif name == "int4":
            gpu.int4_combine(*sources, None, None, 0.0, False, SEED, address(out))
        else:
            gpu.combine(name, *sources, None, False, SEED, address(out))
        same(out.get(), coded)
        same(mine.get(), own)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sums(gpu: cuda_kernels.CudaKernels, dtype: str) -> None:
    kind = dtype_of(dtype)
    name = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[dtype]
    for n in LENGTHS:
        sources = [values_of("normal", n, rank) for rank in range(4)]
        if dtype == "bfloat16":
            sources = [(each.view(np.uint32) >> 16).astype(np.uint16) for each in sources]
        sources = [each.astype(kind.storage, copy=False) for each in sources]
        wanted = np.empty_like(sources[0])
        CpuDevice().reduce([wanted], sources, kind, 3)
        arrays = [on_device(each) for each in sources]
        given = [cuda_launch.address_of(each) for each in arrays]
        gpu.add(name, given[:2], given, n, 3)
        same(arrays[0].get().view(kind.storage), wanted)
        same(arrays[1].get().view(kind.storage), wanted)


@pytest.mark.parametrize("ratio", [0.001, 0.01, 0.3, 1.0])
def test_top_k(gpu: cuda_kernels.CudaKernels, ratio: float) -> None:
    codec = reference("topk", ratio=ratio)
    assert isinstance(codec, SparseCodec)
    sparse = cuda_sparse.CudaSparse(gpu.launcher)
    for n in LENGTHS:
        store = codec.store(n, "sender")
        assert store is not None
        error, out = on_device(store.read(ERROR)), on_device(np.zeros(codec.capacity(n), np.uint8))
        room = on_device(np.zeros(cuda_sparse.encode_scratch(n), np.uint32))
        used, coded = on_device(np.zeros(1, np.uint64)), np.zeros(codec.capacity(n), np.uint8)
        for step in range(2):
            values = values_of("normal", n, step)
            x, moment = on_device(values), Moment(step=step, seed=step)
            count = codec.encode(values, coded, store, moment)
            places = [cuda_launch.address_of(each) for each in (room, out, used)]
            k = codec.most(n, step)
            stores = (None, address(error))
            sparse.encode(address(x), 1, 0.0, *stores, n, k, 0.0, moment.seed, *places)
            assert used.get().tolist() == [count]
            same(out.get()[:count], coded[:count])
            same(error.get(), store.read(ERROR))
        wanted, made = np.zeros(n, np.float32), on_device(np.ones(n, np.float32))
        codec.decode(coded[:count], wanted)
        sparse.decode(address(out), n, address(room), address(made))
        same(made.get(), wanted)


def test_calls_go_to_the_given_stream(gpu: cuda_kernels.CudaKernels) -> None:
    """What a stream was given before a kernel is done before it, without any waiting."""
    import cupy

    n = 10_000_000
    stream = cupy.cuda.Stream(non_blocking=True)
    with cuda_modules.on_stream(stream.ptr):
        first, second = cupy.full(n, 1.0, np.float32), cupy.full(n, 2.0, np.float32)
        gpu.add("f32", [address(first)], [address(first), address(second)], n)
        total = first.sum()
    stream.synchronize()
    assert float(total) == 3.0 * n


def test_torch_tensors_have_addresses() -> None:
    import torch

    tensor = torch.zeros(4, device="cuda")
    assert cuda_launch.address_of(tensor) == tensor.data_ptr()
