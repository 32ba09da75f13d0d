"""Whose clock is off, and which comparisons across ranks the clocks can carry.

Clocks of different machines may be any time apart; what was measured says by how much, and times
are corrected by it. A measurement that is wrong shows in what cannot be: nobody can be done with a
collective before everybody has launched it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .exchange import middle
from .findings import Finding, named
from .tables import Numbers, Tables

_TOGETHER_NS = 100e6  # offsets nearer than that are taken for the same clock
_SLACK_NS = 1e6  # beyond the uncertainty, before a clock is called wrong


@dataclass(frozen=True, slots=True)
class Arrival:
    """How far apart ranks come to the end of a step, by their clocks; ms.

    Attributes:
        spread_ms: first to last, median over steps.
        uncertainty_ms: of the difference of two ranks' clocks.
        told: whether the clocks can tell it.
    """

    spread_ms: float
    uncertainty_ms: float
    told: bool


def arrival(tables: Tables, wrong: Sequence[int] = ()) -> Arrival:
    """The spread of the ranks' arrivals, without ranks whose clocks are wrong."""
    kept = [row for row, rank in enumerate(tables.ranks) if rank not in wrong]
    if len(kept) < 2:
        return Arrival(0.0, 0.0, True)
    times = tables.arrive[kept]
    spread = float(np.median(times.max(axis=0) - times.min(axis=0)))
    unsure = float(np.sort(tables.uncertainty[kept])[-2:].sum())
    return Arrival(spread / 1e6, unsure / 1e6, spread > unsure)


def contradictions(tables: Tables) -> list[Finding]:
    """Ranks whose corrected times cannot be true."""
    if len(tables.ranks) < 2 or not tables.done.size:
        return []
    shift = tables.shift[:, :, None]
    launched, done = tables.launched + shift, tables.done + shift
    found = []
    off = _against(done)
    for row, rank in enumerate(tables.ranks):
        others = np.arange(len(tables.ranks)) != row
        early = np.fmax.reduce(launched[others], axis=0) - done[row]
        ahead = launched[row] - np.fmin.reduce(done[others], axis=0)
        error = float(off[row])
        sure = tables.uncertainty[row] + float(np.median(tables.uncertainty[others]))
        impossible = float(np.nanmedian(early if error < 0 else ahead))
        if impossible > (sure if np.isfinite(sure) else 0.0) + _SLACK_NS and abs(error) > _SLACK_NS:
            found.append((rank, error, sure))
    return _worst([each for each in found if each[0] != 0] or found, tables)


def _worst(found: list[tuple[int, float, float]], tables: Tables) -> list[Finding]:
    """Those that stand out: a clock that is off makes all others look a little wrong."""
    if not found:
        return []
    most = max(abs(error) for _, error, _ in found)
    return [
        Finding(
            kind="clock",
            lane="wrong",
            ranks=(rank,),
            text=(
                f"clock of {named([rank])} is {_seconds(abs(error))} {_side(error)} "
                + (
                    f"what was measured of it (good to {_seconds(sure)})"
                    if np.isfinite(sure)
                    else "the others', and was never measured"
                )
                + ": by it this rank "
                + (
                    "is done with buckets before others launch"
                    if error < 0
                    else "launches buckets after others are done with"
                )
                + " them"
            ),
            advice="its times are not compared with those of others; check its host's clock",
        )
        for rank, error, sure in found
        if abs(error) > 0.5 * most
    ]


def _against(done: Numbers) -> Numbers:
    """By how much a rank is done later than most by its clock, (R,): the clock's error."""
    reference = done[:1] if done.shape[0] == 2 else middle(done)[None]
    return np.asarray(np.nanmedian((done - reference).reshape(done.shape[0], -1), axis=1))


def odd(tables: Tables, hosts: Sequence[str]) -> list[Finding]:
    """Ranks whose clocks were measured to be far from those of most, and are corrected for it.

    Clocks of different hosts are hardly ever alike, so between hosts it is a fault only where most
    hosts agree.

    Args:
        hosts: of each rank.
    """
    first = -tables.shift[:, 0]
    if first.shape[0] < 2:
        return []
    order = np.argsort(first, kind="stable")
    group = np.zeros(first.shape[0], np.int64)
    group[order[1:]] = np.cumsum(np.diff(first[order]) > _TOGETHER_NS)
    sizes = np.bincount(group)
    if sizes.shape[0] == 1:
        return []
    zero = group[tables.ranks.index(0)] if 0 in tables.ranks else group[0]
    main = int(sizes.argmax()) if 2 * sizes.max() > first.shape[0] else int(zero)
    agree = {hosts[row] for row in np.flatnonzero(group == main).tolist()}
    found = []
    for each in np.unique(group):
        if each == main:
            continue
        rows = np.flatnonzero(group == each).tolist()
        ranks = [tables.ranks[row] for row in rows]
        ahead = float(np.median(first[rows]) - np.median(first[group == main]))
        shared = any(hosts[row] in agree for row in rows)
        sure = float(tables.uncertainty[rows].max())
        found.append(
            Finding(
                kind="clock",
                ranks=tuple(ranks),
                text=(
                    f"clock of {named(ranks)} is {_seconds(abs(ahead))} {_side(ahead)} the "
                    f"others'; times are corrected by what was measured (good to {_seconds(sure)})"
                ),
                advice="nothing in this report depends on it; other logs of that host may",
                fault=shared or len(agree) > 1,
            )
        )
    return found


def _side(error: float) -> str:
    return "behind" if error < 0 else "ahead of"


def _seconds(ns: float) -> str:
    for unit, scale in (("s", 1e9), ("ms", 1e6)):
        if abs(ns) >= 0.1 * scale:
            return f"{ns / scale:.3f} {unit}"
    return f"{ns / 1e3:.0f} us"
