"""MPI's own collective: a schedule without steps, by whose name a transport knows what to call."""

from __future__ import annotations

from hpcsync.schedules.base import Kind, Schedule, check_group

NAME = "native"


def build(kind: Kind, rank: int, size: int) -> Schedule:
    """The empty schedule of `rank`: reduce-scatter and allgather have one chunk a rank.

    Raises ValueError.
    """
    check_group(rank, size)
    if kind is Kind.ALLREDUCE:
        return Schedule(NAME, kind, rank, size, 1, (), (0, 1))
    return Schedule(NAME, kind, rank, size, size, (), (rank, rank + 1))
