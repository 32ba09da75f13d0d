"""Direct exchange: rank j owns chunk j; all send it their part of the chunk, it adds and returns it.

One step each way. Every sum is taken in rank order at one place, whatever the bucket, so the
result does not depend on how a buffer is cut. Costs 2(p-1)a + 2(p-1)/p nb + (p-1)/p ng.

The pairwise-exchange reduce-scatter of Thakur, Rabenseifner and Gropp (Optimization of Collective
Communication Operations in MPICH, IJHPCA 19(1), 2005, section 4.4) with its p - 1 exchanges
posted at once, and the mirror image of it as allgather. With fewer owners than ranks it is how an
uneven node folds onto its rails.
"""

from __future__ import annotations

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
    # Every rank starts with the peer after it: no owner is everyone's first target.
    order = [*range(rank + 1, size), *range(rank)]
    parts = {peer: Transfer(peer, peer, peer + 1) for peer in order if peer < owners}
    own = {peer: Transfer(peer, rank, rank + 1) for peer in order} if mine else {}
    reduce = Step(_posted(parts), _ascending(own), Action.REDUCE)
    gather = Step(_posted(own), _ascending(parts), Action.COPY)
    if kind is Kind.REDUCE_SCATTER:
        steps: tuple[Step, ...] = (reduce,)
    elif kind is Kind.ALLGATHER:
        steps = (gather,)
    else:
        steps, owned = (reduce, gather), (0, owners)
    return Schedule(NAME, kind, rank, size, owners, steps, owned)


def _posted(transfers: dict[int, Transfer]) -> tuple[Transfer, ...]:
    return tuple(transfers.values())


def _ascending(transfers: dict[int, Transfer]) -> tuple[Transfer, ...]:
    return tuple(transfers[peer] for peer in sorted(transfers))
