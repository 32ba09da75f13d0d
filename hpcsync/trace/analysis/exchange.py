"""Collectives: transfer apart from waiting, bandwidths, and who came late.

An allreduce ends on all ranks at about the same time, and it cannot move on before the last rank
has launched it. So the time from a rank's first round until it is done is shortest on the rank that
came last, where it is transfer alone; what it is longer elsewhere is waiting for that rank. No
clock of another rank is needed for that.

    rank 0   launch |-------- waiting --------|== transfer ==| done
    rank 1                              launch|== transfer ==| done

algbw is the size of a bucket over its transfer. busbw is algbw x 2(n-1)/n, which for any n is the
rate at which data passes a rank's link if the sum is done well (nccl-tests, doc/PERFORMANCE.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .tables import Numbers, Tables


@dataclass(frozen=True, slots=True)
class Exchange:
    """The buckets of all ranks; (R, S, K) but for ``transfer``, ns.

    Attributes:
        active: from a rank's first round until it is done.
        transfer: the shortest of the ranks, (S, K).
        wait: for others; active less transfer.
        late: by how much a rank came after the middle one: negative if before.
        started: from the beginning of the last backward pass until the first round.
    """

    active: Numbers
    transfer: Numbers
    wait: Numbers
    late: Numbers
    started: Numbers


def exchange(tables: Tables) -> Exchange:
    """The buckets of all ranks, transfer apart from waiting."""
    active = np.maximum(tables.done - tables.first, 0.0)
    if not active.size:
        return Exchange(active, active[0], active, active, active)
    transfer = np.fmin.reduce(active, axis=0)
    return Exchange(
        active=active,
        transfer=transfer,
        wait=active - transfer,
        late=-middle(-active) - active,
        started=tables.first - tables.backward[:, :, None],
    )


def middle(values: Numbers) -> Numbers:
    """The median over the first axis, for an even number of them the lower one.

    Of two the smaller, so that one slow rank is never part of what it is compared with. NaN counts
    as large.
    """
    found: Numbers = np.sort(values, axis=0)[(values.shape[0] - 1) // 2]
    return found


@dataclass(frozen=True, slots=True)
class Collective:
    """A bucket's exchange, over steps and ranks; times in ms, bandwidths in GB/s (1e9 bytes).

    Attributes:
        queue_ms: launched, but not begun: mean.
        transfer_ms: median over steps.
        wait_ms: mean over ranks of the time that they waited for the last.
        last: the rank that most often came last, and the share of steps in which it did.
    """

    bucket: int
    nbytes: int
    fill_ms: float
    queue_ms: float
    transfer_ms: float
    wait_ms: float
    algbw: float
    busbw: float
    last: int
    last_share: float


def collectives(tables: Tables, found: Exchange) -> list[Collective]:
    """Every bucket's figures. Where the plan of buckets has changed, of the last steps' sizes."""
    listed = []
    count = len(tables.ranks)
    for k, bucket in enumerate(tables.buckets):
        sizes = tables.nbytes[:, k]
        there = np.flatnonzero(np.isfinite(sizes) & np.isfinite(found.transfer[:, k]))
        if not there.shape[0]:
            continue
        kept = there[sizes[there] == sizes[there[-1]]]
        nbytes, taken = float(sizes[kept[0]]), float(np.median(found.transfer[kept, k]))
        algbw = nbytes / taken if taken > 0 else float("nan")
        active = np.where(np.isnan(found.active[:, kept, k]), np.inf, found.active[:, kept, k])
        last = np.bincount(active.argmin(axis=0), minlength=count)
        listed.append(
            Collective(
                bucket=int(bucket),
                nbytes=int(nbytes),
                fill_ms=_mean(tables.fill[:, kept, k]),
                queue_ms=_mean(tables.first[:, kept, k] - tables.launched[:, kept, k]),
                transfer_ms=taken / 1e6,
                wait_ms=_mean(found.wait[:, kept, k]),
                algbw=algbw,
                busbw=algbw * 2 * (count - 1) / count,
                last=tables.ranks[int(last.argmax())],
                last_share=float(last.max() / kept.shape[0]),
            )
        )
    return listed


def waits(tables: Tables, found: Exchange) -> Numbers:
    """How long each rank waited for late ranks at the end of its backward pass, ns, (R, S).

    The rank whose backward pass ended last waits for transfer alone, and the least. Where a rank
    held back a bucket, all wait for that: as long as for the bucket that was done last.
    """
    exposed = tables.columns["exposed"] - tables.columns["driven"]
    if not found.active.size:
        return np.zeros(exposed.shape)
    longer = exposed - exposed.min(axis=0)
    final = np.where(np.isnan(tables.done), -np.inf, tables.done).argmax(axis=2)[:, :, None]
    moved = np.broadcast_to(found.transfer[None], found.active.shape)
    transfer = np.nan_to_num(np.take_along_axis(moved, final, axis=2)[:, :, 0])
    held_up = np.nan_to_num(np.take_along_axis(found.wait, final, axis=2)[:, :, 0])
    held = np.minimum(held_up, np.maximum(exposed - transfer, 0.0))
    late: Numbers = np.maximum(longer, held)
    return late


def waiting_share(tables: Tables, found: Exchange) -> float:
    """The share of the exposed communication that was waiting for late ranks, not transfer."""
    total = float((tables.columns["exposed"] - tables.columns["driven"]).sum())
    return float(waits(tables, found).sum()) / total if total > 0 else 0.0


def _mean(values: Numbers) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) / 1e6 if known.shape[0] else float("nan")
