"""int4: the rotation, nibbles, scales, and what its error store keeps.

The shared tests of all codecs stand in test_codecs.py.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hpcsync.codecs import Moment, Settings
from hpcsync.codecs.base import Floats
from hpcsync.codecs.int4 import Int4, RotatedStore, pack, unpack
from hpcsync.codecs.rotation import rotate, unrotate
from hpcsync.device import kernels
from hpcsync.device.kernels import address, pointer, size_t
from tests.isas import ISAS, every_isa, using

FORMS = ("numpy", *ISAS)
LENGTHS = (0, 1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 85, 255, 256, 257, 511, 512, 1000, 5000)

every_form = pytest.mark.parametrize("form", FORMS)


@contextlib.contextmanager
def codec_of(form: str, keep: float = 0.0, **chosen: bool) -> Iterator[Int4]:
    if form == "numpy":
        yield Int4(Settings(**chosen), None, keep)
    else:
        with using(form) as loaded:
            yield Int4(Settings(**chosen), loaded, keep)


def normal(count: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


def code(
    codec: Int4, values: Floats, store: RotatedStore | None = None, seed: int = 1
) -> tuple[NDArray[np.uint8], Floats]:
    """The bytes, at an odd address, and what they decode to."""
    out = np.full(codec.capacity(values.shape[0]) + 1, 255, np.uint8)[1:]
    assert codec.encode(values, out, store, Moment(seed=seed)) == out.shape[0]
    decoded = np.empty_like(values)
    codec.decode(out, decoded)
    return out, decoded


def fresh(codec: Int4, count: int) -> RotatedStore:
    store = codec.store(count, "sender")
    assert isinstance(store, RotatedStore)
    return store


def hadamard(size: int) -> NDArray[np.int64]:
    matrix = np.ones((1, 1), np.int64)
    while matrix.shape[0] < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


# ---- rotation and nibbles --------------------------------------------------------------------


@every_isa
def test_the_butterfly_is_sylvesters_matrix_and_its_own_inverse(isa: str) -> None:
    whole = np.random.default_rng(0).integers(-99, 99, 5 * 256).astype(np.float32)
    with using(isa) as loaded:
        butterfly = loaded.function("hadamard_f32", None, address, size_t)
        rotated = whole.copy()
        butterfly(pointer(rotated), 5)
        expected = whole.reshape(5, 256) @ hadamard(256) / 16
        np.testing.assert_array_equal(rotated.reshape(5, 256), expected)
        butterfly(pointer(rotated), 5)
    np.testing.assert_array_equal(rotated, whole)


@every_isa
def test_the_butterfly_adds_in_the_stated_order(isa: str) -> None:
    values = normal(512) * np.float32(3.7)
    with using(isa) as loaded:
        rotated = values.copy()
        loaded.function("hadamard_f32", None, address, size_t)(pointer(rotated), 2)
    # The codec's is the same, but for a power of two.
    np.testing.assert_array_equal(rotated, rotate(values) * np.float32(16))


@pytest.mark.parametrize("count", LENGTHS)
def test_rotating_keeps_lengths_and_comes_back(count: int) -> None:
    values = normal(count).astype(np.float64)
    rotated = rotate(values.astype(np.float32)).astype(np.float64) * 16
    assert math.isclose(np.linalg.norm(rotated), np.linalg.norm(values), rel_tol=1e-5)
    whole = np.random.default_rng(1).integers(-127, 128, count)
    back = rotate(unrotate(whole).astype(np.float32))
    np.testing.assert_array_equal(back, whole.astype(np.float32))


@pytest.mark.parametrize("count", LENGTHS)
def test_nibbles_come_back_in_every_form(count: int) -> None:
    q = np.random.default_rng(count).integers(-8, 8, count).astype(np.int8)
    packed = np.full((count + 1) // 2 + 1, 255, np.uint8)[1:]
    pack(q, packed)
    np.testing.assert_array_equal(unpack(packed, count), q)
    for isa in ISAS:
        with using(isa) as loaded:
            native = np.full_like(packed, 77)
            loaded.function("int4_pack", None, address, size_t, address)(
                pointer(q), count, pointer(native)
            )
            np.testing.assert_array_equal(native, packed)
            back = np.full_like(q, 99)
            loaded.function("int4_unpack", None, address, size_t, address)(
                pointer(packed), count, pointer(back)
            )
            np.testing.assert_array_equal(back, q)


def test_where_a_nibble_stands() -> None:
    q = np.full(256, -8, np.int8)
    q[16 * (8 * 1 + 3) + 5] = 7  # half 1, nibble 3 of word 5
    packed = np.empty(128, np.uint8)
    pack(q, packed)
    words = packed.view("<u4")
    assert words[16 + 5] == 0xF << 12
    assert np.count_nonzero(words) == 1


# ---- scale and rounding ----------------------------------------------------------------------


@every_form
def test_bytes_and_error_of_a_large_piece(form: str) -> None:
    count = 256 * 200
    with codec_of(form, error_feedback=False) as codec:
        assert codec.capacity(count) / (4 * count) <= 0.131
        values = normal(count)
        _, decoded = code(codec, values)
    assert np.mean((decoded - values) ** 2) < 0.0128  # 0.0123 expected; -7..7 has 0.0159


@every_form
def test_one_outlier_leaves_the_others_their_bits(form: str) -> None:
    values = normal(256)
    values[100] = 100.0
    with codec_of(form, error_feedback=False) as codec:
        _, decoded = code(codec, values)
    # Without rotation the scale is 12.5, and all others are coded as zero: their norm is lost.
    others = np.arange(256) != 100
    lost = np.linalg.norm((decoded - values)[others]) / np.linalg.norm(values[others])
    assert lost < 0.75


@every_form
@pytest.mark.parametrize("sign", [1, -1])
def test_the_extreme_coefficient_is_exact_but_for_the_scales_bits(form: str, sign: int) -> None:
    # All of the block in one coefficient: a constant.
    values = np.full(256, sign * 3.25, np.float32)
    with codec_of(form, error_feedback=False) as codec:
        data, decoded = code(codec, values)
    np.testing.assert_array_equal(decoded, values)
    assert data[:4].view(np.float32)[0] == -sign * 3.25 / 8


@every_form
@pytest.mark.parametrize("count", [256, 40])
def test_opposite_extremes_lose_at_most_one_scale(form: str, count: int) -> None:
    """Coefficients of 8 and -8 scales: one of them is cut off, and what it lost is kept."""
    coefficients = np.zeros(count, np.int32)
    coefficients[[3, 7]] = 8, -8
    values = unrotate(coefficients).astype(np.float32)
    with codec_of(form) as codec:
        store = fresh(codec, count)
        _, decoded = code(codec, values, store)
        lost = values - decoded
        np.testing.assert_allclose(rotate(lost)[[3, 7]], [0, -1], atol=1e-6)
        assert abs(store.read("error") - lost).max() < 16 / 64


@every_form
def test_huge_and_tiny_blocks(form: str) -> None:
    with codec_of(form) as codec:
        for values in (
            np.full(256, 3.4e38, np.float32),
            normal(256) * np.float32(1e37),
            normal(256) * np.float32(1e-35),
        ):
            _, decoded = code(codec, values)
            assert np.linalg.norm(decoded / abs(values).max() - values / abs(values).max()) < 1
        # No normal number would be the scale: zeros are sent, and the store keeps the rest.
        values = normal(256) * np.float32(1e-38)
        store = fresh(codec, 256)
        data, decoded = code(codec, values, store)
        assert data[:4].view(np.float32)[0] == 0
        assert not decoded.any()
        assert abs(rotate(store.read("error")) - rotate(values)).max() <= 2.0**-126


@every_form
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_a_bad_block_keeps_its_store(form: str, bad: float, keep: float) -> None:
    with codec_of(form, keep) as codec:
        store = fresh(codec, 600)
        code(codec, normal(600), store)
        for place, block in ((300, slice(256, 512)), (599, slice(512, 600))):
            before = store.read("error")
            values = normal(600, seed=1)
            values[place] = bad
            _, decoded = code(codec, values, store)
            assert np.isnan(decoded[block]).all()
            np.testing.assert_array_equal(store.read("error")[block], before[block])
            assert np.isfinite(decoded[:256]).all()
        assert np.isfinite(store.read("error")).all()


@every_form
def test_at_random_the_mean_of_decoded_is_the_input(form: str) -> None:
    values = normal(300)
    with codec_of(form, error_feedback=False, stochastic=True) as codec:
        tries = 3000
        decoded = np.array([code(codec, values, seed=seed)[1] for seed in range(tries)], np.float64)
    error = (decoded.mean(axis=0) - values) / (decoded.std(axis=0) / tries**0.5)
    assert abs(error).max() < 5
    assert 0.8 < np.mean(error**2) < 1.25


# ---- error store -----------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("keep", [0.0, 0.5])
@pytest.mark.parametrize("count", [1, 15, 85, 256, 300, 1000])
def test_a_store_written_with_what_another_read_is_alike(
    form: str, keep: float, count: int
) -> None:
    with codec_of(form, keep) as codec:
        one, two = fresh(codec, count), fresh(codec, count)
        for step in range(5):
            code(codec, normal(count, step) * np.float32(10.0 ** (3 * step - 6)), one, seed=step)
        two.write("error", one.read("error"))
        np.testing.assert_array_equal(two.read("error"), one.read("error"))
        for step in range(5):
            ours = code(codec, normal(count, step), one, seed=9 + step)[0]
            theirs = code(codec, normal(count, step), two, seed=9 + step)[0]
            np.testing.assert_array_equal(ours, theirs)
            np.testing.assert_array_equal(two.read("error"), one.read("error"))


@given(
    st.integers(0, 700),
    st.lists(st.integers(0, 240), min_size=3, max_size=3),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_any_state_of_a_store_is_exact(count: int, exponents: list[int], seed: int) -> None:
    store, copy = RotatedStore(count), RotatedStore(count)
    store.errors[:] = np.random.default_rng(seed).integers(-127, 128, count)
    store.exponents[:] = exponents[: store.exponents.shape[0]]
    copy.write("error", store.read("error"))
    np.testing.assert_array_equal(copy.read("error"), store.read("error"))
    np.testing.assert_array_equal(copy.coefficients(), store.coefficients())


def test_values_of_other_blocks_are_rounded_to_the_nearest() -> None:
    """As when buckets are laid out anew: a piece begins elsewhere in its parameters."""
    with codec_of("numpy") as codec:
        old, new = fresh(codec, 1000), fresh(codec, 900)
        code(codec, normal(1000), old)
        values = old.read("error")[100:]
        new.write("error", values)
        lost = rotate(new.read("error") - values)
        units = np.repeat(new.units(), 256)[:900]
        assert (abs(lost) <= units * 0.501).all()
        assert np.linalg.norm(new.read("error") - values) < 0.02 * np.linalg.norm(values)


@every_form
@pytest.mark.parametrize("keep", [0.0, 0.75])
def test_the_sum_of_decoded_steps_tends_to_the_sum_of_inputs(form: str, keep: float) -> None:
    steps, count = 2000, 600
    with codec_of(form, keep) as codec:
        store = fresh(codec, count)
        rest = normal(count).astype(np.float64)  # the part that each step has
        total, decoded_total = np.zeros(count), np.zeros(count)
        for step in range(steps):
            values = (rest + 0.1 * normal(count, step)).astype(np.float32)
            total += values
            decoded_total += code(codec, values, store, seed=step)[1]
    left = total - decoded_total
    # All that is still held back, times 1 / (1 - keep) ...
    unexplained = left - store.read("error") / (1 - keep)
    assert abs(left).max() < 4 / (1 - keep)
    # ... and what the store's 8 bits lost, a random walk of less than a tenth of a step's error.
    assert np.std(unexplained) < (0.35 if keep else 0.1)
    assert abs(unexplained.mean()) < 4 * np.std(unexplained) / count**0.5


@every_form
def test_what_the_store_loses_has_no_drift(form: str) -> None:
    """The same gradient over and over: errors of rounding to nearest would add up."""
    values = np.tile(np.float32([1.0, 0.3]), 128)
    lost = {}
    with codec_of(form) as codec:
        for steps in (500, 4000):
            store, total = fresh(codec, 256), np.zeros(256)
            for step in range(steps):
                total += code(codec, values, store, seed=step)[1]
            lost[steps] = np.linalg.norm(steps * values - total - store.read("error"))
    # As the root of the number of steps, 2.8 times; a drift would be 8 times.
    assert lost[4000] < 4.5 * lost[500] + 1e-3
    assert lost[4000] / (4000 * np.linalg.norm(values)) < 1e-4


@every_isa
@pytest.mark.parametrize("stochastic", [False, True])
def test_averages_have_the_references_bits(isa: str, stochastic: bool) -> None:
    """LoCo's keep, which the shared tests leave at 0."""
    reference = Int4(Settings(stochastic=stochastic), None, 0.9)
    with codec_of(isa, 0.9, stochastic=stochastic) as codec:
        ours, theirs = fresh(codec, 900), fresh(reference, 900)
        for step in range(6):
            values = normal(900, step) * np.float32(10.0 ** (5 - 2 * step))
            data, _ = code(codec, values, ours, seed=step)
            expected, _ = code(reference, values, theirs, seed=step)
            np.testing.assert_array_equal(data, expected)
            np.testing.assert_array_equal(ours.errors, theirs.errors)
            np.testing.assert_array_equal(ours.exponents, theirs.exponents)


@every_isa
def test_ties_of_opposite_extremes_have_the_references_bits(isa: str) -> None:
    reference = Int4(Settings(), None)
    with codec_of(isa) as codec:
        for seed in range(50):
            generator = np.random.default_rng(seed)
            coefficients = generator.integers(-4, 5, 512 + seed)
            values = unrotate(coefficients).astype(np.float32)
            np.testing.assert_array_equal(code(codec, values)[0], code(reference, values)[0])


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


@every_isa
def test_capacity_is_the_kernels(isa: str) -> None:
    with using(isa) as loaded, codec_of(isa) as codec:
        for count in LENGTHS:
            assert loaded.function("int4_bytes", size_t, size_t)(count) == codec.capacity(count)
