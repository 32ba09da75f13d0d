"""Every GPU kernel, run on the host by tests/shim, against the NumPy reference, bit for bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from hpcsync import codecs
from hpcsync.codecs.base import Moment, PieceCodec, Settings
from hpcsync.codecs.int4 import RotatedStore, pack, rotate, unpack
from hpcsync.codecs.int8_shared import _Reference as SharedReference
from hpcsync.device import cuda_kernels
from hpcsync.device.base import dtype_of
from hpcsync.device.cpu import CpuDevice
from tests.shim import host
from tests.shim.cases import KINDS, LENGTHS, SEED, same, values_of
from tests.shim.host import Memory, address

pytestmark = pytest.mark.skipif(bool(host.MISSING), reason=host.MISSING)

Floats = NDArray[np.float32]

BLOCKED = ["bf16", "fp16", "fp8", "int8"]
PIECES = [*BLOCKED, "int4", "onebit"]


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def gpu(request: pytest.FixtureRequest) -> cuda_kernels.CudaKernels:
    """The kernels, with threads and blocks in order, and in the opposite order."""
    return cuda_kernels.CudaKernels(host.launcher(request.param))


def codec_of(name: str, *, stochastic: bool = False) -> PieceCodec:
    """The codec's NumPy reference."""
    settings = Settings(stochastic=stochastic)
    made = codecs.build(name, settings, native=False)
    assert isinstance(made, PieceCodec)
    return made


class Piece:
    """A piece of one codec, on the host and in the GPU's memory.

    Args:
        values: what is coded.
        error: the error store; None for none.
        shift: bytes by which coded data misses any alignment.
    """

    def __init__(
        self, codec: PieceCodec, values: Floats, error: Floats | None, shift: int = 0
    ) -> None:
        self.codec, self.values = codec, values
        self.n = values.shape[0]
        self.store = None if error is None else codec.store(self.n, "sender")
        if self.store and error is not None:
            with np.errstate(all="ignore"):
                self.store.write("error", error)
        arrays = self.store.arrays if self.store else {}
        self.held = {name: Memory(array) for name, array in arrays.items()}
        self.coded = np.zeros(codec.capacity(self.n), np.uint8)
        self.out = Memory(self.coded, shift)
        self.x = Memory(values, 4 * (shift % 4))

    def gpu_encode(self, gpu: cuda_kernels.CudaKernels, moment: Moment) -> None:
        x, out = self.x.address, self.out.address
        held = {name: each.address for name, each in self.held.items()}
        drawn = (self.codec.settings.stochastic, moment.seed, out)
        if self.codec.name == "onebit":
            gpu.onebit_encode(x, held.get("error"), self.n, out)
        elif self.codec.name == "int4":
            store = (held.get("errors"), held.get("exponents"), getattr(self.codec, "keep", 0.0))
            gpu.int4_encode(x, *store, self.n, *drawn)
        else:
            gpu.encode(self.codec.name, x, held.get("error"), self.n, *drawn)

    def gpu_combine(
        self,
        gpu: cuda_kernels.CudaKernels,
        own: Memory,
        place: int,
        others: list[Memory],
        divisor: int,
        moment: Moment,
    ) -> None:
        held = {name: each.address for name, each in self.held.items()}
        sources = (own.address, place, [each.address for each in others], self.n, divisor)
        drawn = (self.codec.settings.stochastic, moment.seed, self.out.address)
        if self.codec.name == "onebit":
            gpu.onebit_combine(*sources, held.get("error"), self.out.address)
        elif self.codec.name == "int4":
            store = (held.get("errors"), held.get("exponents"), getattr(self.codec, "keep", 0.0))
            gpu.int4_combine(*sources, *store, *drawn)
        else:
            gpu.combine(self.codec.name, *sources, held.get("error"), *drawn)

    def check(self) -> None:
        """What was coded, and the store, are the reference's."""
        same(self.out.values, self.coded)
        for name, memory in self.held.items():
            assert self.store is not None
            same(memory.values, self.store.arrays[name])


def piece_of(name: str, kind: str, n: int, *, stochastic: bool, error: bool, shift: int) -> Piece:
    held = values_of("normal", n, 1) * np.float32(0.3) if error else None
    return Piece(codec_of(name, stochastic=stochastic), values_of(kind, n), held, shift)


@pytest.mark.parametrize("error", [True, False], ids=["error", "plain"])
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "random"])
@pytest.mark.parametrize("name", PIECES)
def test_encode_and_decode(
    gpu: cuda_kernels.CudaKernels, name: str, stochastic: bool, error: bool
) -> None:
    cases = [(kind, n) for n in LENGTHS for kind in ("normal", "mixed")]
    cases += [(kind, n) for n in (257, 1300) for kind in KINDS]
    for shift, (kind, n) in zip(itertools.cycle((0, 4, 1)), cases, strict=False):
        piece = piece_of(name, kind, n, stochastic=stochastic, error=error, shift=shift)
        for step in range(2):
            moment = Moment(step=step, seed=SEED + step)
            piece.codec.encode(piece.values, piece.coded, piece.store, moment)
            piece.gpu_encode(gpu, moment)
            piece.check()
        out, total = np.zeros(n, np.float32), values_of("normal", n, 2)
        made, added = Memory(out, 4 * (shift % 4)), Memory(total)
        piece.codec.decode(piece.coded, out)
        piece.codec.decode_add(piece.coded, total)
        gpu.decode(name, piece.out.address, n, made.address)
        gpu.decode_add(name, piece.out.address, n, added.address)
        same(made.values, out)
        same(added.values, total)


@pytest.mark.parametrize("divisor", [1, 3, 4])
@pytest.mark.parametrize("name", PIECES)
def test_combine(gpu: cuda_kernels.CudaKernels, name: str, divisor: int) -> None:
    cases = [("mixed", n) for n in (0, 1, 255, 256, 300, 1024, 1500, 2600)]
    cases += [(kind, 700) for kind in KINDS]
    for index, (kind, n) in enumerate(cases):
        piece = piece_of(
            name, kind, n, stochastic=index % 2 == 1, error=index % 3 != 2, shift=index % 5
        )
        others = [
            piece_of(name, "normal", n, stochastic=False, error=False, shift=rank)
            for rank in range(index % 4)
        ]
        for rank, other in enumerate(others):
            other.codec.encode(other.values, other.coded, None, Moment(seed=rank))
            other.gpu_encode(gpu, Moment(seed=rank))
        place = min(index % 3, len(others))
        own, moment = Memory(piece.values), Moment(seed=SEED)
        memories = [other.out for other in others]
        piece.gpu_combine(gpu, own, place, memories, divisor, moment)
        coded = [other.coded for other in others]
        mine = piece.values.copy()
        piece.codec.combine(mine, place, coded, divisor, piece.coded, piece.store, moment)
        piece.check()
        same(own.values, mine)


# ---- sums --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "name"), [("float32", "f32"), ("bfloat16", "bf16"), ("float16", "f16")]
)
def test_sums(gpu: cuda_kernels.CudaKernels, dtype: str, name: str) -> None:
    kind = dtype_of(dtype)
    random = np.random.default_rng(0)
    for index, n in enumerate(LENGTHS):
        count, divisor = index % 5 + 1, (1, 3, 4)[index % 3]
        sources = [values_of(KINDS[(index + s) % len(KINDS)], n, s) for s in range(count)]
        if kind.storage.itemsize == 2:
            sources = [random.integers(0, 1 << 16, n).astype(np.uint16) for _ in sources]
            sources = [source.view(kind.storage) for source in sources]
        memories = [Memory(source, 4 * (s % 2)) for s, source in enumerate(sources)]
        outs = [memories[index % count], Memory(np.zeros_like(sources[0]), 4 * (index % 4))]
        wanted = np.empty_like(sources[0])
        CpuDevice().reduce([wanted], sources, kind, divisor)
        given = [each.address for each in outs], [each.address for each in memories]
        gpu.add(name, *given, n, divisor)
        for out in outs:
            made = out.values
            if dtype == "float16":
                same(made.astype(np.float32), wanted.astype(np.float32))
            elif dtype == "bfloat16":
                widened = [
                    (each.astype(np.uint32) << 16).view(np.float32) for each in (made, wanted)
                ]
                same(*widened)
            else:
                same(made, wanted)


@pytest.mark.parametrize(
    "dtype", ["float64", "int8", "uint8", "int16", "int32", "int64", "int32 max"]
)
def test_sums_of_other_types(gpu: cuda_kernels.CudaKernels, dtype: str) -> None:
    kind = dtype_of(dtype)
    random = np.random.default_rng(1)
    for index, n in enumerate(LENGTHS):
        count, divisor = index % 5 + 1, (1, 3, 4)[index % 3] if kind.floating else 1
        if kind.floating:
            sources = [random.standard_normal(n) * 10.0 ** (9 * s) for s in range(count)]
        else:
            given = np.iinfo(kind.storage)
            sources = [
                random.integers(given.min, given.max, n, kind.storage, endpoint=True)
                for _ in range(count)
            ]
        memories = [Memory(each, kind.itemsize * (s % 2)) for s, each in enumerate(sources)]
        outs = [memories[index % count], Memory(np.zeros_like(sources[0]))]
        wanted = np.empty_like(sources[0])
        CpuDevice().reduce([wanted], sources, kind, divisor)
        places = [each.address for each in outs], [each.address for each in memories]
        gpu.reduce(kind, *places, n, divisor)
        for out in outs:
            np.testing.assert_array_equal(out.values, wanted)


# ---- integers of shared scales -----------------------------------------------------------------


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "random"])
@pytest.mark.parametrize(("bits", "levels"), [(8, 31), (16, 127), (32, 127)])
def test_shared_scales(
    gpu: cuda_kernels.CudaKernels, bits: int, levels: int, stochastic: bool
) -> None:
    reference, dtype = SharedReference(), np.dtype(f"int{bits}")
    cases = [("mixed", n) for n in LENGTHS] + [(kind, 700) for kind in KINDS]
    for index, (kind, n) in enumerate(cases):
        values = values_of(kind, n)
        error = values_of("normal", n, 1) if index % 3 else None
        maxima = np.zeros(-(-n // 256), np.int32)
        x, held = Memory(values), None if error is None else Memory(error)
        largest, checksum = Memory(maxima), Memory(np.zeros(2, np.uint32))
        reference.largest(values, error, maxima)
        gpu.shared_maxima(x.address, address(held), n, largest.address)
        same(largest.values, maxima)
        numbers = np.zeros(n, dtype)
        seed = SEED if stochastic else None
        sent = reference.encode(values, error, maxima, levels, seed, numbers)
        out = Memory(numbers * 0, (index % 2) * dtype.itemsize)
        drawn = (stochastic, SEED, out.address, checksum.address)
        gpu.shared_encode(bits, x.address, address(held), n, largest.address, levels, *drawn)
        same(out.values, numbers)
        if held:
            same(held.values, np.asarray(error))
        wanted, made = np.zeros(n, np.float32), Memory(np.zeros(n, np.float32))
        divisor = (1, 3, 4)[index % 3]
        total = reference.decode(numbers, maxima, levels, divisor, wanted)
        parts = (made.address, checksum.address + 4)
        gpu.shared_decode(bits, out.address, n, largest.address, levels, divisor, *parts)
        same(made.values, wanted)
        assert checksum.values.tolist() == [sent % (1 << 32), total % (1 << 32)]


# ---- int4 --------------------------------------------------------------------------------------


def test_hadamard(gpu: cuda_kernels.CudaKernels) -> None:
    for blocks in (0, 1, 5, 20):
        values = values_of("mixed", 256 * blocks)
        memory = Memory(values)
        gpu.hadamard_f32(memory.address, blocks)
        with np.errstate(all="ignore"):
            same(memory.values, rotate(values * np.float32(16)))


@pytest.mark.parametrize("n", LENGTHS)
def test_int4_pack_and_unpack(gpu: cuda_kernels.CudaKernels, n: int) -> None:
    q = np.random.default_rng(n).integers(-8, 8, n).astype(np.int8)
    coded = np.zeros((n + 1) // 2, np.uint8)
    pack(q, coded)
    given, out, back = Memory(q), Memory(coded * 0, n % 4), Memory(q * 0)
    gpu.int4_pack(given.address, n, out.address)
    gpu.int4_unpack(out.address, n, back.address)
    same(out.values, coded)
    same(back.values, unpack(coded, n))


def test_int4_store_that_forgets_slowly(gpu: cuda_kernels.CudaKernels) -> None:
    codec = codec_of("int4")
    codec.keep = 0.75  # type: ignore[attr-defined]
    for n in (255, 256, 1300):
        piece = Piece(codec, values_of("mixed", n), values_of("normal", n, 1))
        assert isinstance(piece.store, RotatedStore)
        for step in range(4):
            codec.encode(piece.values, piece.coded, piece.store, Moment(seed=step))
            piece.gpu_encode(gpu, Moment(seed=step))
            piece.check()
