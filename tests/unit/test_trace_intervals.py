"""Unions of spans, against counting every nanosecond."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hpcsync.trace.analysis.intervals import covered, joined, union

SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=12)
WINDOWS = st.lists(st.tuples(st.integers(-5, 70), st.integers(-5, 70)), min_size=1, max_size=6)


def arrays(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(pairs, np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def moments(pairs: list[tuple[int, int]]) -> set[int]:
    return {at for start, end in pairs for at in range(start, end)}


@given(SPANS)
def test_a_union_is_disjoint_and_covers_the_same(spans: list[tuple[int, int]]) -> None:
    found = union(*arrays(spans))
    pairs = list(zip(found.starts.tolist(), found.ends.tolist(), strict=True))
    assert moments(pairs) == moments(spans)
    assert all(end > start for start, end in pairs)
    assert all(later > end for (_, end), (later, _) in pairwise(pairs))


@given(SPANS, SPANS, WINDOWS)
def test_what_is_covered_of_windows(
    one: list[tuple[int, int]], other: list[tuple[int, int]], windows: list[tuple[int, int]]
) -> None:
    first, second = union(*arrays(one)), union(*arrays(other))
    low, high = arrays(windows)
    inside = [set(range(start, end)) for start, end in windows]
    a, b = moments(one), moments(other)
    assert covered(first, low, high).tolist() == [len(a & window) for window in inside]
    assert covered(joined(first, second), low, high).tolist() == [
        len((a | b) & window) for window in inside
    ]
