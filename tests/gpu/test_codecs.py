"""Codecs on the streams of a GPU: the bits of the host's codecs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hpcsync import codecs
from hpcsync.codecs import Matrix, Moment, PieceCodec, Settings, Store, SumCodec
from hpcsync.codecs.gpu.forms import coder, summer
from hpcsync.device import Device, Event, Stream
from hpcsync.parallel.placement import get
from tests.gpu.ranks import read, write

pytestmark = pytest.mark.gpu

PIECES = ["bf16", "fp16", "fp8", "int8", "int4", "onebit", "topk", "threshold"]
SUMS = ["int8_shared", "randomk", "powersgd"]
SETTINGS = Settings(ratio=0.03, threshold=1.5, rank=3, stochastic=True, verify=True)
COUNT, RANKS = 70_001, 3
MATRICES = (Matrix(0, (200, 300)),)


@pytest.fixture(scope="module")
def device() -> Device:
    return get("cuda")


def values_of(*draw: int) -> NDArray[np.float32]:
    return np.random.default_rng(draw).standard_normal(COUNT).astype(np.float32)


def placed(device: Device, values: NDArray[Any]) -> Any:
    made = device.empty(values.nbytes).view(values.dtype)
    write(device, made, values)
    return made


def told(stream: Stream, array: Any) -> NDArray[Any]:
    """What an array holds after all that the stream was given."""
    stream.synchronize()
    return read(stream.device, array)


def same_stores(one: Store | None, other: Store | None) -> None:
    assert one is not None
    assert other is not None
    for field in one.fields:
        np.testing.assert_array_equal(one.read(field), other.read(field))


@pytest.mark.parametrize("name", PIECES)
def test_pieces(device: Device, name: str) -> None:
    codec = codecs.build(name, SETTINGS, device=device)
    assert isinstance(codec, PieceCodec)
    stream = device.stream()
    form = coder(codec, stream, COUNT, RANKS)
    roles = ("sender", "owner")
    held = [codec.store(COUNT, role) for role in roles]
    there = [form.store(COUNT, role) for role in roles]
    room = codec.capacity(COUNT)
    for step in range(3):
        parts = []
        for rank in range(RANKS - 1):
            part = np.zeros(room, np.uint8)
            codec.encode(values_of(step, rank), part, None, Moment(step, rank))
            parts.append(part)
        values, own, moment = values_of(step, 7), values_of(step, 8), Moment(step, 90 + step)
        out, mean = np.zeros(room, np.uint8), np.zeros(room, np.uint8)
        given, sums = placed(device, values), placed(device, own)
        coded, made = placed(device, out), placed(device, mean)
        others = [placed(device, part) for part in parts]
        form.encode(given, coded, there[0], moment)
        form.combine(sums, 1, others, RANKS, made, there[1], moment)
        used = codec.encode(values, out, held[0], moment)
        total = codec.combine(own, 1, parts, RANKS, mean, held[1], moment)
        np.testing.assert_array_equal(told(stream, coded)[:used], out[:used])
        np.testing.assert_array_equal(told(stream, made)[:total], mean[:total])
        np.testing.assert_array_equal(told(stream, sums), own)
        for one, other in zip(held, there, strict=True):
            same_stores(one, other)


@pytest.mark.parametrize("name", SUMS)
def test_sums(device: Device, name: str) -> None:
    """Of one rank alone, whose arrays are their own sums."""
    codec = codecs.build(name, SETTINGS, device=device)
    assert isinstance(codec, SumCodec)
    stream = device.stream()
    form = summer(codec, stream, COUNT, MATRICES)
    held, there = codec.store(COUNT, MATRICES), form.store(COUNT, MATRICES)
    arrays = [np.zeros(each.count, each.dtype) for each in codec.forms(COUNT, MATRICES, 1)]
    rooms = [placed(device, each) for each in arrays]
    for step in range(3):
        values, moment = values_of(step), Moment(step, 5 + step, 9 + step)
        given = placed(device, values)
        for _ in codec.rounds(values, arrays, MATRICES, 1, 1, held, moment):
            pass
        for event in form.rounds(given, rooms, MATRICES, 1, 1, there, moment):
            if isinstance(event, Event):
                event.synchronize()
        np.testing.assert_array_equal(told(stream, given), values)
        same_stores(held, there)
