"""What a step was made of, as a prediction of another one needs it: pure.

    step = before + backward + exposed + rest
           |        |          the exchange after the backward pass
           |        the last one, in which gradients become complete
           forward passes, and the backward passes of earlier micro-batches

Of each step the rank counts that waited least: it came last, and what it waited for is the
exchange and not another rank. Wires are taken by the rank on which they were busy for the shortest
time, which did not wait for others there either. Then medians over steps. All are durations on one
rank, so no clocks are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError
from ..events import LANE, Events
from .account import Account, account, names_of

_MOST_STEPS = 40  # the last ones; earlier ones may have been of other links
_BETWEEN = ("wire.rail", "wire.world")

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Medians over steps; seconds and bytes.

    Attributes:
        steps, ranks: that it was taken from.
        optimizer_s: part of ``rest_s``.
        leads: for each bucket in order: the share of all bytes that was complete when it was
            launched, and how long before the end of the backward pass that was.
        buckets: bytes of each, in the same order.
        driven: share of the exchange's spans that the computing thread recorded.
        wire_s: in which a rank had transfers between nodes under way, coding included.
        wire_bytes: that a rank sent to other nodes.
        node_s: in which a rank had transfers inside the node under way.
        shortest_s, shortest_bytes: the shortest transfer between nodes.
        encode_s, combine_s, decode_s: sums of a rank's spans.
    """

    steps: int
    ranks: int
    step_s: float
    before_s: float
    backward_s: float
    exposed_s: float
    rest_s: float
    optimizer_s: float
    leads: tuple[tuple[float, float], ...]
    buckets: tuple[int, ...]
    driven: float
    wire_s: float
    wire_bytes: float
    node_s: float
    shortest_s: float
    shortest_bytes: float
    encode_s: float
    combine_s: float
    decode_s: float

    @property
    def coded(self) -> bool:
        """Whether gradients were coded."""
        return self.encode_s + self.decode_s > 0


class _Rank(NamedTuple):
    """An account, and for each of its steps what it does not tell."""

    account: Account
    backward: Numbers  # length of the last pass
    leads: Numbers  # (steps, buckets)
    driven: Numbers
    shortest: Numbers
    shortest_bytes: Numbers
    coding: dict[str, Numbers]  # sums


def observe(tables: Iterable[Events], texts: Sequence[str]) -> Seen:
    """What the last steps of one layout of the buckets were made of.

    Args:
        tables: events of each rank, on its own clock; one in memory at a time.
        texts: what the field ``name`` of events means.

    Raises:
        UserError: there is no whole step with a backward pass.
    """
    ranks = [found for events in tables if (found := _of_rank(events, tuple(texts)))]
    steps = _common(ranks)
    if not steps.shape[0]:
        raise UserError(
            "whatif: the trace has no whole step with a backward pass that all its ranks hold; "
            "trace some more steps (trace.every)"
        )
    places = [np.searchsorted(each.account.steps, steps) for each in ranks]
    kept = _alike(ranks[0], places[0])[-_MOST_STEPS:]
    return _summed([(rank, place[kept]) for rank, place in zip(ranks, places, strict=True)])


def _of_rank(events: Events, texts: tuple[str, ...]) -> _Rank | None:
    names = names_of(texts)
    found = account(events, names)
    if found is None:
        return None
    steps, buckets = found.steps, found.buckets
    place = np.minimum(np.searchsorted(steps, events["step"]), steps.shape[0] - 1)
    whole = steps[place] == events["step"]
    events, place = events[whole], place[whole]
    lane, long = events["lane"], (events["end"] - events["start"]).astype(np.float64)
    passes = lane == LANE["backward"]
    ended = np.full(steps.shape, np.nan)
    np.fmax.at(ended, place[passes], events["end"][passes].astype(np.float64))

    def sums(mask: NDArray[np.bool_], values: Numbers) -> Numbers:
        return np.bincount(place[mask], values[mask], steps.shape[0]).astype(np.float64)

    between = np.isin(lane, [LANE[name] for name in _BETWEEN])
    exchange = between | np.isin(lane, [LANE["wire.node"], LANE["encode"], LANE["decode"]])
    shortest = np.full(steps.shape, np.inf)
    moving = between & (events["bytes"] > 0)
    np.minimum.at(shortest, place[moving], long[moving])
    least = moving & (long <= shortest[place])
    combine = (lane == LANE["encode"]) & (events["name"] == names.combine)
    return _Rank(
        found,
        ended - buckets.backward,
        ended[:, None] - buckets.launched,
        sums(exchange & (events["thread"] == 0), np.ones(lane.shape))
        / np.maximum(sums(exchange, np.ones(lane.shape)), 1),
        shortest,
        sums(least, events["bytes"].astype(np.float64)) / np.maximum(sums(least, long * 0 + 1), 1),
        {
            "encode": sums((lane == LANE["encode"]) & ~combine, long),
            "combine": sums(combine, long),
            "decode": sums(lane == LANE["decode"], long),
        },
    )


def _common(ranks: Sequence[_Rank]) -> NDArray[np.int64]:
    """Steps that all ranks have, with a backward pass."""
    common: NDArray[np.int64] | None = None
    for each in ranks:
        own = each.account.steps[np.isfinite(each.backward)]
        common = own if common is None else np.intersect1d(common, own)
    return np.zeros(0, np.int64) if common is None else common


def _alike(rank: _Rank, place: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which of the steps had the buckets and the coding of the last one."""
    nbytes = np.nan_to_num(rank.account.buckets.nbytes[place], nan=-1.0)
    coded = rank.coding["encode"][place] > 0
    same = (nbytes == nbytes[-1]).all(axis=1) & (coded == coded[-1])
    return np.flatnonzero(same)


def _summed(ranks: Sequence[tuple[_Rank, NDArray[np.int64]]]) -> Seen:
    """Put ranks together; each with the places of the steps in its own arrays."""

    def table(name: str) -> Numbers:
        return np.stack([rank.account.columns[name][at] for rank, at in ranks])

    exposed_after = table("exposed") - table("driven")
    waited = exposed_after + table("idle")
    last = waited.argmin(axis=0)
    every = np.arange(last.shape[0])

    def of_last(values: Numbers) -> Numbers:
        found: Numbers = values[last, every]
        return found

    whole, exposed = of_last(table("whole")), of_last(exposed_after)
    backward = of_last(np.stack([rank.backward[at] for rank, at in ranks]))
    before = of_last(table("compute") + table("driven")) - backward
    shares, leads, sizes = _leads(ranks, last)
    wire = table(_BETWEEN[0]) + table(_BETWEEN[1])
    used = wire.max(axis=1) > 0
    sent = table(f"bytes.{_BETWEEN[0]}") + table(f"bytes.{_BETWEEN[1]}")
    shortest = np.stack([rank.shortest[at] for rank, at in ranks])
    smallest = np.stack([rank.shortest_bytes[at] for rank, at in ranks])
    found = shortest.argmin(axis=0)
    coding = {
        name: float(np.median(np.stack([rank.coding[name][at] for rank, at in ranks])[used])) / 1e9
        if used.any()
        else 0.0
        for name in ("encode", "combine", "decode")
    }
    quick = shortest[found, every]
    return Seen(
        steps=last.shape[0],
        ranks=len(ranks),
        step_s=_median(whole),
        before_s=_median(before),
        backward_s=_median(backward),
        exposed_s=_median(exposed),
        # Medians do not add up; the rest is what makes them do so.
        rest_s=_median(whole) - _median(before) - _median(backward) - _median(exposed),
        optimizer_s=_median(of_last(table("optimizer"))),
        leads=tuple(zip(shares, leads, strict=True)),
        buckets=sizes,
        driven=float(np.mean([rank.driven[at].mean() for rank, at in ranks])),
        wire_s=_median(wire[used].min(axis=0)) if used.any() else 0.0,
        wire_bytes=float(np.median(sent[used], axis=1).max()) if used.any() else 0.0,
        node_s=_median(table("wire.node").min(axis=0)),
        shortest_s=_median(quick) if np.isfinite(quick).all() else 0.0,
        shortest_bytes=float(np.median(smallest[found, every])),
        encode_s=coding["encode"],
        combine_s=coding["combine"],
        decode_s=coding["decode"],
    )


def _leads(
    ranks: Sequence[tuple[_Rank, NDArray[np.int64]]], last: NDArray[np.int64]
) -> tuple[list[float], list[float], tuple[int, ...]]:
    """Shares of the bytes, seconds before the end, and bytes of the buckets, first ready first."""
    first, at = ranks[0]
    nbytes = first.account.buckets.nbytes[at][-1:]
    if not nbytes.shape[1]:
        return [], [], ()
    there = np.flatnonzero(np.isfinite(nbytes[0]))
    # A rank that lost events may know fewer buckets; the first one then stands for it.
    index = first.account.buckets.index
    told = [
        each if np.array_equal(each[0].account.buckets.index, index) else ranks[0] for each in ranks
    ]
    mine = np.stack([rank.leads[own][:, there] for rank, own in told])
    ahead = np.nanmedian(mine[last, np.arange(last.shape[0])], axis=0) / 1e9
    ahead = np.maximum(np.nan_to_num(ahead), 0.0)
    order = np.argsort(-ahead, kind="stable")
    sizes = nbytes[0][there][order]
    shares = np.cumsum(sizes) / max(sizes.sum(), 1.0)
    return shares.tolist(), ahead[order].tolist(), tuple(int(each) for each in sizes)


def _median(values: Numbers) -> float:
    """Of ns, in seconds."""
    return float(np.median(values)) / 1e9
