"""PowerSGD: against the paper's algorithm in float64, torch's maths, and bit for bit by kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

from hpcsync.codecs import Matrix, Moment, Settings, Store
from hpcsync.codecs.factors import Factors, NativeFactors
from hpcsync.codecs.powersgd import PowerSGD, check, gains, lay_out
from hpcsync.device import kernels
from tests.isas import every_isa, using

Floats = NDArray[np.float32]
NATIVE = kernels.load()
FORMS = [pytest.param(None, id="numpy")]
FORMS += [] if NATIVE is None else [pytest.param(NATIVE, id="native")]
SHAPES = [(1, 1), (1, 3), (3, 1), (2, 16), (5, 17), (31, 15), (33, 64), (64, 80), (70, 131)]


def codec(rank: int, native: Any = NATIVE, **settings: Any) -> PowerSGD:
    return PowerSGD(Settings(rank=rank, **settings), native)


def exchange(
    coder: PowerSGD,
    pieces: Sequence[Floats],
    matrices: Sequence[Matrix],
    stores: Sequence[Store | None],
    step: int = 0,
) -> list[Floats]:
    """One exchange of all ranks in lockstep; what each rank has in the end."""
    ranks = len(pieces)
    values = [piece.copy() for piece in pieces]
    forms = coder.forms(values[0].shape[0], matrices, ranks)
    arrays = [[np.full(form.count, np.nan, np.float32) for form in forms] for _ in values]
    running: list[Iterator[int]] = [
        coder.rounds(own, mine, matrices, ranks, ranks, store, Moment(step=step))
        for own, mine, store in zip(values, arrays, stores, strict=True)
    ]
    with np.errstate(all="ignore"):
        for index in range(len(forms)):
            assert {next(each) for each in running} == {index}
            total = np.sum([mine[index] for mine in arrays], axis=0, dtype=np.float32)
            for mine in arrays:
                mine[index][:] = total
        for each in running:
            assert next(each, None) is None
    return values


def one(rows: int, columns: int) -> list[Matrix]:
    return [Matrix(0, (rows, columns))]


def stores_of(
    coder: PowerSGD, count: int, matrices: Sequence[Matrix], ranks: int
) -> list[Store | None]:
    return [coder.store(count, matrices) for _ in range(ranks)]


def gradients(seed: int, ranks: int, *shape: int) -> list[Floats]:
    made = np.random.default_rng(seed)
    return [made.standard_normal(shape).astype(np.float32) for _ in range(ranks)]


def first_q(coder: PowerSGD, columns: int) -> NDArray[np.float64]:
    """The random Q of a fresh store, columns x rank."""
    q = np.zeros((coder.rank, columns), np.float32)
    coder._renew(q)
    return q.T.astype(np.float64)


# --- against other forms ------------------------------------------------------------------------


def paper(
    steps: Sequence[Sequence[Floats]], q: NDArray[np.float64]
) -> Iterator[NDArray[np.float64]]:
    """Algorithms 1 and 2 of the paper in float64: what each step decodes to."""
    errors = [np.zeros(m.shape) for m in steps[0]]
    for gradient in steps:
        deltas = [g + e for g, e in zip(gradient, errors, strict=True)]
        p = np.mean([delta @ q for delta in deltas], axis=0)
        p, _ = np.linalg.qr(p)
        own = [delta.T @ p for delta in deltas]
        q = np.mean(own, axis=0)
        errors = [delta - p @ each.T for delta, each in zip(deltas, own, strict=True)]
        yield p @ q.T


@pytest.mark.parametrize("native", FORMS)
@pytest.mark.parametrize("rank", [1, 2, 4, 5])
def test_steps_are_those_of_the_paper(native: Any, rank: int) -> None:
    coder, shape, ranks = codec(rank, native, seed=3), (40, 70), 3
    steps = [gradients(step, ranks, *shape) for step in range(6)]
    stores = stores_of(coder, 2800, one(*shape), ranks)
    expected = paper(steps, first_q(coder, 70))
    for step, gradient in enumerate(steps):
        pieces = [g.reshape(-1) for g in gradient]
        found = exchange(coder, pieces, one(*shape), stores, step)
        for other in found[1:]:
            np.testing.assert_array_equal(found[0], other)
        np.testing.assert_allclose(
            found[0].reshape(shape), next(expected), rtol=0, atol=2e-4 * np.sqrt(step + 1)
        )


@pytest.mark.parametrize("rank", [2, 4])
def test_steps_are_those_of_torch(rank: int) -> None:
    coder, shape, ranks = codec(rank), (48, 64), 2
    stores = stores_of(coder, 3072, one(*shape), ranks)
    q = torch.from_numpy(first_q(coder, 64)).unsqueeze(0)
    errors = [torch.zeros(1, *shape, dtype=torch.float64) for _ in range(ranks)]
    for step in range(5):
        gradient = gradients(step, ranks, *shape)
        found = exchange(coder, [g.reshape(-1) for g in gradient], one(*shape), stores, step)
        # As torch's hook has it: the error is less what all ranks decoded.
        deltas = [torch.from_numpy(g) + e for g, e in zip(gradient, errors, strict=True)]
        p = sum(torch.bmm(delta, q) for delta in deltas)
        powerSGD_hook._orthogonalize(p, 1e-8)
        q = sum(torch.bmm(delta.transpose(1, 2), p) for delta in deltas) / ranks
        decoded = torch.bmm(p, q.transpose(1, 2))
        errors = [delta - decoded for delta in deltas]
        powerSGD_hook._orthogonalize(q, 1e-8)
        np.testing.assert_allclose(found[0].reshape(shape), decoded[0], rtol=0, atol=1e-3)


@every_isa
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 4, 9])
def test_kernels_have_the_bits_of_numpy(isa: str, shape: tuple[int, int], rank: int) -> None:
    with using(isa) as native:
        made = np.random.default_rng(rank)
        scales = np.float32(10.0) ** made.integers(-30, 18, shape).astype(np.float32)
        m = made.standard_normal(shape).astype(np.float32) * scales
        error = m[::-1].copy()
        p, own, mean = (
            made.standard_normal((rank, size)).astype(np.float32)
            for size in (shape[0], shape[1], shape[1])
        )
        results = []
        for maths in (Factors(), NativeFactors(native)):
            work, left = m.copy(), error.copy()
            rows = np.full((rank, shape[0]), np.nan, np.float32)
            columns = np.full((rank, shape[1]), np.nan, np.float32)
            maths.rows(work, left, own, rows)
            maths.columns(work, p, columns)
            summed = work.copy()
            maths.apply(work, left, p, own, mean)
            unkept = summed.copy()
            maths.apply(unkept, None, p, own, mean)
            basis = mean.copy()
            basis[rank // 2] = basis[0]
            maths.orthogonalise(basis)
            results.append([rows, columns, summed, work, left, unkept, basis])
        for reference, found in zip(*results, strict=True):
            np.testing.assert_array_equal(reference.view(np.uint32), found.view(np.uint32))


# --- orthonormal factors ------------------------------------------------------------------------


@pytest.mark.parametrize("native", FORMS)
@pytest.mark.parametrize("scale", [1e-38, 1e-12, 1.0, 1e18, 1e38])
def test_rows_become_orthonormal_at_any_scale(native: Any, scale: float) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (6, 500)).astype(np.float32) * np.float32(scale)
    x[4] = x[0] + x[1] * np.float32(1e-6)  # nearly dependent
    codec(1, native)._maths.orthogonalise(x)
    product = x.astype(np.float64) @ x.T.astype(np.float64)
    np.testing.assert_allclose(product, np.eye(6), atol=1e-6)


@pytest.mark.parametrize("native", FORMS)
def test_dependent_rows_give_no_nan(native: Any) -> None:
    maths = codec(1, native)._maths
    zero = np.zeros((3, 40), np.float32)
    maths.orthogonalise(zero)
    assert not zero.any()
    same = np.ones((3, 40), np.float32)
    maths.orthogonalise(same)
    assert np.isfinite(same).all()
    span = same.astype(np.float64)
    values = np.linalg.eigvalsh(span @ span.T)
    assert values.max() < 1 + 1e-6


@pytest.mark.parametrize("native", FORMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_orthogonalising_hides_nothing(native: Any, bad: float) -> None:
    x = np.ones((2, 40), np.float32)
    x[0, 3] = bad
    with np.errstate(all="ignore"):
        codec(1, native)._maths.orthogonalise(x)
    assert np.isnan(x).any()


# --- what comes out -----------------------------------------------------------------------------


@pytest.mark.parametrize("native", FORMS)
@pytest.mark.parametrize("true_rank", [1, 3])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e15])
def test_a_matrix_of_low_rank_comes_out_whole(native: Any, true_rank: int, scale: float) -> None:
    made = np.random.default_rng(5)
    pieces = []
    right = made.standard_normal((true_rank, 90))
    for _ in range(2):
        m = made.standard_normal((60, true_rank)) @ right * scale
        pieces.append(m.astype(np.float32).reshape(-1))
    coder = codec(4, native)
    stores = stores_of(coder, 5400, one(60, 90), 2)
    found = exchange(coder, pieces, one(60, 90), stores)
    mean = (pieces[0].astype(np.float64) + pieces[1]) / 2
    np.testing.assert_allclose(found[0], mean, rtol=0, atol=2e-6 * np.abs(mean).max())


@pytest.mark.parametrize("native", FORMS)
def test_the_sum_of_steps_tends_to_the_sum_of_inputs(native: Any) -> None:
    coder, ranks, count = codec(2, native), 3, 30 * 44
    matrices = one(30, 44)
    stores = stores_of(coder, count, matrices, ranks)
    given, came = np.zeros(count), np.zeros(count)
    for step in range(40):
        pieces = [g.reshape(-1) for g in gradients(step, ranks, 30, 44)]
        given += np.mean(pieces, axis=0, dtype=np.float64)
        came += exchange(coder, pieces, matrices, stores, step)[0]
    left = np.mean([store.read("error") for store in stores if store], axis=0, dtype=np.float64)
    np.testing.assert_allclose(came + left, given, atol=1e-4)


def test_errors_of_single_ranks_stay_bounded() -> None:
    coder, matrices = codec(2), one(30, 44)
    stores = stores_of(coder, 1320, matrices, 2)
    shared, apart = gradients(1, 2, 1320)
    sizes = []
    for step in range(200):
        # Each rank's gradient differs from the mean, always in the same way.
        exchange(coder, [shared + 9 * apart, shared - 9 * apart], matrices, stores, step)
        assert stores[0] is not None
        sizes.append(float(np.linalg.norm(stores[0].read("error"))))
    assert sizes[-1] < 2 * max(sizes[:50])


@pytest.mark.parametrize("native", FORMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 777, 2000, 2399, 2405, 2449])
def test_nan_and_inf_come_out_on_all_ranks(native: Any, bad: float, place: int) -> None:
    matrices = [Matrix(0, (40, 60)), Matrix(2400, (50,))]
    coder = codec(3, native)
    stores = stores_of(coder, 2450, matrices, 2)
    pieces = gradients(1, 2, 2450)
    exchange(coder, pieces, matrices, stores)
    before = [store.read("error").copy() for store in stores if store]
    spoilt = [pieces[0].copy(), pieces[1]]
    spoilt[0][place] = bad
    for found in exchange(coder, spoilt, matrices, stores, 1):
        assert not np.isfinite(found).all()
        if place < 2400:
            assert np.isnan(found[:2400]).all()
            assert np.isfinite(found[2400:]).all()
    for store, old in zip(stores, before, strict=True):
        assert store is not None
        for field in store.fields:
            assert np.isfinite(store.read(field)).all()
        if place < 2400:
            np.testing.assert_array_equal(store.read("error"), old)
    for found in exchange(coder, pieces, matrices, stores, 2):
        assert np.isfinite(found).all()


@pytest.mark.parametrize("native", FORMS)
def test_sums_that_overflow_are_not_hidden(native: Any) -> None:
    coder = codec(2, native)
    stores = stores_of(coder, 2400, one(40, 60), 2)
    pieces = [np.full(2400, 3e38, np.float32)] * 2
    for found in exchange(coder, pieces, one(40, 60), stores):
        assert np.isnan(found).all()
    assert all(np.isfinite(store.read("error")).all() for store in stores if store)


@pytest.mark.parametrize("native", FORMS)
def test_large_numbers_leave_a_finite_error(native: Any) -> None:
    coder = codec(2, native)
    stores = stores_of(coder, 2400, one(40, 60), 2)
    pieces = [each * np.float32(1e35) for each in gradients(1, 2, 2400)]
    for found in exchange(coder, pieces, one(40, 60), stores):
        assert np.isfinite(found).all()
    assert all(np.isfinite(store.read("error")).all() for store in stores if store)
    assert stores[0] is not None
    assert stores[0].read("error").any()


@pytest.mark.parametrize("native", FORMS)
def test_gradients_of_zero_do_not_stop_later_ones(native: Any) -> None:
    coder, matrices = codec(2, native), one(40, 60)
    stores = stores_of(coder, 2400, matrices, 2)
    for step in range(2):
        for found in exchange(coder, [np.zeros(2400, np.float32)] * 2, matrices, stores, step):
            assert not found.any()
    left, right = gradients(4, 1, 40, 1)[0], gradients(5, 1, 1, 60)[0]
    rank_one = (left * right).reshape(-1)
    found = exchange(coder, [rank_one, rank_one], matrices, stores, 2)[0]
    np.testing.assert_allclose(found, rank_one, atol=1e-5)


# --- pieces -------------------------------------------------------------------------------------


def test_what_gains_little_goes_uncoded_and_exactly() -> None:
    # A vector, a gap, two matrices, one too thin, a tensor of four dimensions, and a tail.
    matrices = [
        *(Matrix(0, (70,)), Matrix(96, (40, 50)), Matrix(2096, (300, 4))),
        *(Matrix(3296, (16, 4, 3, 3)), Matrix(3872, (64, 64))),
    ]
    count = 3872 + 4096 + 5
    coder = codec(3)
    layout = lay_out(count, matrices, 3)
    assert [each.start for each in layout.coded] == [96, 3296, 3872]
    assert layout.uncoded == ((0, 96), (2096, 3296), (count - 5, count))
    assert [(each.rows, each.columns) for each in layout.coded] == [(40, 50), (16, 36), (64, 64)]
    assert layout.sizes == (96 + 1200 + 5 + 3 * 120, 3 * 150)
    assert [form.count for form in coder.forms(count, matrices, 2)] == list(layout.sizes)
    pieces = gradients(2, 2, count)
    stores = stores_of(coder, count, matrices, 2)
    found = exchange(coder, pieces, matrices, stores)[0]
    mean = (pieces[0] + pieces[1]) / np.float32(2)
    for low, high in layout.uncoded:
        np.testing.assert_array_equal(found[low:high], mean[low:high])
    assert not np.array_equal(found[96:2096], mean[96:2096])


def test_pieces_without_a_matrix_need_one_round() -> None:
    coder, matrices = codec(4), [Matrix(0, (100,))]
    assert [form.count for form in coder.forms(100, matrices, 2)] == [100]
    pieces = gradients(3, 2, 100)
    found = exchange(coder, pieces, matrices, stores_of(coder, 100, matrices, 2))
    np.testing.assert_array_equal(found[0], (pieces[0] + pieces[1]) / np.float32(2))
    assert [form.count for form in coder.forms(0, [], 2)] == [0]
    exchange(coder, [np.empty(0, np.float32)] * 2, [], stores_of(coder, 0, [], 2))


def test_without_error_feedback_nothing_is_added() -> None:
    coder, matrices = codec(2, error_feedback=False), one(40, 60)
    stores = stores_of(coder, 2400, matrices, 2)
    assert stores[0] is not None
    assert stores[0].fields == ("q",)
    pieces = gradients(1, 2, 2400)
    for step in range(200):
        found = exchange(coder, pieces, matrices, stores, step)[0]
    # With the warm start the steps tend to the best approximation of this rank.
    left, values, right = np.linalg.svd(np.mean(pieces, axis=0, dtype=np.float64).reshape(40, 60))
    best = left[:, :2] * values[:2] @ right[:2]
    lost = np.linalg.norm(found.reshape(40, 60) - best) / np.linalg.norm(best)
    assert lost < 0.05


def test_stores_move_with_their_parameter() -> None:
    coder = codec(3)
    here = [Matrix(0, (40, 60)), Matrix(2400, (64, 50))]
    there = [Matrix(0, (64, 50)), Matrix(3264, (40, 60))]
    moves = [(0, 3264, 2400), (2400, 0, 3200)]  # from, to, elements
    pieces = gradients(1, 2, 5600)
    stores = stores_of(coder, 5600, here, 2)
    for step in range(3):
        exchange(coder, pieces, here, stores, step)
    moved = stores_of(coder, 5664, there, 2)
    for old, new in zip(stores, moved, strict=True):
        assert old is not None
        assert new is not None
        for field in old.fields:
            values = np.zeros(5664, np.float32)
            for source, target, size in moves:
                values[target : target + size] = old.read(field)[source : source + size]
            new.write(field, values)
            np.testing.assert_array_equal(new.read(field), values)
    laid_out = [np.zeros(5664, np.float32) for _ in pieces]
    for piece, anew in zip(pieces, laid_out, strict=True):
        for source, target, size in moves:
            anew[target : target + size] = piece[source : source + size]
    first = exchange(coder, pieces, here, stores, 3)[0]
    second = exchange(coder, laid_out, there, moved, 3)[0]
    for source, target, size in moves:
        np.testing.assert_array_equal(first[source : source + size], second[target : target + size])


def test_the_store_holds_no_more_than_it_must() -> None:
    store = codec(2).store(2400, one(40, 60))
    assert store is not None
    assert store.fields == ("error", "q")
    assert store.nbytes == 4 * (2400 + 2 * 60)


# --- bad input ----------------------------------------------------------------------------------


def test_a_rank_too_large_is_told_in_one_line() -> None:
    shapes = [(64,), (192, 768), (256, 192)]
    assert check(4, shapes) == ""
    text = check(80, shapes)
    assert "compress.rank = 80" in text
    assert "192 x 768" in text
    assert "\n" not in text
    best = int(text.partition("at most ")[2].partition(";")[0])
    assert check(best, shapes) == ""
    assert check(best + 1, shapes) != ""
    assert codec(80).check(shapes) == text
    assert "another compress.codec" in check(1, [(3, 3), (12,)])
    assert check(1, []) == ""


def test_factors_take_less_than_half() -> None:
    assert gains(192, 768, 4)
    assert not gains(16, 16, 4)
    assert not gains(1, 4096, 1)
