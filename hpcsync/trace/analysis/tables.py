"""All ranks of a trace: their accounts side by side, for the steps that all of them have.

Events are read rank by rank and dropped again, so memory grows with ranks x steps x buckets only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError
from ...wording import ranges
from ..file import Trace
from .account import COLUMNS, Account, account, names_of

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Tables:
    """What the analysis works on. Times are in ns; R ranks, S steps, K buckets.

    Attributes:
        ranks, steps, buckets: their numbers, ascending.
        node: of each rank, (R,).
        columns: of ``account.COLUMNS``, (R, S) each.
        launched, first, done: of buckets on the rank's own clock, (R, S, K), NaN where absent.
        fill: from a bucket's first gradient to its last, (R, S, K).
        nbytes: of the buckets, (S, K).
        backward: when the last backward pass began, on the rank's own clock, (R, S).
        shift: what to add to times of a rank in a step to get rank 0's, (R, S).
        arrive: when a rank came to the end of its step, on rank 0's clock, (R, S).
        uncertainty: of ``shift``, (R,); infinite where a clock was never compared.
    """

    ranks: tuple[int, ...]
    steps: NDArray[np.int64]
    buckets: NDArray[np.int64]
    node: NDArray[np.int64]
    columns: dict[str, Numbers]
    launched: Numbers
    first: Numbers
    done: Numbers
    fill: Numbers
    nbytes: Numbers
    backward: Numbers
    shift: Numbers
    arrive: Numbers
    uncertainty: Numbers

    def mean(self, name: str) -> float:
        """Mean of a column over ranks and steps."""
        return float(self.columns[name].mean())

    def place(self, rank: int) -> int:
        """Where a rank stands in the arrays."""
        return self.ranks.index(rank)


Chooser = Callable[[Sequence[int]], Sequence[int]]


def collect(trace: Trace, ranks: Sequence[int], choose: Chooser | None = None) -> Tables:
    """Read the ranks' events and make their tables.

    Args:
        ranks: of which.
        choose: takes the steps that all ranks have and gives those to look at; all but the
            run's first step if not given, in which nothing is warm yet.

    Raises:
        UserError: no rank has a complete step, or the ranks have none in common.
    """
    names = names_of(trace.names)
    accounts: dict[int, Account] = {}
    for rank in ranks:
        found = account(trace.events(rank), names)
        if found is not None:
            accounts[rank] = found
    accounts = _lasting(trace, ranks, accounts)
    shared = _shared(accounts)
    if not shared.shape[0]:
        raise UserError(f"trace of {trace.folder}: the ranks have no complete step in common")
    listed = [int(step) for step in shared]
    warm = listed[1:] if listed[0] == 1 and len(listed) > 2 else listed
    picked = warm if choose is None else choose(listed)
    return _stack(trace, accounts, np.asarray(picked, np.int64))


def _lasting(
    trace: Trace, ranks: Sequence[int], accounts: dict[int, Account]
) -> dict[int, Account]:
    """Without ranks that have no complete step, or so few that they would cut the others short."""
    empty = [rank for rank in ranks if rank not in accounts]
    if not accounts:
        raise UserError(f"trace of {trace.folder}: no complete step of {_named(empty)}")
    most = max(each.steps.shape[0] for each in accounts.values())
    few = [rank for rank, each in accounts.items() if 2 * each.steps.shape[0] < most]
    if empty:
        trace.problems.append(f"{_named(empty)} has no complete step; left out")
    if few:
        trace.problems.append(f"{_named(few)} has less than half of the steps; left out")
    return {rank: each for rank, each in accounts.items() if rank not in few}


def _named(ranks: Sequence[int]) -> str:
    return f"rank {ranges(sorted(ranks))}"


def _shared(accounts: dict[int, Account]) -> NDArray[np.int64]:
    shared: NDArray[np.int64] | None = None
    for each in accounts.values():
        shared = each.steps if shared is None else np.intersect1d(shared, each.steps)
    assert shared is not None
    return shared


def _stack(trace: Trace, accounts: dict[int, Account], steps: NDArray[np.int64]) -> Tables:
    ranks = tuple(sorted(accounts))
    buckets = np.unique(np.concatenate([each.buckets.index for each in accounts.values()]))
    shape = (len(ranks), steps.shape[0])
    columns = {name: np.zeros(shape) for name in COLUMNS}
    flat = {name: np.zeros(shape) for name in ("backward", "shift", "arrive")}
    deep = {
        name: np.full((*shape, buckets.shape[0]), np.nan)
        for name in ("launched", "first", "done", "fill", "nbytes")
    }
    uncertainty = np.zeros(len(ranks))
    for row, rank in enumerate(ranks):
        each = accounts.pop(rank)
        at = np.searchsorted(each.steps, steps)
        for name in COLUMNS:
            columns[name][row] = each.columns[name][at]
        column = np.searchsorted(buckets, each.buckets.index)
        for name, whole in deep.items():
            whole[row][:, column] = getattr(each.buckets, name)[at]
        # A step is short for a clock: one shift does for all of it.
        middle = (each.begin[at] + each.end[at]) / 2
        flat["shift"][row] = trace.offset(rank, middle.astype(np.int64))
        flat["arrive"][row] = each.arrive[at] + flat["shift"][row]
        flat["backward"][row] = each.buckets.backward[at]
        uncertainty[row] = trace.uncertainty(rank) if len(ranks) > 1 else 0.0
    _with_ends_of_others(columns)
    return Tables(
        ranks=ranks,
        steps=steps,
        buckets=buckets,
        node=np.array([trace.node_of(rank) for rank in ranks]),
        columns=columns,
        launched=deep["launched"],
        first=deep["first"],
        done=deep["done"],
        fill=deep["fill"],
        nbytes=_largest(deep["nbytes"]),
        uncertainty=uncertainty,
        **flat,
    )


def _with_ends_of_others(columns: dict[str, Numbers]) -> None:
    """Count as exposed what is idle because the exchange ended later on the rank that came last.

    Its last bytes come to some ranks before others, which then wait at the end of the step.
    """
    exposed, idle = columns["exposed"], columns["idle"]
    last = idle.argmin(axis=0)
    longer = exposed[last, np.arange(last.shape[0])] - exposed
    moved = np.clip(longer, 0.0, idle)
    exposed += moved
    idle -= moved


def _largest(nbytes: Numbers) -> Numbers:
    """Of all ranks, (steps, buckets); they are the same where a rank has them."""
    largest: Numbers = np.fmax.reduce(nbytes, axis=0)
    return largest
