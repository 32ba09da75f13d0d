"""Proof that the schedules of all ranks, run together, are the collective that they claim to be.

`verify` runs them on symbols instead of numbers and raises VerifyError, with rank, step and chunk,
unless
- every send meets a receive of the same chunks, in the order of posting for each pair of ranks;
- nothing deadlocks when sends are rendezvous: a message moves once both its steps have begun, a
  step ends once all its messages have moved, and only then does the rank's next step begin;
- every chunk that must be complete holds each rank's share exactly once. A value is a set of
  ranks, one bit each; a sum of sets that overlap is an error;
- the owned chunks of a reduce-scatter or allgather are each owned by exactly one rank;
- ranks that end with the same chunk have added it up in the same way, hence have the same bits.
  This one is checked by a 64-bit hash of the tree of additions, so up to a chance collision;
- a copy never lands on a chunk that the same step sends; receives are in ascending peer order, and
  two of a step name the same chunks or none in common.

Messages are held as NumPy arrays (messages.py), and values are followed in blocks of chunks
(values.py), so that the two million transfers of a ring of 1,024 ranks take seconds.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from hpcsync.schedules.base import Kind, Schedule
from hpcsync.schedules.messages import Group, VerifyError, match, read, timing
from hpcsync.schedules.values import Flow

__all__ = ["VerifyError", "verify"]

_BLOCK_BYTES = 64 << 20


def verify(schedules: Iterable[Schedule]) -> None:
    """Prove the schedules of ranks 0 .. p - 1, in this order; raise VerifyError if they are wrong.

    The native algorithm has no steps and is MPI's to prove: only its form is checked.
    """
    group = read(schedules)
    _check_ownership(group)
    if group.name == "native":
        return
    messages = match(group)
    moved, ended = timing(group, messages)
    words = 1 if group.kind is Kind.ALLGATHER else -(-group.size // 64)
    width = max(1, _BLOCK_BYTES // (8 * words * group.size))
    for start in range(0, group.chunks, width):
        stop = min(start + width, group.chunks)
        Flow(group, messages, moved, ended, start, stop, words).run()


def _check_ownership(group: Group) -> None:
    lo, hi = group.owned.T
    if (bad := (lo < 0) | (hi < lo) | (hi > group.chunks)).any():
        rank = int(bad.argmax())
        raise VerifyError(f"owns chunks {lo[rank]}:{hi[rank]} of {group.chunks}", rank)
    if group.kind is Kind.ALLREDUCE:
        if (bad := (lo != 0) | (hi != group.chunks)).any():
            raise VerifyError("does not own every chunk of an allreduce", int(bad.argmax()))
        return
    owners = np.zeros(group.chunks + 1, np.int64)
    np.add.at(owners, lo, 1)
    np.add.at(owners, hi, -1)
    if (bad := owners.cumsum()[:-1] != 1).any():
        chunk = int(bad.argmax())
        count = int(owners.cumsum()[chunk])
        raise VerifyError(f"is owned by {count} ranks", chunk=chunk)
