"""Random-k: what goes, what stays, and which groups are picked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest

from hpcsync.codecs.base import Floats, Moment, Settings, Store
from hpcsync.codecs.randomk import GROUP, RandomK, picked
from hpcsync.device import kernels
from tests.isas import ISAS, using
from tests.sparse import LENGTHS, NATIVE, huge_and_tiny, normal, same


@pytest.fixture(params=ISAS)
def native(request: pytest.FixtureRequest) -> Iterator[kernels.Kernels]:
    """The kernels, with each instruction set that the processor has."""
    with using(request.param) as loaded:
        yield loaded


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
