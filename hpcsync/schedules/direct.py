"""Direct exchange: rank j owns chunk j, gets every part of it, adds, and returns the sum.

One step each way. Every sum is taken in rank order at one place, whatever the bucket, so the
result does not depend on how a buffer is cut. Costs 2(p-1)a + 2(p-1)/p nb + (p-1)/p ng.

The pairwise-exchange reduce-scatter of Thakur, Rabenseifner and Gropp (Optimization of Collective
Communication Operations in MPICH, IJHPCA 19(1), 2005, section 4.4) with its p - 1 exchanges
posted at once, and the mirror image of it as allgather. With fewer owners than ranks it is how an
uneven node folds onto its rails.
"""

from __future__ import annotations

from itertools import repeat

from hpcsync.schedules.base import Action, Kind, Schedule, Step, Transfer, check_group, trivial

NAME = "direct"


def build(kind: Kind, rank: int, size: int, owners: int | None = None) -> Schedule:
    """The direct schedule of `rank`; only ranks below `owners` (all by default) own a chunk.

    `chunks` equals the number of owners. Raises ValueError.
    """
    check_group(rank, size)
    owners = size if owners is None else owners
    if not 1 <= owners <= size:
        raise ValueError(f"{owners} owners in a group of {size} ranks")
    if size == 1:
        return trivial(NAME, kind)
    mine = rank < owners
    owned = (rank, rank + 1) if mine else (0, 0)
    others = [*range(rank), *range(rank + 1, size)]
    targets = others[: owners - mine]
    parts = tuple(map(Transfer, targets, targets, [target + 1 for target in targets]))
    own = tuple(map(Transfer, others, repeat(rank), repeat(rank + 1))) if mine else ()
    reduce = Step(_after(parts, rank % owners), own, Action.REDUCE)
    gather = Step(_after(own, rank), parts, Action.COPY)
    if kind is Kind.REDUCE_SCATTER:
        steps: tuple[Step, ...] = (reduce,)
    elif kind is Kind.ALLGATHER:
        steps = (gather,)
    else:
        steps, owned = (reduce, gather), (0, owners)
    return Schedule(NAME, kind, rank, size, owners, steps, owned)


def _after(transfers: tuple[Transfer, ...], first: int) -> tuple[Transfer, ...]:
    """From the peer after this rank on and around: no owner is everyone's first target."""
    return transfers[first:] + transfers[:first]
