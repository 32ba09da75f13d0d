"""Top-k and threshold: what goes, what stays, and in how many bytes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hpcsync.codecs import sparse_form
from hpcsync.codecs.base import Floats, Moment, Settings
from hpcsync.codecs.sparse import SparseCodec
from hpcsync.codecs.threshold import Threshold
from hpcsync.codecs.topk import TopK
from hpcsync.device import kernels
from hpcsync.device.kernels import empty_bytes
from hpcsync.schedules import chunk_bounds
from tests.sparse import (
    KINDS,
    NATIVE,
    Make,
    clustered,
    constants,
    huge_and_tiny,
    levels,
    normal,
    piece,
)


@pytest.mark.parametrize("codec", [TopK(Settings(), NATIVE), TopK(Settings())])
@pytest.mark.parametrize("make", KINDS)
def test_the_largest_k_go(codec: TopK, make: Make) -> None:
    rng = np.random.default_rng(3)
    values = make(rng, 120_000)
    store = codec.store(values.shape[0], "sender")
    assert store
    decoded = piece(codec, values, store, Moment())
    held = store.read("error")
    went = np.flatnonzero(held != values) if make is not constants else np.flatnonzero(decoded)
    went = np.union1d(went, np.flatnonzero(decoded))
    k = min(codec.most(values.shape[0], 0), np.count_nonzero(values))
    if make is not levels:  # ties that went leave an equal value behind where bf16 is exact
        assert went.shape[0] <= k
    sizes = np.sort(np.abs(values))
    assert np.all(np.abs(values[went]) >= sizes[-k])
    assert abs(np.count_nonzero(decoded) - k) <= 0.05 * k or make is huge_and_tiny
    np.testing.assert_array_equal(decoded + held, values)


@pytest.mark.parametrize("codec", [TopK(Settings(), NATIVE), TopK(Settings())])
def test_ties_do_not_favour_low_indices(codec: TopK) -> None:
    count, rounds = 5000, 400
    values = np.full(count, 0.5, np.float32)
    times = np.zeros(count)
    for seed in range(rounds):
        decoded = piece(codec, values, None, Moment(0, seed * 7919))
        assert np.count_nonzero(decoded) == 50
        # They are spread evenly, not a run of neighbours.
        assert np.diff(np.flatnonzero(decoded)).min() >= 99
        times += decoded != 0
    assert times.sum() == rounds * 50
    halves = times[: count // 2].sum(), times[count // 2 :].sum()
    assert abs(halves[0] - halves[1]) <= 2 * rounds
    assert times.max() <= 4 + 6 * 2  # mean 4, as from a Poisson distribution


@pytest.mark.parametrize("codec", [TopK(Settings(), NATIVE), TopK(Settings())])
def test_repeated_steps_send_everything(codec: TopK) -> None:
    rng = np.random.default_rng(4)
    store = codec.store(3000, "sender")
    assert store
    given, sent = np.zeros(3000), np.zeros(3000)
    for step in range(400):
        values = normal(rng, 3000) + np.float32(0.1)
        given += values
        sent += piece(codec, values, store, Moment(step, step))
    np.testing.assert_allclose(sent + store.read("error"), given, atol=1e-2)
    assert np.abs(store.read("error")).max() < 40  # each element goes in its turn
    assert np.linalg.norm(given - sent) < np.linalg.norm(given)


@pytest.mark.parametrize("kernel", [NATIVE, None])
def test_momentum_is_corrected_and_masked(kernel: kernels.Kernels | None) -> None:
    """The algorithm of DGC, written out."""
    rng = np.random.default_rng(5)
    codec = TopK(Settings(momentum=0.9, ratio=0.1), kernel)
    store = codec.store(500, "sender")
    assert store
    assert store.fields == ("error", "velocity")
    u, v = np.zeros(500, np.float32), np.zeros(500, np.float32)
    for step in range(20):
        g = normal(rng, 500)
        u = np.float32(0.9) * u + g
        v = v + u
        went = np.argsort(-np.abs(v))[:50]
        decoded = piece(codec, g, store, Moment(step, step))
        assert set(np.flatnonzero(decoded)) == set(went)
        np.testing.assert_allclose(decoded[went], v[went], rtol=2.0**-8)
        v[went] -= decoded[went]
        u[went] = 0
        np.testing.assert_array_equal(store.read("error"), v)
        np.testing.assert_array_equal(store.read("velocity"), u)


@pytest.mark.parametrize("kernel", [NATIVE, None])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("make", [TopK, Threshold])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_poison_a_piece_but_not_its_store(
    kernel: kernels.Kernels | None, momentum: float, make: type[SparseCodec], bad: float
) -> None:
    codec = make(Settings(momentum=momentum, threshold=0.5), kernel)
    store = codec.store(3000, "sender")
    assert store
    values = normal(np.random.default_rng(6), 3000)
    piece(codec, values, store, Moment())
    before = {name: store.read(name).copy() for name in store.fields}
    values[1717] = bad
    decoded = piece(codec, values, store, Moment(1, 1))
    assert np.isnan(decoded).all()
    for name, old in before.items():
        assert np.isfinite(store.read(name)).all()
        assert store.read(name)[1717] == old[1717]
    total = np.ones(3000, np.float32)
    out = empty_bytes(codec.capacity(3000))
    codec.decode_add(out[: codec.encode(values, out, None, Moment())], total)
    assert np.isnan(total).all()
    owner = codec.store(3000, "owner")
    used = codec.combine(values, 0, [], 2, out, owner, Moment())
    assert used == sparse_form.HEADER
    assert np.isnan(values).all()
    assert owner
    assert all(np.isfinite(owner.read(name)).all() for name in owner.fields)


def test_sums_that_overflow_poison_a_piece() -> None:
    for kernel in (NATIVE, None):
        codec = TopK(Settings(ratio=0.01), kernel)
        store = codec.store(400, "sender")
        assert store
        values = np.full(400, 3e38, np.float32)
        assert np.isfinite(piece(codec, values, store, Moment())).all()
        assert np.isnan(piece(codec, values, store, Moment(1))).all()
        assert np.isfinite(store.read("error")).all()


@pytest.mark.parametrize("entries", [0, 1, 3, 40, 300, 1000, 9000, 60_000, 65_537, 93_000, 99_999])
@pytest.mark.parametrize("together", [False, True])
def test_every_kind_of_index_comes_back(entries: int, together: bool) -> None:
    rng = np.random.default_rng(entries)
    count = 100_000
    values = np.zeros(count, np.float32)
    places = np.arange(entries) + 11 if together else rng.permutation(count)[:entries]
    values[places % count] = sparse_form.from_bf16(
        rng.integers(0x3F00, 0x3FFF, entries).astype(np.uint16)
    )
    for kernel in (NATIVE, None):
        codec = Threshold(Settings(threshold=1e-3), kernel)
        out = empty_bytes(codec.capacity(count))
        used = codec.encode(values, out, None, Moment())
        decoded = np.empty_like(values)
        codec.decode(out[:used], decoded)
        np.testing.assert_array_equal(decoded, values)
        np.testing.assert_array_equal(2 * values, _added(codec, out[:used], values))
        full = together and entries >= 2 * sparse_form.SMALL
        assert used == sparse_form.most_bytes(count, entries, full=full)
        assert used <= sparse_form.HEADER + 2 * count


def _added(codec: SparseCodec, data: np.ndarray, values: Floats) -> Floats:
    total = values.copy()
    codec.decode_add(data, total)
    return total


def test_dense_pieces_leave_their_rounding_behind() -> None:
    values = normal(np.random.default_rng(7), 1000)
    for kernel in (NATIVE, None):
        codec = Threshold(Settings(threshold=1e-9), kernel)
        store = codec.store(1000, "sender")
        assert store
        decoded = piece(codec, values, store, Moment())
        np.testing.assert_array_equal(decoded + store.read("error"), values)
        assert 0 < np.abs(store.read("error")).max() < 0.01


@pytest.mark.parametrize("count", [1, 100, 10_000, 262_144, 1_000_000])
@pytest.mark.parametrize("ratio", [0.001, 0.01, 0.1, 1.0])
def test_capacity_holds_the_worst_and_expected_the_usual(count: int, ratio: float) -> None:
    rng = np.random.default_rng(8)
    codec = TopK(Settings(ratio=ratio, ratio_warmup=5), NATIVE)
    out = empty_bytes(codec.capacity(count))
    used = [codec.encode(normal(rng, count), out, None, Moment(step)) for step in (0, 3, 9)]
    assert used[0] >= used[1] >= used[2]
    assert max(used) <= codec.capacity(count)
    store = codec.store(count, "owner")
    mean = codec.combine(normal(rng, count), 0, [], 2, out, store, Moment(9))
    assert mean <= codec.capacity(count)
    assert (used[2] + mean) / 2 == pytest.approx(codec.expected(count), rel=0.05)


def test_one_percent_takes_at_most_four_bytes_an_entry() -> None:
    count = 262_144
    for make in (normal, clustered):
        codec = TopK(Settings(), NATIVE)
        out = empty_bytes(codec.capacity(count))
        used = codec.encode(make(np.random.default_rng(9), count), out, None, Moment())
        assert used <= 4.01 * codec.most(count, 0)
    # A sum over two nodes: each pass carries half of the elements, as float32's does.
    assert codec.expected(count) <= 0.025 * 4 * count


def test_an_owner_sends_four_times_as_many_of_the_mean() -> None:
    codec = TopK(Settings(), NATIVE)
    values = normal(np.random.default_rng(10), 100_000)
    store, out = codec.store(100_000, "owner"), empty_bytes(codec.capacity(100_000))
    codec.combine(values, 0, [], 2, out, store, Moment())
    assert np.count_nonzero(values) == 4000


def test_the_share_warms_up() -> None:
    codec = TopK(Settings(ratio=0.01, ratio_warmup=100))
    shares = [codec.share(step) for step in range(120)]
    assert shares[0] == 0.25
    assert shares[50] == pytest.approx(0.05)
    assert shares[100:] == [0.01] * 20
    assert all(left >= right for left, right in itertools.pairwise(shares))
    assert TopK(Settings(ratio=0.5, ratio_warmup=100)).share(0) == 0.5


def test_owners_are_balanced_whatever_the_gradient() -> None:
    """Segments are cut into equal parts, one an owner, and each part sends its own k."""
    ranks, segment = 4, 1 << 15
    count = 9 * segment + 1234
    values = normal(np.random.default_rng(10), count)
    values *= np.exp(-np.arange(count) / 2e4).astype(np.float32)  # all that is large comes first
    for codec in (TopK(Settings(), NATIVE), TopK(Settings())):
        entries = np.zeros(ranks)
        for start in range(0, count, segment):
            part = values[start : start + segment]
            bounds = chunk_bounds(part.shape[0], ranks, codec.block)
            for owner in range(ranks):
                own = part[bounds[owner] : bounds[owner + 1]]
                entries[owner] += np.count_nonzero(piece(codec, own, None, Moment()))
        assert entries.max() <= 1.03 * entries.min()


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_the_owner_sends_the_largest_of_the_mean_and_keeps_the_rest(place: int) -> None:
    rng = np.random.default_rng(11)
    for kernel in (NATIVE, None):
        codec = TopK(Settings(ratio=0.05), kernel)
        others = []
        decoded = []
        for _ in range(3):
            out = empty_bytes(codec.capacity(2000))
            others.append(out[: codec.encode(normal(rng, 2000), out, None, Moment())])
            decoded.append(np.empty(2000, np.float32))
            codec.decode(others[-1], decoded[-1])
        own = normal(rng, 2000)
        ordered = [*decoded[:place], own.copy(), *decoded[place:]]
        total = ordered[0].copy()
        for each in ordered[1:]:
            total += each
        total *= np.float32(0.25)
        store = codec.store(2000, "owner")
        assert store
        out = empty_bytes(codec.capacity(2000))
        codec.combine(own, place, others, 4, out, store, Moment())
        assert np.count_nonzero(own) == 400
        np.testing.assert_array_equal(own + store.read("error"), total)
        assert np.abs(own[own != 0]).min() >= np.abs(store.read("error")).max() * (1 - 2**-8)
