"""Doubling: few messages, for buffers so small that latency is all.

Allreduce: recursive doubling. Ranks at distance 1, 2, 4, ... exchange the whole buffer and add, so
L = log2 p steps suffice: L(a + nb + ng). Other rank counts are folded onto the power of two below
(`Fold`), which costs 2a + 2nb + ng more. Thakur, Rabenseifner and Gropp, IJHPCA 19(1), 2005,
section 4.5.

Allgather: Bruck's. A rank that has d chunks gets the next d from the rank d after it; ceil(log2 p)
steps for any rank count, none folded: ceil(L)a + (p-1)/p nb. Bruck, Ho, Kipnis, Upfal and
Weathersby, IEEE TPDS 8(11), 1997; Thakur et al., section 4.1. Here chunks keep their
places, so a run that wraps around goes as two transfers.

Reduce-scatter: that allgather backwards, with sums; the same cost and (p-1)/p ng. Traff, Optimal,
Non-pipelined Reduce-scatter and Allreduce Algorithms, arXiv:2410.14234, 2024.
"""

from __future__ import annotations

from hpcsync.schedules.base import (
    Action,
    Fold,
    Kind,
    Schedule,
    Step,
    Transfer,
    check_group,
    trivial,
)

NAME = "doubling"


def build(kind: Kind, rank: int, size: int) -> Schedule:
    """The doubling schedule of `rank`: one chunk for an allreduce, else rank r owns chunk r.

    Raises ValueError.
    """
    check_group(rank, size)
    if size == 1:
        return trivial(NAME, kind)
    if kind is Kind.ALLREDUCE:
        return Schedule(NAME, kind, rank, size, 1, tuple(_exchanges(rank, size)), (0, 1))
    steps = []
    distance = 1
    while distance < size:
        count = min(distance, size - distance)
        before, after = (rank - distance) % size, (rank + distance) % size
        have = _run(before, rank, count, size)
        want = _run(after, after, count, size)
        if kind is Kind.ALLGATHER:
            steps.append(Step(have, want, Action.COPY))
        else:
            steps.append(Step(want, have, Action.REDUCE))
        distance *= 2
    if kind is Kind.REDUCE_SCATTER:
        steps.reverse()
    return Schedule(NAME, kind, rank, size, size, tuple(steps), (rank, rank + 1))


def _exchanges(rank: int, size: int) -> list[Step]:
    fold = Fold.of(size)
    core = fold.core(rank)
    if core is None:
        whole = (Transfer(rank - 1, 0, 1),)
        return [Step(whole, (), Action.REDUCE), Step((), whole, Action.COPY)]
    steps = []
    for bit in range(fold.power.bit_length() - 1):
        whole = (Transfer(fold.rank(core ^ (1 << bit)), 0, 1),)
        steps.append(Step(whole, whole, Action.REDUCE))
    partner = fold.partner(rank)
    if partner is not None:
        whole = (Transfer(partner, 0, 1),)
        steps = [Step((), whole, Action.REDUCE), *steps, Step(whole, (), Action.COPY)]
    return steps


def _run(peer: int, start: int, count: int, size: int) -> tuple[Transfer, ...]:
    """Chunks start, start + 1, ... (count of them, modulo size) as one or two transfers."""
    stop = start + count
    if stop <= size:
        return (Transfer(peer, start, stop),)
    return Transfer(peer, start, size), Transfer(peer, 0, stop - size)
