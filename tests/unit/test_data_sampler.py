"""The order of samples: every sample once an epoch, the same for any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcsync.data.sampler import Sampler, permute, spread, step_seed
from hpcsync.errors import DataError


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
def test_permutation_holds_each_sample_once(size, seed, epoch):
    out = permute(np.arange(size), size, seed, epoch)
    assert out.dtype == np.int64
    assert np.array_equal(np.sort(out), np.arange(size))


def test_permutation_of_a_huge_range_needs_no_table():
    size = 2**52 + 5
    out = permute(np.arange(size - 1000, size), size, 1, 0)
    assert len(set(out.tolist())) == 1000
    assert out.min() >= 0
    assert out.max() < size


def test_permutation_looks_random():
    """Neighbours in the order are far apart, and epochs and seeds have orders of their own."""
    size = 10_000
    first = permute(np.arange(size), size, 0, 0)
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.05
    for seed, epoch in ((0, 1), (1, 0), (1, 1)):
        other = permute(np.arange(size), size, seed, epoch)
        assert (first == other).mean() < 0.01


def test_order_never_changes():
    """A resumed run depends on these numbers: they may not change between versions."""
    assert Sampler(1000, 8, seed=3).indices(0).tolist() == [998, 666, 617, 669, 374, 650, 522, 197]


@given(
    source=st.integers(1, 200),
    batch=st.integers(1, 64),
    seed=st.integers(0, 99),
    steps=st.integers(1, 12),
)
def test_each_epoch_is_a_permutation(source, batch, seed, steps):
    sampler = Sampler(source, batch, seed)
    seen = np.concatenate([sampler.indices(step) for step in range(steps)])
    for start in range(0, len(seen), source):
        part = seen[start : start + source]
        assert len(set(part.tolist())) == len(part)


@given(
    size=st.sampled_from([1, 2, 3, 4, 8]),
    accumulate=st.integers(1, 4),
    each=st.integers(1, 4),
    step=st.integers(0, 50),
)
def test_shards_make_up_the_global_batch(size, accumulate, each, step):
    sampler = Sampler(37, size * accumulate * each, seed=5)
    parts = [
        sampler.shard(step, rank, size, micro, accumulate)
        for micro in range(accumulate)
        for rank in range(size)
    ]
    assert all(len(part) == each for part in parts)
    assert np.array_equal(np.concatenate(parts), sampler.indices(step))


def test_position_is_saved_and_taken_up():
    sampler = Sampler(100, 8, seed=1)
    for _ in range(17):
        sampler.advance()
    again = Sampler(100, 8, seed=1)
    again.load_state_dict(sampler.state_dict())
    assert again.step == 17
    assert np.array_equal(again.indices(again.step), sampler.indices(17))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (Sampler(101, 8, 1), "training samples"),
        (Sampler(100, 4, 1), "train.global_batch"),
        (Sampler(100, 8, 2), "run.seed"),
    ],
)
def test_position_in_another_order_is_refused(other, named):
    with pytest.raises(DataError, match=named):
        Sampler(100, 8, seed=1).load_state_dict(other.state_dict())


def test_a_step_has_a_seed_of_64_bits_of_its_own():
    near = [
        step_seed(seed, step, rank) for seed in range(8) for step in range(8) for rank in range(8)
    ]
    assert len(set(near)) == 512
    assert 0 <= step_seed(2**63 - 1, 2**40, 2**20) < 2**64
    assert step_seed(0, 0, 0) == step_seed(0, 0, 0)


def test_spread_covers_the_range():
    assert spread(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert spread(3, 10).tolist() == [0, 1, 2]
    assert spread(1, 0).tolist() == []
