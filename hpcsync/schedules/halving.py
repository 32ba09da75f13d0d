"""Recursive halving and doubling: Rabenseifner's allreduce.

Reduce-scatter in log2 p steps: ranks at distance 1, 2, 4, ... exchange half of what they still
hold and add, the largest messages between the nearest ranks. The allgather runs the same exchanges
backwards. Core rank v ends up with the chunk whose number is v with its bits reversed.

Other rank counts are folded onto the power of two below (`Fold`): a folded rank sends everything
to its neighbour first, owns nothing, and gets the result last. With L = log2 of the power q:
2La + 2(q-1)/q nb + (q-1)/q ng, and 2a + 2nb + ng more where ranks are folded.

Rabenseifner, Optimization of Collective Reduction Operations, ICCS 2004 (LNCS 3036); Thakur,
Rabenseifner and Gropp, IJHPCA 19(1), 2005, section 4.5.
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

NAME = "halving"


def build(kind: Kind, rank: int, size: int) -> Schedule:
    """The recursive-halving schedule of `rank`; `chunks` is the largest power of two <= size.

    Raises ValueError.
    """
    check_group(rank, size)
    if size == 1:
        return trivial(NAME, kind)
    fold = Fold.of(size)
    chunks = fold.power
    core = fold.core(rank)
    reduce: list[Step] = []
    gather: list[Step] = []
    owned = (0, 0)
    if core is None:
        everything: tuple[Transfer, ...] = (Transfer(rank - 1, 0, chunks),)
        reduce.append(Step(everything, (), Action.REDUCE))
        gather.append(Step((), everything, Action.COPY))
    else:
        partner = fold.partner(rank)
        everything = () if partner is None else (Transfer(partner, 0, chunks),)
        if everything:
            reduce.append(Step((), everything, Action.REDUCE))
        owned, halvings = _halvings(fold, core)
        reduce += [Step((give,), (keep,), Action.REDUCE) for give, keep in halvings]
        gather += [Step((keep,), (give,), Action.COPY) for give, keep in reversed(halvings)]
        if everything:
            gather.append(Step(everything, (), Action.COPY))
    if kind is Kind.REDUCE_SCATTER:
        steps = reduce
    elif kind is Kind.ALLGATHER:
        steps = gather
    else:
        steps, owned = reduce + gather, (0, chunks)
    return Schedule(NAME, kind, rank, size, chunks, tuple(steps), owned)


def _halvings(fold: Fold, core: int) -> tuple[tuple[int, int], list[tuple[Transfer, Transfer]]]:
    """The chunk range that remains, and (half given, half kept) with the peer of each halving."""
    lo, hi, distance = 0, fold.power, 1
    halvings = []
    while hi - lo > 1:
        peer, middle = fold.rank(core ^ distance), (lo + hi) // 2
        if core & distance:
            halvings.append((Transfer(peer, lo, middle), Transfer(peer, middle, hi)))
            lo = middle
        else:
            halvings.append((Transfer(peer, middle, hi), Transfer(peer, lo, middle)))
            hi = middle
        distance *= 2
    return (lo, hi), halvings
