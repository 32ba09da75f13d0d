"""bf16, fp16 and fp8 against torch's own conversions, and the generator of random rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hpcsync import codecs
from hpcsync.codecs import Moment, PieceCodec, Settings
from hpcsync.codecs.rounding import random_bits, random_key, rounded, units

Floats = NDArray[np.float32]
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}

both_forms = pytest.mark.parametrize("native", [False, True], ids=["numpy", "native"])


def build(name: str, native: bool, **chosen: bool) -> PieceCodec:
    made = codecs.build(name, Settings(**chosen), native=native)
    assert isinstance(made, PieceCodec)
    return made


def coded(codec: PieceCodec, values: Floats, seed: int = 0) -> NDArray[np.uint8]:
    out = np.empty(codec.capacity(values.shape[0]), np.uint8)
    assert codec.encode(values, out, None, Moment(seed=seed)) == out.shape[0]
    return out


def decoded(codec: PieceCodec, values: Floats, seed: int = 0) -> Floats:
    out = np.empty_like(values)
    codec.decode(coded(codec, values, seed), out)
    return out


def patterns() -> Floats:
    """Values on, half way between, and one unit beside those of both formats; and any others."""
    generator = np.random.default_rng(1)
    halves = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(all="ignore"):
        starts = np.concatenate(
            [halves.astype(np.uint32) << 16, halves.view(np.float16).astype(np.float32).view("u4")]
        )
    beside = np.uint32([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    drawn = np.frombuffer(generator.bytes(400_000), np.uint32)
    return np.concatenate([(starts[:, None] + beside).reshape(-1), drawn]).view(np.float32)


@both_forms
@pytest.mark.parametrize("name", HALVES)
def test_halves_are_rounded_as_torch_does(name: str, native: bool) -> None:
    values = patterns()
    ours = coded(build(name, native), values).view(np.uint16)
    theirs = torch.from_numpy(values).to(HALVES[name]).view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(values)
    np.testing.assert_array_equal(ours[~nan], theirs[~nan])
    back = decoded(build(name, native), values)
    assert np.isnan(back[nan]).all()
    assert not np.isnan(back[~nan]).any()
    wide = torch.from_numpy(ours.view(np.int16)).view(HALVES[name]).float().numpy()
    np.testing.assert_array_equal(back[~nan].view("u4"), wide[~nan].view("u4"))


@both_forms
def test_fp8_is_torchs_e4m3fn_of_scaled_values(native: bool) -> None:
    """Blocks whose largest is 448 have a scale of 1."""
    codec = build("fp8", native)
    values = np.zeros((100, 256), np.float32)
    generator = np.random.default_rng(2)
    values[:, 1:] = generator.standard_normal((100, 255)) * 10.0 ** generator.integers(
        -4, 2, (100, 1)
    )
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    values[0, 1:128] = grid
    values[1, 1:127] = (grid[1:] + grid[:-1]) / 2  # ties
    values[2, 1:128] = -grid
    values[:, 0] = 448
    values = np.clip(values.reshape(-1), -448, 448)
    out = coded(codec, values)
    np.testing.assert_array_equal(out[:400].view(np.float32), np.ones(100))
    theirs = torch.from_numpy(values).to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(out[400:], theirs.view(torch.uint8).numpy())
    np.testing.assert_array_equal(decoded(codec, values), theirs.float().numpy())


@both_forms
def test_fp16_keeps_what_overflows_as_inf_and_its_error_finite(native: bool) -> None:
    codec = build("fp16", native)
    store = codec.store(4, "sender")
    assert store
    values = np.float32([65504, 65520, -1e30, 1.0 + 2**-12])
    out, got = np.empty(8, np.uint8), np.empty(4, np.float32)
    codec.encode(values, out, store, Moment())
    codec.decode(out, got)
    np.testing.assert_array_equal(got, np.float32([65504, np.inf, -np.inf, 1]))
    np.testing.assert_array_equal(store.read("error"), np.float32([0, 0, 0, 2**-12]))


@both_forms
@pytest.mark.parametrize("name", ["bf16", "fp16", "fp8"])
def test_random_rounding_takes_a_neighbour(name: str, native: bool) -> None:
    """One of the two codes beside the value, and the value itself where it is a code."""
    values = np.random.default_rng(3).standard_normal(5000).astype(np.float32)
    values[::256] = 448
    nearest = decoded(build(name, native), values)
    np.testing.assert_array_equal(decoded(build(name, native, stochastic=True), nearest), nearest)
    made = decoded(build(name, native, stochastic=True), values, seed=5)
    step = np.abs(made - values)
    relative = {"bf16": 2.0**-7, "fp16": 2.0**-10, "fp8": 2.0**-3}[name]
    smallest = {"bf16": 0.0, "fp16": 2.0**-24, "fp8": 2.0**-9}[name]
    assert (step <= np.maximum(np.abs(values) * relative, smallest)).all()
    assert (made != nearest).mean() > 0.1


def test_the_generator_is_uniform_and_independent() -> None:
    count = 1 << 18
    for seed in (0, 1, 2, 1 << 32, (1 << 64) - 1):
        drawn = random_bits(seed, count)
        ones = ((drawn[:, None] >> np.arange(32, dtype=np.uint32)) & 1).mean(axis=0)
        assert np.abs(ones - 0.5).max() < 5 * 0.5 / np.sqrt(count)
        counts = np.histogram(units(seed, count), bins=256, range=(0, 1))[0]
        assert ((counts - 1024) ** 2 / 1024).sum() < 256 + 6 * np.sqrt(2 * 256)
        centred = units(seed, count) - 0.5
        for other in (units(seed + 1, count), units(seed, count, start=1)):
            assert abs(np.corrcoef(centred, other)[0, 1]) < 5 / np.sqrt(count)


def test_the_generator_is_fixed() -> None:
    """Runs of different versions must round alike: these are the numbers for good."""
    assert random_key(1) == (0x89025CC1, 0x910A2DEC)  # splitmix64's first number for seed 1
    drawn = random_bits(1, 4)
    np.testing.assert_array_equal(
        drawn, np.uint32([0xFC0F2318, 0xDBD3AC9C, 0x3E2283A9, 0x16628965])
    )
    np.testing.assert_array_equal(random_bits(1, 2, start=2), drawn[2:])


def test_whole_numbers_beside() -> None:
    y = np.float32([0.5, 1.5, 2.5, -0.5, -1.5, 3.0, -3.0])
    np.testing.assert_array_equal(rounded(y, None), np.float32([0, 2, 2, -0.0, -2, 3, -3]))
    means = np.mean([rounded(np.full(1000, 0.3, np.float32), seed) for seed in range(50)])
    assert abs(means - 0.3) < 0.01
