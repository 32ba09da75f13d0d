"""Codecs on a device's streams: the bits of the host's, in whatever order work is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hpcsync import codecs
from hpcsync.codecs import Codec, Matrix, Moment, PieceCodec, Settings, Store, SumCodec
from hpcsync.codecs.gpu.forms import Coder, coder, summer
from hpcsync.codecs.gpu.room import Length
from hpcsync.device import Event, Stream, dtype_of, host
from hpcsync.errors import ConfigError, HpcsyncError
from tests.double.device import DoubleDevice, Machine, machine
from tests.shim import host as shim

pytestmark = pytest.mark.skipif(bool(shim.MISSING), reason=shim.MISSING)

PIECES = ["none", "bf16", "fp16", "fp8", "int8", "int4", "onebit", "topk", "threshold"]
SETTINGS = {
    "feedback": Settings(ratio=0.03, threshold=0.7),
    "stochastic": Settings(ratio=0.03, threshold=0.7, stochastic=True),
    "forgetful": Settings(ratio=0.03, threshold=0.7, error_feedback=False),
    "momentum": Settings(ratio=0.03, threshold=0.7, momentum=0.9, ratio_warmup=2),
}


@pytest.fixture
def double() -> Iterator[Machine]:
    with machine(1) as made:
        yield made


def values_of(count: int, *draw: int, bad: bool = False) -> NDArray[np.float32]:
    """Values of all sizes; with ``bad`` one of them is NaN."""
    random = np.random.default_rng([count, *draw])
    values = (random.standard_normal(count) * 2.0 ** random.integers(-4, 4)).astype(np.float32)
    if bad and count:
        values[count // 3] = np.nan
    return values


class Beside:
    """A codec on the host, and its form on a stream, given the same pieces."""

    def __init__(self, codec: PieceCodec, device: DoubleDevice, most: int, ranks: int) -> None:
        self.codec, self.device = codec, device
        self.stream: Stream = device.stream()
        self.form: Coder = coder(codec, self.stream, most, ranks)
        self._kept: list[Any] = []  # until the work on it is done

    def stores(self, count: int, role: str) -> tuple[Store | None, Store | None]:
        return self.codec.store(count, role), self.form.store(count, role)

    def place(self, values: NDArray[Any]) -> Any:
        """Device memory with these values, for the stream."""
        made = self.device.empty(values.nbytes).view(values.dtype)
        self.device.write(made, values, self.stream)
        self._kept.append(made)
        return made

    def room(self, count: int) -> Any:
        return self.device.empty(self.form.capacity(count))

    def used(self, told: int | Length) -> int:
        if isinstance(told, int):
            return told
        return int(self.device.read(told.cell)[0]) + told.more


def same(one: NDArray[Any], other: NDArray[Any]) -> None:
    """The same bits, but for those of NaN."""
    assert one.dtype == other.dtype
    if one.dtype == np.float32:
        assert np.array_equal(np.isnan(one), np.isnan(other))
        one, other = np.nan_to_num(one).view("u4"), np.nan_to_num(other).view("u4")
    assert np.array_equal(one, other)


def same_stores(one: Store | None, other: Store | None) -> None:
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert one.fields == other.fields
        assert one.nbytes == other.nbytes
        for field in one.fields:
            same(one.read(field), other.read(field))


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("name", PIECES)
def test_encode_and_decode(double: Machine, name: str, how: str) -> None:
    codec = codecs.build(name, SETTINGS[how])
    assert isinstance(codec, PieceCodec)
    count = 1500
    both = Beside(codec, double.device(), count, 2)
    held, there = both.stores(count, "sender")
    for step in range(3):
        values, moment = values_of(count, step, bad=step == 1), Moment(step, 77 + step)
        out, room = np.zeros(codec.capacity(count), np.uint8), both.room(count)
        with np.errstate(all="ignore"):
            used = codec.encode(values, out, held, moment)
        assert both.used(both.form.encode(both.place(values), room, there, moment)) == used
        same(both.device.read(room)[:used], out[:used])
        same_stores(held, there)
        start = values_of(count, 9)
        wanted, made = np.empty(count, np.float32), both.place(np.empty(count, np.float32))
        added, sums = start.copy(), both.place(start)
        with np.errstate(all="ignore"):
            codec.decode(out, wanted)
            codec.decode_add(out, added)
        both.form.decode(room, made)
        both.form.decode_add(room, sums)
        same(both.device.read(made), wanted)
        same(both.device.read(sums), added)


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("name", PIECES)
def test_combine(double: Machine, name: str, place: int, how: str) -> None:
    codec = codecs.build(name, SETTINGS[how])
    assert isinstance(codec, PieceCodec)
    count, ranks = 700, 4
    both = Beside(codec, double.device(), count, ranks)
    held, there = both.stores(count, "owner")
    for step in range(2):
        moment = Moment(step, 5 + step)
        others = []
        for rank in range(ranks - 1):
            data = np.zeros(codec.capacity(count), np.uint8)
            codec.encode(values_of(count, step, rank), data, None, Moment(step, rank))
            others.append(data)
        own = values_of(count, step, 100)
        given, room = both.place(own), both.room(count)
        parts = [both.place(data) for data in others]
        out = np.zeros(codec.capacity(count), np.uint8)
        used = codec.combine(own, place, others, ranks, out, held, moment)
        told = both.form.combine(given, place, parts, ranks, room, there, moment)
        assert both.used(told) == used
        same(both.device.read(room)[:used], out[:used])
        same(both.device.read(given), own)
        same_stores(held, there)


@pytest.mark.parametrize("name", ["int8", "int4", "onebit"])
def test_more_ranks_than_a_kernel_takes(name: str) -> None:
    codec = codecs.build(name, Settings())
    assert isinstance(codec, PieceCodec)
    count, ranks, moment = 300, 70, Moment(0, 3)
    others = []
    for rank in range(ranks - 1):
        data = np.zeros(codec.capacity(count), np.uint8)
        codec.encode(values_of(count, rank), data, None, Moment(0, rank))
        others.append(data)
    with machine(3) as double:
        both = Beside(codec, double.device(), count, ranks)
        own, out = values_of(count, 100), np.zeros(codec.capacity(count), np.uint8)
        given, room = both.place(own), both.room(count)
        parts = [both.place(data) for data in others]
        codec.combine(own, 30, others, ranks, out, None, moment)
        both.form.combine(given, 30, parts, ranks, room, None, moment)
        same(both.device.read(room), out)
        same(both.device.read(given), own)


@pytest.mark.parametrize("name", ["int8", "int4", "topk"])
def test_a_store_is_read_and_written_by_the_host(double: Machine, name: str) -> None:
    settings = dataclasses.replace(SETTINGS["momentum"], ratio=0.1)
    codec = codecs.build(name, settings)
    assert isinstance(codec, PieceCodec)
    count = 600
    both = Beside(codec, double.device(), count, 2)
    held, there = both.stores(count, "sender")
    assert held is not None
    assert there is not None
    assert not there.memory()
    for field in held.fields:
        assert not there.read(field).any()
        values = values_of(count, len(field))
        held.write(field, values)
        there.write(field, values)
    same_stores(held, there)
    values, room = values_of(count, 2), both.room(count)
    out = np.zeros(codec.capacity(count), np.uint8)
    used = codec.encode(values, out, held, Moment(0, 1))
    assert both.used(both.form.encode(both.place(values), room, there, Moment(0, 1))) == used
    same(both.device.read(room)[:used], out[:used])
    same_stores(held, there)


MATRICES = [Matrix(0, (40, 64)), Matrix(2600, (30, 50)), Matrix(4200, (3, 5))]
SUMS = {
    "int8_shared": Settings(),
    "int8_shared, verified": Settings(verify=True, stochastic=True),
    "int8_shared, forgetful": Settings(error_feedback=False),
    "randomk": Settings(ratio=0.1),
    "randomk, forgetful": Settings(ratio=0.1, error_feedback=False),
    "powersgd": Settings(rank=3),
    "powersgd, forgetful": Settings(rank=2, error_feedback=False),
}


class Ranks:
    """Several ranks' pieces of a codec of sums; on the host, or each on a stream of its own."""

    def __init__(self, codec: SumCodec, ranks: int, count: int, device: DoubleDevice | None):
        self.codec, self.ranks, self.count, self.device = codec, ranks, count, device
        self.streams = [device.stream() if device else None for _ in range(ranks)]
        self.codes = [summer(codec, stream, count, MATRICES) for stream in self.streams]
        self.stores = [code.store(count, MATRICES) for code in self.codes]
        forms = codec.forms(count, MATRICES, ranks)
        names = [f"{form.dtype} max" if form.op == "max" else form.dtype for form in forms]
        self.dtypes = [dtype_of(name) for name in names]
        self.arrays = [
            [
                self.empty(form.count, dtype.storage)
                for form, dtype in zip(forms, self.dtypes, strict=True)
            ]
            for _ in range(ranks)
        ]
        self.values = [self.empty(count, np.dtype(np.float32)) for _ in range(ranks)]

    def empty(self, count: int, dtype: np.dtype[Any]) -> Any:
        if self.device is None:
            return np.full(count, 77, dtype)
        return self.device.empty(count * dtype.itemsize).view(dtype)

    def write(self, rank: int, array: Any, values: NDArray[Any]) -> None:
        if self.device is None:
            array[:] = values
        else:
            self.device.write(array, values, self.streams[rank])

    def read(self, array: Any) -> NDArray[Any]:
        return array if self.device is None else self.device.read(array)

    def step(self, given: list[NDArray[np.float32]], moment: Moment, spoil: int = -1) -> None:
        """One exchange.

        Args:
            spoil: a round whose first sum comes out wrong.
        """
        rounds = []
        for rank, values in enumerate(given):
            self.write(rank, self.values[rank], values)
            own = dataclasses.replace(moment, seed=moment.seed + rank)
            rounds.append(
                self.codes[rank].rounds(
                    *(self.values[rank], self.arrays[rank], MATRICES, self.ranks, self.ranks),
                    *(self.stores[rank], own),
                )
            )
        with np.errstate(all="ignore"):
            while (index := {self.next(each) for each in rounds}.pop()) is not None:
                self.add(index, spoil)

    def next(self, rounds: Iterator[Any]) -> int | None:
        while isinstance(step := next(rounds, None), Event):
            step.synchronize()
        return step

    def add(self, index: int, spoil: int) -> None:
        parts = [np.array(self.read(arrays[index])) for arrays in self.arrays]
        total = np.empty_like(parts[0])
        host().reduce([total], parts, self.dtypes[index])
        total[:1] += index == spoil
        for rank, arrays in enumerate(self.arrays):
            self.write(rank, arrays[index], total)


@pytest.mark.parametrize("bad", ["", "nan", "large"])
@pytest.mark.parametrize("ranks", [2, 5])
@pytest.mark.parametrize("name", SUMS)
def test_sums(double: Machine, name: str, ranks: int, bad: str) -> None:
    codec = codecs.build(name.split(",")[0], SUMS[name])
    assert isinstance(codec, SumCodec)
    count = 4300
    plain = Ranks(codec, ranks, count, None)
    queued = Ranks(codec, ranks, count, double.device())
    for step in range(4):
        given = [values_of(count, step, rank) for rank in range(ranks)]
        if bad and step == 1:
            given[1][2700] = np.nan if bad == "nan" else np.float32(3e38)
            given[1][2701] = 1.0
        moment = Moment(step, 40 * step, 60 + step)
        plain.step(given, moment)
        queued.step(given, moment)
        for rank in range(ranks):
            same(queued.read(queued.values[rank]), plain.values[rank])
            same_stores(plain.stores[rank], queued.stores[rank])


def test_a_changed_sum_is_found(double: Machine) -> None:
    codec = codecs.build("int8_shared", Settings(verify=True))
    assert isinstance(codec, SumCodec)
    queued = Ranks(codec, 2, 500, double.device())
    queued.step([values_of(500, rank) for rank in range(2)], Moment())
    with pytest.raises(HpcsyncError, match="fails its checksum in step 7"):
        queued.step([values_of(500, rank) for rank in range(2)], Moment(7), spoil=1)


class OwnCodec(PieceCodec):
    """A user's."""

    name = "own"

    def capacity(self, count: int) -> int:
        return 4 * count

    def encode(self, values: Any, out: Any, store: Store | None, moment: Moment) -> int:
        return 0

    def decode(self, data: Any, out: Any) -> None: ...

    def decode_add(self, data: Any, out: Any) -> None: ...


def test_what_has_no_form_is_refused() -> None:
    def build(device: Any) -> Codec:
        return codecs.build(f"{__name__}:OwnCodec", Settings(), device=device)

    with machine() as double, pytest.raises(ConfigError) as caught:
        build(double.device())
    text = str(caught.value)
    assert "\n" not in text
    for word in ("'own'", "double", "train.device=cpu"):
        assert word in text
    assert isinstance(build(None), OwnCodec)
