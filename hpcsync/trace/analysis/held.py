"""Buckets that one rank holds back: it begins their exchange late, while its other buckets come in
time, and all others wait."""

from __future__ import annotations

import numpy as np

from .exchange import Exchange, middle
from .findings import Finding
from .straggler import LEAST_SHARE, excess, since
from .tables import Numbers, Tables

_OWN = 0.5  # of a rank's latest bucket that must have come with the bucket itself
_TOLD = 0.3  # of its lateness that a pass slow throughout must leave unexplained beyond that


def held_back(tables: Tables, found: Exchange) -> list[Finding]:
    """Buckets that a rank begins late by itself, the worst first."""
    if len(tables.ranks) < 2 or not found.active.size:
        return []
    # Late both by the rank's own way through its backward pass, and in that others wait for it:
    # one whose queue was full is not late for others, one whose step began late not by itself.
    behind = found.started - middle(found.started)
    late = np.nan_to_num(np.minimum(behind, found.late))
    passes = tables.columns["backward"]
    longer = passes - middle(passes)
    usual = middle(passes)
    # Where in the pass a bucket is ready; first rounds may come in any order, and after it.
    ready = middle(tables.launched - tables.backward[:, :, None])
    there = np.isfinite(ready).any(axis=0)  # others were laid out anew before these steps
    where = np.zeros(there.shape)
    where[there] = np.nanmedian((ready / np.maximum(usual, 1.0)[:, None])[:, there], axis=0)
    order = np.argsort(where, kind="stable")
    found_here = []
    for row in range(len(tables.ranks)):
        own = _own_part(late[row][:, order], where[order], longer[row])
        for at, k in enumerate(order):
            lost = _loss(own[:, at], tables.columns["whole"][row])
            if lost > 0:
                found_here.append(_finding(tables, row, int(k), lost, own[:, at]))
    return sorted(found_here, key=lambda each: -each.lost_ms)


def _own_part(late: Numbers, where: Numbers, longer: Numbers) -> Numbers:
    """What of a bucket's lateness came with it, and with it alone; (S, K) in the order in which
    buckets are ready.

    A pass that is slow throughout makes every bucket later by its share of the pass. Which of the
    two it was is told by what each leaves unexplained in the typical one of the late steps: in one
    step alone a rank that did not get a core at once may hide it.
    """
    reached = np.maximum.accumulate(np.maximum(late, 0.0), axis=1)
    more = np.diff(reached, axis=1, prepend=0.0)
    even = np.maximum(longer, 0.0)[:, None] * np.clip(np.diff(where, prepend=0.0), 0.0, 1.0)
    worst = late.max(axis=1)
    high = float(np.quantile(worst, 0.9))
    if high <= 0:
        return np.zeros(late.shape)
    counted = worst >= _OWN * high
    typical, usual = np.median(more[counted], axis=0), np.median(even[counted], axis=0)
    alone = typical.sum() - typical
    told = np.abs(typical - usual).sum() - alone >= _TOLD * typical
    return np.where(told & (more >= _OWN * worst[:, None]), more, 0.0)


def _loss(own: Numbers, whole: Numbers) -> float:
    """Typical, ns; 0 if it does not stand out."""
    if float(np.quantile(own, 0.9)) <= LEAST_SHARE * float(np.median(whole)):
        return 0.0  # as nearly always, and cheaper to tell
    return float(excess(np.stack([np.zeros_like(own), own]), np.stack([whole, whole]))[1])


def _finding(tables: Tables, row: int, k: int, lost: float, own: Numbers) -> Finding:
    rank, bucket, node = tables.ranks[row], int(tables.buckets[k]), int(tables.node[row])
    step = float(np.median(tables.columns["whole"]))
    queued = float(np.nanmedian((tables.first - tables.launched)[row, :, k]))
    in_queue = queued > LEAST_SHARE * step and queued > 0.5 * lost
    begun = since(own, tables.steps, lost)
    text = (
        f"bucket {bucket} is held back at rank {rank} (node {node}): "
        + (f"{queued / 1e6:.1f} ms in its queue, " if in_queue else "")
        + f"{lost / 1e6:.1f} ms a step later than on the other ranks, which wait for it"
        + (f"; since step {begun}" if begun is not None else "")
    )
    return Finding(
        kind="bucket",
        ranks=(rank,),
        node=node,
        bucket=bucket,
        lane="queue",
        lost_ms=lost / 1e6,
        since=begun,
        text=text,
        advice="try a larger comm.credit_mb"
        if in_queue
        else "look for hooks, or layers used twice, of the bucket's parameters on that rank",
    )
