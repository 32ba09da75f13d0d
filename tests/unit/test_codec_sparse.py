"""Top-k, threshold and random-k: what goes, what stays, and in how many bytes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcsync.codecs import sparse_form
from hpcsync.codecs.base import Floats, Moment, Settings, Store
from hpcsync.codecs.randomk import GROUP, RandomK, picked
from hpcsync.codecs.rounding import random_at
from hpcsync.codecs.sparse import SparseCodec
from hpcsync.codecs.threshold import Threshold
from hpcsync.codecs.topk import TopK
from hpcsync.device import kernels
from hpcsync.device.kernels import empty_bytes
from hpcsync.schedules import chunk_bounds

NATIVE = kernels.load()
ISAS = ["plain", "avx2", "avx512"]


@pytest.fixture(params=ISAS)
def native(request: pytest.FixtureRequest) -> Iterator[kernels.Kernels]:
    """The kernels, with each instruction set that the processor has."""
    if NATIVE is None:
        pytest.skip("needs the native kernels (a C++ compiler when hpcsync is installed)")
    before = NATIVE.isa
    if not NATIVE.use_isa(request.param):
        pytest.skip(f"needs a processor with {request.param}")
    yield NATIVE
    NATIVE.use_isa(before)


def normal(rng: np.random.Generator, count: int) -> Floats:
    return rng.standard_normal(count).astype(np.float32)


def heavy(rng: np.random.Generator, count: int) -> Floats:
    return rng.standard_cauchy(count).astype(np.float32)


def mostly_zeros(rng: np.random.Generator, count: int) -> Floats:
    return normal(rng, count) * (rng.random(count) < 0.015).astype(np.float32)


def few(rng: np.random.Generator, count: int) -> Floats:
    return normal(rng, count) * (rng.random(count) < 0.002).astype(np.float32)


def constants(rng: np.random.Generator, count: int) -> Floats:
    return np.full(count, -0.25, np.float32)


def levels(rng: np.random.Generator, count: int) -> Floats:
    """Many ties at every magnitude, as values that were rounded coarsely have."""
    return np.round(normal(rng, count) * 4) / 4


def clustered(rng: np.random.Generator, count: int) -> Floats:
    """All that is large stands together, so that blocks of indices are full."""
    values = normal(rng, count) * np.float32(1e-3)
    values[count // 3 : count // 3 + count // 80] += 5.0
    return values


def huge_and_tiny(rng: np.random.Generator, count: int) -> Floats:
    power = rng.uniform(-45, 38, count)
    return (np.sign(normal(rng, count)) * 10.0**power).astype(np.float32)


Make = Callable[[np.random.Generator, int], Floats]
KINDS: list[Make] = [normal, heavy, mostly_zeros, few, constants, levels, clustered, huge_and_tiny]
LENGTHS = [0, 1, 2, 7, 15, 16, 17, 255, 256, 257, 511, 1023, 1024, 1025, 4099, 65537]


def piece(codec: SparseCodec, values: Floats, store: Store | None, moment: Moment) -> Floats:
    """What a coded piece decodes to."""
    out = empty_bytes(codec.capacity(values.shape[0]))
    used = codec.encode(values, out, store, moment)
    assert used <= out.shape[0]
    decoded = np.full_like(values, 7.0)
    codec.decode(out[:used], decoded)
    return decoded


def same(left: Floats, right: Floats) -> None:
    assert left.dtype == right.dtype
    np.testing.assert_array_equal(left.view(np.uint8), right.view(np.uint8))


def compare(
    one: SparseCodec, other: SparseCodec, batches: list[Floats], divisor: int = 3, place: int = 1
) -> None:
    """Codes the same steps with both, as sender and as owner, and compares all bits."""
    count = batches[0].shape[0]
    pairs = [(codec, codec.store(count, "sender"), codec.store(count, "owner"))
             for codec in (one, other)]  # fmt: skip
    for step, values in enumerate(batches):
        results = []
        for codec, sender, owner in pairs:
            moment = Moment(step, 1000 + step, 5)
            out, mean = (empty_bytes(codec.capacity(count)) for _ in range(2))
            used = codec.encode(values, out, sender, moment)
            own = values[::-1].copy()
            final = codec.combine(own, place, [out[:used]] * 3, divisor, mean, owner, moment)
            stores = [each.read(name) for each in (sender, owner) if each for name in each.fields]
            results.append([out[:used], mean[:final], own, *stores])
        for left, right in zip(*results, strict=True):
            same(left, right)
            assert left.dtype == np.uint8 or np.isfinite(left).all() or left is results[0][2]


VARIANTS = [
    Settings(),
    Settings(error_feedback=False),
    Settings(momentum=0.9),
    Settings(ratio=0.3),
    Settings(ratio=0.001, ratio_warmup=2),
    Settings(ratio=1.0),
]


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_top_k_has_the_bits_of_its_reference(
    native: kernels.Kernels, make: Make, variant: int
) -> None:
    rng = np.random.default_rng(variant)
    chosen = VARIANTS[variant]
    for count in LENGTHS:
        batches = [make(rng, count) for _ in range(3)]
        compare(TopK(chosen, native), TopK(chosen), batches, place=variant % 4)


@pytest.mark.parametrize("make", KINDS)
def test_large_pieces_have_the_bits_of_the_reference(native: kernels.Kernels, make: Make) -> None:
    rng = np.random.default_rng(2)
    compare(TopK(Settings(), native), TopK(Settings()), [make(rng, 300_001) for _ in range(3)])


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize(("limit", "momentum"), [(1e-30, 0.5), (0.3, 0.0), (2.5, 0.5), (1e30, 0.0)])
def test_threshold_has_the_bits_of_its_reference(
    native: kernels.Kernels, make: Make, limit: float, momentum: float
) -> None:
    rng = np.random.default_rng(1)
    chosen = Settings(threshold=limit, momentum=momentum, error_feedback=limit < 1)
    for count in LENGTHS:
        batches = [make(rng, count) for _ in range(2)]
        compare(Threshold(chosen, native), Threshold(chosen), batches, divisor=4)


@pytest.mark.parametrize("sampled", [9.0, 0.0])
def test_a_sample_that_misleads_changes_nothing(native: kernels.Kernels, sampled: float) -> None:
    """Where the kernel looks first, all is large and the rest small, or the other way round."""
    count, seed, runs = 1 << 20, 1000, 1024
    stride = count // runs
    jitter = random_at(seed, np.arange(1, runs + 1)).astype(np.int64) * (stride - 7) >> 32
    places = (np.arange(runs) * stride + jitter)[:, None] + np.arange(8)
    values = normal(np.random.default_rng(14), count)
    values[places.ravel()] = sampled * values[places.ravel()] + sampled
    compare(TopK(Settings(), native), TopK(Settings()), [values])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), max_size=700),
    st.sampled_from([0.0, 0.9]),
    st.floats(0.001, 1.0),
    st.booleans(),
)
def test_any_values_have_the_bits_of_the_reference(
    listed: list[float], momentum: float, ratio: float, feedback: bool
) -> None:
    if NATIVE is None:
        pytest.skip("needs the native kernels (a C++ compiler when hpcsync is installed)")
    values = np.array(listed, np.float32)
    chosen = Settings(momentum=momentum, ratio=ratio, error_feedback=feedback, threshold=1e-3)
    for make in (TopK, Threshold):
        batches = [np.nan_to_num(values, posinf=3e38, neginf=-3e38) / 9, values, -values]
        stores = [make(chosen, each).store(values.shape[0], "sender") for each in (NATIVE, None)]
        for step, batch in enumerate(batches):
            coded = []
            for codec, store in zip((make(chosen, NATIVE), make(chosen)), stores, strict=True):
                out = empty_bytes(codec.capacity(batch.shape[0]))
                coded.append(out[: codec.encode(batch, out, store, Moment(step, step))])
            same(coded[0], coded[1])
            if stores[0] and stores[1]:
                for name in stores[0].fields:
                    same(stores[0].read(name), stores[1].read(name))


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


# ---- random-k ----------------------------------------------------------------------------------


def exchange(
    codecs: list[RandomK], gradients: list[Floats], stores: list[Store | None], moment: Moment
) -> list[Floats]:
    """One exchange among as many ranks as there are codecs; their results."""
    ranks, count = len(codecs), gradients[0].shape[0]
    forms = [codec.forms(count, [], ranks) for codec in codecs]
    arrays = [[np.full(form.count, 9, form.dtype) for form in each] for each in forms]
    results = [gradient.copy() for gradient in gradients]
    every = [
        codec.rounds(values, made, [], ranks, ranks, store, dataclasses.replace(moment, seed=rank))
        for rank, (codec, values, made, store) in enumerate(
            zip(codecs, results, arrays, stores, strict=True)
        )
    ]
    for rounds in every:
        assert next(rounds) == 0
    with np.errstate(all="ignore"):
        total = np.sum([made[0] for made in arrays], axis=0, dtype=np.float32)
    for rounds, made in zip(every, arrays, strict=True):
        made[0][:] = total
        assert next(rounds, None) is None
    return results


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("ratio", [0.001, 0.07, 1.0])
def test_random_k_has_the_bits_of_its_reference(
    native: kernels.Kernels, feedback: bool, ratio: float
) -> None:
    rng = np.random.default_rng(12)
    chosen = Settings(error_feedback=feedback, ratio=ratio)
    for count in LENGTHS:
        codecs = [RandomK(chosen, native), RandomK(chosen), RandomK(chosen, native)]
        stores = [codec.store(count, []) for codec in codecs]
        for step in range(3):
            same_gradient = huge_and_tiny(rng, count)
            gradients = [same_gradient, same_gradient, normal(rng, count)]
            results = exchange(codecs, gradients, stores, Moment(step, 0, step * 77))
            same(results[0], results[1])
            same(results[0], results[2])
            if stores[0] and stores[1]:
                same(stores[0].read("error"), stores[1].read("error"))


@pytest.mark.parametrize("kernel", [NATIVE, None])
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_random_k_carries_nan_that_was_not_picked(
    kernel: kernels.Kernels | None, feedback: bool, bad: float
) -> None:
    codecs = [RandomK(Settings(error_feedback=feedback), kernel) for _ in range(2)]
    gradients = [normal(np.random.default_rng(rank), 5000) for rank in range(2)]
    gradients[1][4000] = bad
    stores = [codec.store(5000, []) for codec in codecs]
    for result in exchange(codecs, gradients, stores, Moment(0, 0, 3)):
        assert np.isnan(result).all()
    for store in stores:
        assert store is None or np.isfinite(store.read("error")).all()


def test_random_k_sends_everything_in_time() -> None:
    rng = np.random.default_rng(13)
    codecs = [RandomK(Settings(ratio=0.1), NATIVE) for _ in range(2)]
    stores = [codec.store(1000, []) for codec in codecs]
    given, sent = np.zeros(1000), np.zeros(1000)
    for step in range(200):
        gradients = [normal(rng, 1000) for _ in codecs]
        given += (gradients[0] + gradients[1]) / 2
        sent += exchange(codecs, gradients, stores, Moment(step, 0, step))[0]
    held = sum((store.read("error") for store in stores if store), np.zeros(1000)) / 2
    np.testing.assert_allclose(sent + held, given, atol=1e-3)


def test_random_k_without_memory_is_unbiased() -> None:
    count, rounds = 333, 4000
    gradient = np.arange(1, count + 1, dtype=np.float32)
    codec = RandomK(Settings(ratio=0.2, error_feedback=False), NATIVE)
    mean = np.zeros(count)
    for step in range(rounds):
        mean += exchange([codec], [gradient], [None], Moment(0, 0, step))[0] / rounds
    # A group goes with p = 4/21, so the mean's relative deviation is sqrt((1 - p) / p / rounds).
    assert np.abs(mean / gradient - 1).max() < 4.5 * np.sqrt(17 / 4 / rounds)


@pytest.mark.parametrize(("groups", "wanted"), [(1, 1), (7, 7), (100, 1), (100, 3), (1000, 10)])
def test_groups_are_different_and_equally_likely(groups: int, wanted: int) -> None:
    rounds = 3000
    times = np.zeros(groups)
    for seed in range(rounds):
        places = picked(groups, wanted, seed)
        assert np.unique(places).shape[0] == wanted
        times[places] += 1
    p = wanted / groups
    assert np.abs(times / rounds - p).max() <= 5.5 * np.sqrt(p * (1 - p) / rounds)


def test_random_k_has_whole_groups_and_one_number_more() -> None:
    codec = RandomK(Settings())
    assert [form.count for form in codec.forms(160_000, [], 4)] == [100 * GROUP + 1]
    assert [form.count for form in codec.forms(1, [], 4)] == [GROUP + 1]
    assert [form.count for form in codec.forms(0, [], 4)] == [0]
