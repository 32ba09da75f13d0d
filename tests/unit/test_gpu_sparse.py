"""The GPU's sparse kernels, run on the host by tests/shim, against the NumPy reference."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from hpcsync.codecs import randomk, sparse_form
from hpcsync.codecs.base import Moment, Settings, Store
from hpcsync.codecs.sparse import ERROR, VELOCITY, SparseCodec
from hpcsync.codecs.threshold import Threshold
from hpcsync.codecs.topk import TopK
from hpcsync.device import cuda_sparse
from hpcsync.device.cuda_sparse import CudaSparse
from tests.shim import host
from tests.shim.cases import SEED, same, values_of
from tests.shim.host import Memory, address

pytestmark = pytest.mark.skipif(bool(host.MISSING), reason=host.MISSING)

Floats = NDArray[np.float32]
LENGTHS = [1, 2, 7, 8, 9, 255, 256, 257, 1000, 4095, 4096, 4097, 9000]
LONG = 140_001  # three large blocks


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def gpu(request: pytest.FixtureRequest) -> CudaSparse:
    """The kernels, with threads and blocks in order, and in the opposite order."""
    return CudaSparse(host.launcher(request.param))


def garbage(words: int) -> Memory:
    """Scratch memory, of which nothing may be taken for granted."""
    return Memory(np.random.default_rng(words).integers(0, 1 << 32, words, np.uint64).astype("u4"))


def topk(ratio: float, **settings: object) -> TopK:
    return TopK(Settings(ratio=ratio, **settings), None)  # type: ignore[arg-type]


def threshold(at: float, **settings: object) -> Threshold:
    return Threshold(Settings(threshold=at, **settings), None)  # type: ignore[arg-type]


class Coded:
    """A piece that reference and GPU code, step by step, and compare."""

    def __init__(self, gpu: CudaSparse, codec: SparseCodec, n: int, shift: int = 0) -> None:
        self.gpu, self.codec, self.n = gpu, codec, n
        self.store: Store | None = codec.store(n, "sender")
        arrays = self.store.arrays if self.store else {}
        self.held = {name: Memory(array) for name, array in arrays.items()}
        self.scratch = garbage(cuda_sparse.encode_scratch(n))
        self.out = Memory(np.zeros(codec.capacity(n), np.uint8), shift)
        self.used = 0

    def step(self, values: Floats, divisor: int, moment: Moment) -> NDArray[np.uint8]:
        """Code values both ways; the coded bytes."""
        momentum = self.codec.settings.momentum if self.store else 0.0
        wanted = np.zeros(self.codec.capacity(self.n), np.uint8)
        most, least = self.codec.most(self.n, moment.step), self.codec.minimum()
        used = self.codec._encode(values, most, divisor, momentum, wanted, self.store, moment)
        x, told = Memory(values), Memory(np.zeros(1, np.uint64))
        places = (self.scratch.address, self.out.address, told.address)
        stores = [address(self.held.get(name)) for name in (VELOCITY, ERROR)]
        self.gpu.encode(
            x.address, divisor, momentum, *stores, self.n, most, least, moment.seed, *places
        )
        assert told.values.tolist() == [used]
        same(self.out.values[:used], wanted[:used])
        for name, memory in self.held.items():
            assert self.store is not None
            same(memory.values, self.store.arrays[name])
        self.used = used
        return wanted[:used]

    def decode(self, coded: NDArray[np.uint8]) -> None:
        """Decode, add and clear both ways."""
        room = garbage(cuda_sparse.decode_scratch(self.n))
        data = Memory(coded, 1)
        out, total = np.ones(self.n, np.float32), values_of("normal", self.n, 5)
        field = np.ones(self.n, np.float32)
        memories = [Memory(each) for each in (out, total, field)]
        given = (data.address, self.n, room.address)
        self.codec.decode(coded, out)
        self.gpu.decode(*given, memories[0].address)
        self.codec.decode_add(coded, total)
        self.gpu.decode_add(*given, memories[1].address)
        self.codec._clear(coded, field)
        self.gpu.clear(*given, memories[2].address)
        for memory, wanted in zip(memories, (out, total, field), strict=True):
            same(memory.values, wanted)


CODECS = {
    "one": topk(1e-9),
    "few": topk(0.01),
    "some": topk(0.1),
    "half": topk(0.5),
    "all": topk(1.0),
    "momentum": topk(0.05, momentum=0.9),
    "memoryless": topk(0.05, error_feedback=False),
    "low": threshold(1e-3),
    "high": threshold(2.0, momentum=0.5),
    "beyond": threshold(1e9),
}


@pytest.mark.parametrize("name", CODECS)
def test_pieces_of_any_length(gpu: CudaSparse, name: str) -> None:
    for index, n in enumerate(LENGTHS):
        piece = Coded(gpu, CODECS[name], n, shift=index % 3)
        for step in range(2):
            divisor = (1, 3, 4)[(index + step) % 3] if piece.store else 1
            kind = ("normal", "mixed", "zeros", "denormal")[index % 4]
            coded = piece.step(values_of(kind, n, step), divisor, Moment(step=step, seed=step))
            piece.decode(coded)


@pytest.mark.parametrize(
    ("ratio", "kind"),
    [
        (0.00005, sparse_form.WORDS),
        (0.01, sparse_form.BYTES),
        (0.2, sparse_form.BITMAP),
        (1.0, sparse_form.DENSE),
    ],
)
def test_every_kind_over_several_large_blocks(gpu: CudaSparse, ratio: float, kind: int) -> None:
    piece = Coded(gpu, topk(ratio), LONG, shift=1)
    coded = piece.step(values_of("normal", LONG), 1, Moment(seed=SEED))
    assert int(coded[0]) == kind
    piece.decode(coded)


@pytest.mark.parametrize("ratio", [0.001, 0.03, 0.4])
def test_equal_magnitudes_are_spread_alike(gpu: CudaSparse, ratio: float) -> None:
    for n in (300, 9000):
        piece = Coded(gpu, topk(ratio), n)
        values = np.where(np.arange(n) % 7 == 0, 1.0, -0.5).astype(np.float32)
        for step in range(3):
            piece.decode(piece.step(values, 1, Moment(seed=SEED + step)))


def test_full_block_has_no_count_of_one_byte(gpu: CudaSparse) -> None:
    n = 256 * 40
    values = np.zeros(n, np.float32)
    values[512:768] = 1.0
    piece = Coded(gpu, threshold(0.5), n)
    coded = piece.step(values, 1, Moment())
    assert int(coded[0]) != sparse_form.BYTES
    piece.decode(coded)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["few", "momentum", "memoryless", "high"])
def test_nan_and_inf_are_poison(gpu: CudaSparse, name: str, bad: float) -> None:
    n = 5000
    piece = Coded(gpu, CODECS[name], n)
    piece.step(values_of("normal", n), 1, Moment())
    values = values_of("normal", n, 1)
    values[4999] = bad
    coded = piece.step(values, 1, Moment(step=1))
    assert coded.tolist() == [0] * sparse_form.HEADER
    piece.decode(coded)
    piece.step(values_of("normal", n, 2), 1, Moment(step=2))


def test_sums_alone(gpu: CudaSparse) -> None:
    for n in (1, 300, 2000):
        for values in (values_of("huge", n), values_of("normal", n)):
            codec = topk(0.1, momentum=0.9)
            velocity, error = values_of("huge", n, 1), values_of("huge", n, 2)
            x, speed, held = Memory(values), Memory(velocity), Memory(error)
            flags = Memory(np.zeros(2, np.uint32))
            gpu.momentum(x.address, 0.9, speed.address, n, flags.address)
            codec._accelerate(values, velocity)
            same(x.values, values)
            same(speed.values, velocity)
            gpu.accumulate(x.address, 1, 0, None, held.address, n, flags.address + 4)
            bad = randomk.Reference().accumulate(values, error)
            same(held.values, error)
            assert flags.values[1] == bad


def test_random_groups(gpu: CudaSparse) -> None:
    reference = randomk.Reference()
    for index, n in enumerate((1, 15, 16, 17, 1000, 5003)):
        wanted = max(1, -(-n // 16) // 5)
        source, clear = values_of("normal", n), index % 2 == 1
        x, out = Memory(source), Memory(np.ones(16 * wanted, np.float32))
        form = np.zeros(16 * wanted, np.float32)
        reference.take(source, wanted, SEED, clear, form)
        gpu.groups_take(x.address, n, wanted, SEED, clear, out.address)
        same(out.values, form)
        same(x.values, source)
        back, made = np.ones(n, np.float32), Memory(np.ones(n, np.float32))
        reference.put(form, wanted, SEED, 3, 1.25, back)
        gpu.groups_put(out.address, n, wanted, SEED, 3, 1.25, made.address)
        same(made.values, back)


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("n", [5, 1000, LONG])
def test_groups_that_were_taken_are_cleared(gpu: CudaSparse, n: int, bad: bool) -> None:
    values, wanted = values_of("mixed", n), max(1, n // 100)
    memory, told = Memory(values), Memory(np.zeros(1, np.float32))
    flag = Memory(np.array([bad], np.uint32))
    gpu.groups_settle(memory.address, n, wanted, SEED, flag.address, told.address)
    if not bad:
        taken = np.empty(wanted * randomk.GROUP, np.float32)
        randomk.Reference().take(values, wanted, SEED, True, taken)
    same(memory.values, values)
    assert np.isnan(told.values[0]) == bad
    gpu.groups_settle(None, n, wanted, SEED, flag.address, told.address)
    gpu.groups_spoil(told.address, n, memory.address)
    same(memory.values, np.full(n, np.nan, np.float32) if bad else values)
