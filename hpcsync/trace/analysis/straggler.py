"""Ranks that are slow, by what they do themselves: waiting for others counts for nobody.

A rank's own work in a lane is compared with that of the middle rank in the same step (of an even
number the lower middle, so that of two ranks the slow one is not half of the measure). Durations on
one rank need no other rank's clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .exchange import middle
from .findings import Finding, named
from .tables import Numbers, Tables

LANES = ("data", "forward", "backward", "optimizer", "checkpoint", "uncovered")
"""Lanes in which a rank may be slow by itself."""

# A rank is named when it loses this share of a step in most steps that count, and stands out of
# what it and the others scatter. Below, ranks that share cores differ by chance.
LEAST_SHARE = 0.08
_STEP_SHARE = 0.05  # of a step that the loss in one step must have
_STEPS = 0.3  # of all steps: a fault may begin late
_OUTLIERS = 0.1  # of the steps, the worst ones, that do not count
_SCATTER = 1.0  # of the rank's own loss from step to step
_OTHERS = 3.0  # times the typical loss of the others

WORDS = {
    "data": "waits for its data",
    "forward": "is slow in forward",
    "backward": "is slow in backward",
    "optimizer": "is slow in the optimizer",
    "checkpoint": "is held up by checkpoints",
    "uncovered": "loses time in its step outside of all lanes",
}
ADVICE = {
    "data": "look at the disk of its host and at data.path there; data.name=tokens reads least",
    "uncovered": "look for callbacks of your own on that rank",
    "checkpoint": "look at the file system of its host; write checkpoints less often",
}
_SLOW_HOST = (
    "look at its host (other load, clock rate, heat), pin ranks to cores, or leave the host out"
)


@dataclass(frozen=True, slots=True)
class Scores:
    """How slow a rank is, by its own work in a step (without waiting).

    Attributes:
        work_ms: mean.
        best: the best rank's work over steps, this one's as a multiple of it; 1 is the best.
        past: the last quarter of the steps over the ones before; NaN with fewer than 4.
        waited_ms: mean time that it waited in the step for others or their data.
    """

    rank: int
    node: int
    work_ms: float
    best: float
    past: float
    forward_ms: float
    backward_ms: float
    data_ms: float
    waited_ms: float


def own_work(tables: Tables) -> Numbers:
    """Time of a step that a rank does not wait for others, (R, S) ns."""
    columns = tables.columns
    return columns["whole"] - columns["exposed"] - columns["idle"]


def scores(tables: Tables) -> list[Scores]:
    """Of every rank, the slowest first."""
    work = own_work(tables)
    best = np.median(work / np.maximum(work.min(axis=0), 1.0), axis=1)
    steps = work.shape[1]
    cut = steps - max(1, steps // 4)
    past = np.full(work.shape[0], np.nan)
    if steps >= 4:
        past = np.median(work[:, cut:], axis=1) / np.maximum(np.median(work[:, :cut], axis=1), 1.0)
    mean = {name: column.mean(axis=1) / 1e6 for name, column in tables.columns.items()}
    found = [
        Scores(
            rank=rank,
            node=int(tables.node[row]),
            work_ms=float(work[row].mean()) / 1e6,
            best=float(best[row]),
            past=float(past[row]),
            forward_ms=float(mean["forward"][row]),
            backward_ms=float(mean["backward"][row]),
            data_ms=float(mean["data"][row]),
            waited_ms=float(mean["exposed"][row] + mean["idle"][row]),
        )
        for row, rank in enumerate(tables.ranks)
    ]
    return sorted(found, key=lambda each: (-each.best, each.rank))


def imbalance(values: Numbers) -> float:
    """The largest rank's over the mean, mean over steps; 1 is even. Of (R, S)."""
    mean = values.mean(axis=0)
    known = mean > 0
    return float((values.max(axis=0)[known] / mean[known]).mean()) if known.any() else 1.0


def excess(values: Numbers, whole: Numbers) -> Numbers:
    """Typical loss of each rank against the middle one, (R,) ns; 0 for those that do not stand out.

    Args:
        values: own time of each rank in each step, (R, S) ns.
        whole: lengths of the steps, as ``values``.
    """
    ranks, steps = values.shape
    if ranks < 2:
        return np.zeros(ranks)
    over = values - middle(values)
    step = float(np.median(whole))
    kept = np.sort(over, axis=1)[
        :, : max(1, steps - (round(steps * _OUTLIERS + 0.5) if steps > 4 else 0))
    ]
    typical: Numbers = kept.mean(axis=1)
    scatter = 1.4826 * np.median(np.abs(over - np.median(over, axis=1)[:, None]), axis=1)
    often = (over > _STEP_SHARE * step).mean(axis=1) >= _STEPS
    rest = float(np.median(np.abs(typical)))
    stands = (typical > LEAST_SHARE * step) & often & (typical > _SCATTER * scatter)
    stands &= typical > _OTHERS * rest if ranks > 4 else stands
    return np.where(stands, typical, 0.0)


def since(over: Numbers, steps: NDArray[np.int64], typical: float) -> int | None:
    """The first step of a loss that began late; None if it was there from the beginning.

    Args:
        over: loss of one rank in each step.
    """
    high = over > 0.5 * max(
        float(np.max(np.sort(over)[: max(1, over.shape[0] * 9 // 10)])), typical
    )
    best, where = 0.0, 0
    for cut in range(1, over.shape[0]):
        contrast = float(high[cut:].mean() - high[:cut].mean())
        if contrast > best:
            best, where = contrast, cut
    return int(steps[where]) if best > 0.8 else None


def stragglers(tables: Tables, spared: Sequence[tuple[int, str]] = ()) -> list[Finding]:
    """Ranks that hold up the others by what they do themselves, the worst first.

    Args:
        spared: (rank, lane) whose loss has been explained otherwise.
    """
    found: list[Finding] = []
    for lane in LANES:
        values = tables.columns[lane]
        lost = excess(values, tables.columns["whole"])
        rows = [
            row for row in np.flatnonzero(lost).tolist() if (tables.ranks[row], lane) not in spared
        ]
        groups = _by_node(tables, rows)
        found += [_finding(tables, lane, group, values, lost) for group in groups]
    return sorted(found, key=lambda each: -each.lost_ms)


def _by_node(tables: Tables, rows: Sequence[int]) -> list[list[int]]:
    """Rows one by one, but a node of several ranks that are all among them together."""
    groups: dict[int, list[int]] = {}
    for row in rows:
        groups.setdefault(int(tables.node[row]), []).append(int(row))
    listed = []
    for node, members in groups.items():
        whole = len(members) > 1 and len(members) == int((tables.node == node).sum())
        listed += [members] if whole else [[row] for row in members]
    return listed


def _finding(tables: Tables, lane: str, rows: list[int], values: Numbers, lost: Numbers) -> Finding:
    ranks = [tables.ranks[row] for row in rows]
    worst = max(rows, key=lambda row: float(lost[row]))
    loss = float(lost[worst])
    usual = float(np.median(middle(values)))
    step = float(np.median(tables.columns["whole"]))
    begun = since((values - middle(values))[worst], tables.steps, loss)
    node = int(tables.node[worst])
    who = f"node {node} ({named(ranks)})" if len(rows) > 1 else f"{named(ranks)} (node {node})"
    text = f"straggler: {who} {WORDS[lane]}: {loss / 1e6:.1f} ms more a step"
    text += f" than the {usual / 1e6:.1f} ms of most" if usual > 0 else ""
    text += f", {loss / step:.0%} of a step"
    text += f"; since step {begun}" if begun is not None else ""
    return Finding(
        kind="straggler",
        ranks=tuple(ranks),
        node=node,
        lane=lane,
        lost_ms=loss / 1e6,
        since=begun,
        text=text,
        advice=ADVICE.get(lane, _SLOW_HOST),
    )
