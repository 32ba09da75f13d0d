"""Unions of spans and how much of a window they cover: sums would count overlaps twice."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.int64]
"""ns."""


class Union(NamedTuple):
    """Disjoint intervals in ascending order: starts and ends, 1-d, ns."""

    starts: Times
    ends: Times


def union(starts: Times, ends: Times) -> Union:
    """The union of spans in any order; those that end before they start count as empty."""
    kept = ends > starts
    starts, ends = starts[kept], ends[kept]
    order = np.argsort(starts, kind="stable")
    starts, reached = starts[order], np.maximum.accumulate(ends[order])
    if not starts.shape[0]:
        return Union(starts, reached)
    gap = starts[1:] > reached[:-1]
    first = np.concatenate([[True], gap])
    last = np.concatenate([gap, [True]])
    return Union(starts[first], reached[last])


def joined(*unions: Union) -> Union:
    """The union of unions."""
    return union(
        np.concatenate([each.starts for each in unions]),
        np.concatenate([each.ends for each in unions]),
    )


def covered(whole: Union, low: Times, high: Times) -> Times:
    """How much of each window from ``low`` to ``high`` is covered, in ns; shape of ``low``."""
    found: Times = np.maximum(_before(whole, high) - _before(whole, low), 0)
    return found


def _before(whole: Union, times: Times) -> Times:
    """How much is covered before each time."""
    if not whole.starts.shape[0]:
        return np.zeros(times.shape, np.int64)
    lengths = whole.ends - whole.starts
    total = np.concatenate([[0], np.cumsum(lengths)])
    at = np.searchsorted(whole.starts, times, side="right")
    inside = np.clip(times - whole.starts[at - 1], 0, lengths[at - 1])
    return np.where(at > 0, total[np.maximum(at - 1, 0)] + inside, 0).astype(np.int64)
