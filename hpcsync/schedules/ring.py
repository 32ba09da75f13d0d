"""Ring: chunks travel once around the ranks to be summed, and once more to be spread.

In step s of the reduce-scatter rank r sends chunk r - s - 1 to r + 1 and adds chunk r - s - 2 from
r - 1, so after p - 1 steps it owns chunk r. The allgather passes the finished chunks on in the
same direction. Bandwidth-optimal: 2(p-1)a + 2(p-1)/p nb + (p-1)/p ng, and each link carries
traffic of one neighbour only.

Patarasuk and Yuan, Bandwidth Optimal All-reduce Algorithms for Clusters of Workstations, JPDC
69(2), 2009.
"""

from __future__ import annotations

from itertools import repeat

from hpcsync.schedules.base import Action, Kind, Schedule, Step, Transfer, check_group, trivial

NAME = "ring"


def build(kind: Kind, rank: int, size: int) -> Schedule:
    """The ring schedule of `rank`; it owns chunk `rank` of `size`. Raises ValueError."""
    check_group(rank, size)
    if size == 1:
        return trivial(NAME, kind)
    right, left = (rank + 1) % size, (rank - 1) % size
    # One object a chunk and direction, used by both halves: long schedules stay small. Index -1 is
    # the last chunk, so chunk numbers need no modulo.
    low, high = range(size), range(1, size + 1)
    sends = list(zip(map(Transfer, repeat(right), low, high)))
    recvs = list(zip(map(Transfer, repeat(left), low, high)))
    steps: list[Step] = []
    if kind is not Kind.ALLGATHER:
        steps += [
            Step(sends[chunk], recvs[chunk - 1], Action.REDUCE)
            for chunk in range(rank - 1, rank - size, -1)
        ]
    if kind is not Kind.REDUCE_SCATTER:
        steps += [
            Step(sends[chunk], recvs[chunk - 1], Action.COPY)
            for chunk in range(rank, rank - size + 1, -1)
        ]
    owned = (0, size) if kind is Kind.ALLREDUCE else (rank, rank + 1)
    return Schedule(NAME, kind, rank, size, size, tuple(steps), owned)
