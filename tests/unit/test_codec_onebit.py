"""onebit: signs, the mean of real elements, and huge and tiny blocks.

The shared tests of all codecs stand in test_codecs.py.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from hpcsync.codecs import Moment, Settings, Store
from hpcsync.codecs.base import Floats
from hpcsync.codecs.onebit import BLOCK, OneBit
from hpcsync.device import kernels
from hpcsync.device.kernels import size_t
from tests.isas import ISAS, every_isa, using

every_form = pytest.mark.parametrize("form", ["numpy", *ISAS])


@contextlib.contextmanager
def codec_of(form: str, *, error_feedback: bool = True) -> Iterator[OneBit]:
    settings = Settings(error_feedback=error_feedback)
    if form == "numpy":
        yield OneBit(settings, None)
        return
    with using(form) as loaded:
        yield OneBit(settings, loaded)


def normal(count: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


def code(
    codec: OneBit, values: Floats, store: Store | None = None
) -> tuple[NDArray[np.uint8], Floats]:
    """The bytes, at an odd address, and what they decode to."""
    out = np.full(codec.capacity(values.shape[0]) + 1, 255, np.uint8)[1:]
    assert codec.encode(values, out, store, Moment()) == out.shape[0]
    decoded = np.empty_like(values)
    codec.decode(out, decoded)
    return out, decoded


@every_form
def test_layout_signs_and_means_of_real_elements(form: str) -> None:
    values = normal(BLOCK + 13)
    values[5], values[6] = 0.0, -0.0
    with codec_of(form) as codec:
        data, decoded = code(codec, values)
    scales = np.frombuffer(data[:8].tobytes(), np.float32)
    means = [abs(values[:BLOCK]).mean(), abs(values[BLOCK:]).mean()]  # no padding counts
    np.testing.assert_allclose(scales, means, rtol=1e-6)
    bits = np.unpackbits(data[8:], bitorder="little")
    np.testing.assert_array_equal(bits[: BLOCK + 13], np.signbit(values))
    assert not bits[BLOCK + 13 :].any()
    expected = np.repeat(scales, BLOCK)[: BLOCK + 13] * np.where(np.signbit(values), -1, 1)
    np.testing.assert_array_equal(decoded, expected.astype(np.float32))
    assert data.shape[0] / values.nbytes < 0.034


@every_form
@pytest.mark.parametrize("count", [BLOCK, 100])
def test_huge_and_tiny_blocks_have_a_mean(form: str, count: int) -> None:
    with codec_of(form) as codec:
        for scale in (3e38, 1e-30, 1e-38, 1e-42):
            values = (np.sign(normal(count)) * scale).astype(np.float32)
            _, decoded = code(codec, values)
            np.testing.assert_allclose(decoded, values, rtol=1e-5, atol=1e-44)
        assert not code(codec, np.zeros(count, np.float32))[1].any()


@every_form
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_a_bad_block_keeps_its_errors(form: str, bad: float) -> None:
    with codec_of(form) as codec:
        store = codec.store(2 * BLOCK + 50, "sender")
        assert store is not None
        code(codec, normal(2 * BLOCK + 50), store)
        for place, block in ((BLOCK + 3, slice(BLOCK, 2 * BLOCK)), (-1, slice(2 * BLOCK, None))):
            before = store.read("error").copy()
            values = normal(2 * BLOCK + 50, seed=1)
            values[place] = bad
            data, decoded = code(codec, values, store)
            assert np.isnan(decoded[block]).all()
            assert np.isfinite(decoded[:BLOCK]).all()
            np.testing.assert_array_equal(store.read("error")[block], before[block])
            bits = np.unpackbits(data[12:], bitorder="little")
            assert not bits[: 2 * BLOCK + 50][block].any()


@every_form
def test_the_sum_of_decoded_steps_tends_to_the_sum_of_inputs(form: str) -> None:
    count, steps = BLOCK + 200, 1000
    with codec_of(form) as codec:
        store = codec.store(count, "owner")
        assert store is not None
        rest = normal(count).astype(np.float64)
        total, decoded_total = np.zeros(count), np.zeros(count)
        for step in range(steps):
            values = (rest + normal(count, step)).astype(np.float32)
            total += values
            decoded_total += code(codec, values, store)[1]
    # What is missing is what the store holds, but for float32's rounding.
    np.testing.assert_allclose(total - decoded_total, store.read("error"), atol=2e-3)
    assert np.linalg.norm(total - decoded_total) < 0.05 * np.linalg.norm(total)


@every_isa
def test_large_pieces_past_the_caches(isa: str) -> None:
    count = (1 << 20) + 300
    with codec_of(isa) as codec:
        data, decoded = code(codec, normal(count))
        added = np.zeros(count, np.float32)
        codec.decode_add(data, added)
        for start in (0, 1):  # aligned and not
            out = kernels.empty_bytes(4 * count + 4)[4 * start :][: 4 * count].view(np.float32)
            codec.decode(data, out)
            np.testing.assert_array_equal(out, added)
    np.testing.assert_array_equal(decoded, added)


def test_capacity_is_the_kernels() -> None:
    loaded = kernels.load()
    if loaded is None:
        pytest.skip(kernels.missing())
    codec, size = OneBit(Settings(), None), loaded.function("onebit_bytes", size_t, size_t)
    for count in (0, 1, 7, 8, 9, 1023, 1024, 1025, 5000):
        assert size(count) == codec.capacity(count)
