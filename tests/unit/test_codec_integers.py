"""int8 and int8_shared: what their integers are, and what only integer sums can promise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hpcsync import codecs
from hpcsync.codecs import Moment, PieceCodec, Settings, Store, SumCodec
from hpcsync.codecs.int8_shared import LEAST_LEVELS, LEVELS, sized
from hpcsync.errors import HpcsyncError

Floats = NDArray[np.float32]

both_forms = pytest.mark.parametrize("native", [False, True], ids=["numpy", "native"])


def summed(
    codec: SumCodec,
    pieces: Sequence[Floats],
    stores: Sequence[Store | None],
    *,
    order: Sequence[int] | None = None,
    spoil: Any = None,
) -> tuple[list[Floats], list[NDArray[Any]]]:
    """All ranks' results and the summed arrays; ``spoil`` changes the latter before they arrive."""
    ranks, count = len(pieces), pieces[0].shape[0]
    forms = codec.forms(count, [], ranks)
    values = [piece.copy() for piece in pieces]
    arrays = [[np.empty(form.count, form.dtype) for form in forms] for _ in pieces]
    running = [
        codec.rounds(own, mine, [], ranks, ranks, store, Moment(step=7, seed=rank))
        for rank, (own, mine, store) in enumerate(zip(values, arrays, stores, strict=True))
    ]
    totals = []
    for index, form in enumerate(forms):
        assert {next(each) for each in running} == {index}
        total = arrays[(order or range(ranks))[0]][index].copy()
        for rank in (order or range(ranks))[1:]:
            operate = np.maximum if form.op == "max" else np.add
            operate(total, arrays[rank][index], out=total)
        if spoil:
            spoil(index, total)
        totals.append(total)
        for mine in arrays:
            mine[index][:] = total
    for each in running:
        assert next(each, None) is None
    return values, totals


def build(native: bool, **chosen: Any) -> SumCodec:
    made = codecs.build("int8_shared", Settings(**chosen), native=native)
    assert isinstance(made, SumCodec)
    return made


def normal(ranks: int, count: int = 1000) -> list[Floats]:
    return list(np.random.default_rng(ranks).standard_normal((ranks, count), dtype=np.float32))


@both_forms
def test_int8_is_the_nearest_multiple_of_the_scale(native: bool) -> None:
    codec = codecs.build("int8", Settings(), native=native)
    assert isinstance(codec, PieceCodec)
    values = np.random.default_rng(0).standard_normal(600).astype(np.float32)
    out, got = np.empty(codec.capacity(600), np.uint8), np.empty(600, np.float32)
    assert codec.encode(values, out, None, Moment()) == 600 + 3 * 4
    scales = out[:12].view(np.float32)
    blocks = np.split(values, [256, 512])
    np.testing.assert_array_equal(
        scales, [np.abs(block).max() / np.float32(127) for block in blocks]
    )
    numbers = out[12:].view(np.int8)
    exact = values.astype(np.float64) / np.repeat(scales.astype(np.float64), 256)[:600]
    assert np.abs(numbers - exact).max() <= 0.5 + 1e-4
    assert numbers.min() >= -127
    codec.decode(out, got)
    np.testing.assert_array_equal(got, numbers.astype(np.float32) * np.repeat(scales, 256)[:600])


def test_integers_are_wide_enough_for_any_number_of_ranks() -> None:
    for ranks in (1, 2, 3, 4, 5, 258, 259, 1057, 1058, 5000):
        dtype, levels = sized(ranks)
        assert levels * ranks <= np.iinfo(dtype).max
        assert LEAST_LEVELS <= levels <= LEVELS
    assert [sized(ranks) for ranks in (1, 2, 4, 5)] == [
        ("int8", 127),
        ("int8", 63),
        ("int8", 31),
        ("int16", 127),
    ]
    assert sized(1058)[0] == "int32"


@both_forms
@pytest.mark.parametrize("ranks", [2, 4, 5, 300])
def test_the_order_of_the_ranks_does_not_matter(native: bool, ranks: int) -> None:
    codec, pieces = build(native), normal(ranks, 300)
    pieces[0] *= 1e6  # float sums would differ
    none = [None] * ranks
    shuffled = np.random.default_rng(1).permutation(ranks).tolist()
    straight, _ = summed(codec, pieces, none)
    other, _ = summed(codec, pieces, none, order=shuffled)
    for each in (*straight, *other):
        np.testing.assert_array_equal(each.view(np.uint32), straight[0].view(np.uint32))


@both_forms
@pytest.mark.parametrize("ranks", [1, 2, 4, 5, 300, 1100])
def test_extremes_do_not_overflow(native: bool, ranks: int) -> None:
    values = np.full(300, -3.0, np.float32)
    got, (_, numbers) = summed(build(native), [values] * ranks, [None] * ranks)
    dtype, levels = sized(ranks)
    assert numbers.dtype == dtype
    np.testing.assert_array_equal(numbers, -levels * ranks)
    np.testing.assert_allclose(got[0], values, rtol=1e-6)


@both_forms
@pytest.mark.parametrize("ranks", [1, 3, 6])
def test_a_checksum_proves_the_sum(native: bool, ranks: int) -> None:
    codec, pieces = build(native, verify=True), normal(ranks)
    plain, _ = summed(build(native), pieces, [None] * ranks)
    proved, totals = summed(codec, pieces, [None] * ranks)
    np.testing.assert_array_equal(plain[0], proved[0])
    assert len(totals) == 3

    def spoil(index: int, total: NDArray[Any]) -> None:
        if index == 1:
            total[77] += 1

    with pytest.raises(HpcsyncError, match=r"int8_shared: .* 1000 elements fails .* in step 7"):
        summed(codec, pieces, [None] * ranks, spoil=spoil)


@both_forms
def test_native_and_numpy_ranks_may_be_mixed(native: bool) -> None:
    """A rank without a compiler takes part: the checksums are the same."""
    pieces = normal(1)
    one, totals = summed(build(native, verify=True), pieces, [None])
    other, theirs = summed(build(not native, verify=True), pieces, [None])
    np.testing.assert_array_equal(one[0], other[0])
    for mine, its in zip(totals, theirs, strict=True):
        np.testing.assert_array_equal(mine, its)


@both_forms
def test_a_bad_rank_leaves_the_stores_of_its_blocks_as_they_were(native: bool) -> None:
    codec = build(native)
    stores = [codec.store(600, []) for _ in range(2)]
    summed(codec, normal(2, 600), stores)
    before = [store.read("error").copy() for store in stores if store]
    pieces = normal(2, 600)
    pieces[1][300] = np.inf
    got, _ = summed(codec, pieces, stores)
    bad = slice(256, 512)
    for values, store, old in zip(got, stores, before, strict=True):
        assert store
        assert np.isnan(values[bad]).all()
        assert np.isfinite(values[:256]).all()
        assert np.isfinite(values[512:]).all()
        np.testing.assert_array_equal(store.read("error")[bad], old[bad])
        assert (store.read("error")[:256] != old[:256]).any()


@pytest.mark.parametrize("name", ["int8", "fp8", "bf16", "fp16"])
def test_large_pieces_decode_at_any_place(name: str) -> None:
    """They are written past the caches, which wants aligned addresses."""
    codec = codecs.build(name, Settings())
    assert isinstance(codec, PieceCodec)
    count = (4 << 20) // 4 + 77
    values = np.random.default_rng(0).standard_normal(count).astype(np.float32)
    data = np.empty(codec.capacity(count), np.uint8)
    codec.encode(values, data, None, Moment())
    added = np.zeros(count, np.float32)
    codec.decode_add(data, added)
    for offset in (0, 1, 5, 15):
        room = np.full(count + 32, 7.0, np.float32)
        codec.decode(data, room[offset : offset + count])
        np.testing.assert_array_equal(room[offset : offset + count], added)
        assert (room[:offset] == 7.0).all()
        assert (room[offset + count :] == 7.0).all()
