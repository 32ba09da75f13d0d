"""The messages of a whole group of schedules, as arrays: who meets whom, and when.

Part of `verify`: reads schedules, pairs sends with receives, and finds the round in which each
message moves when sends are rendezvous. Needs NumPy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcsync.errors import HpcsyncError
from hpcsync.schedules.base import Action, Kind, Schedule, Step

Ints = NDArray[np.int64]

_sends = attrgetter("sends")
_recvs = attrgetter("recvs")
_fields = (attrgetter("peer"), attrgetter("lo"), attrgetter("hi"))


class VerifyError(HpcsyncError):
    """A set of schedules is wrong; `rank`, `step` and `chunk` say where, if that is known."""

    def __init__(
        self,
        problem: str,
        rank: int | None = None,
        step: int | None = None,
        chunk: int | None = None,
    ) -> None:
        self.rank, self.step, self.chunk = rank, step, chunk
        places = {"rank": rank, "step": step, "chunk": chunk}
        where = ", ".join(f"{name} {at}" for name, at in places.items() if at is not None)
        super().__init__(f"{where}: {problem}" if where else problem)


@dataclass(slots=True)
class Group:
    """All schedules as arrays. Steps are numbered through: rank r has [first[r], first[r + 1])."""

    name: str
    kind: Kind
    size: int
    chunks: int
    owned: Ints  # (size, 2)
    first: Ints  # (size + 1,)
    reduces: NDArray[np.bool_]  # a step
    sends: tuple[Ints, Ints]  # offsets by step; (transfers, 3) of peer, lo, hi
    recvs: tuple[Ints, Ints]

    def rank_of(self, steps: Any) -> Any:
        return np.searchsorted(self.first, steps, side="right") - 1

    def place(self, step: int) -> tuple[int, int]:
        """Rank and the step's number there."""
        rank = int(self.rank_of(step))
        return rank, int(step - self.first[rank])


@dataclass(slots=True)
class Messages:
    """Matched sends and receives, in the order of the sends."""

    src: Ints
    dst: Ints
    src_step: Ints
    dst_step: Ints
    lo: Ints
    hi: Ints
    of_recv: Ints  # the message of each receive


def read(schedules: Iterable[Schedule]) -> Group:
    steps_of, reduces, owned = [0], [], []
    counts: tuple[list[Ints], list[Ints]] = ([], [])
    transfers: tuple[list[Ints], list[Ints]] = ([], [])
    head: Schedule | None = None
    for rank, schedule in enumerate(schedules):
        head = head or schedule
        for field in ("name", "kind", "size", "chunks"):
            ours, theirs = getattr(schedule, field), getattr(head, field)
            if ours != theirs:
                raise VerifyError(f"{field} is {ours}, where rank 0 has {theirs}", rank)
        if schedule.rank != rank:
            raise VerifyError(f"schedule number {rank} is that of rank {schedule.rank}", rank)
        steps_of.append(len(schedule.steps))
        reduces += [step.action is Action.REDUCE for step in schedule.steps]
        owned.append(schedule.owned)
        for side, getter in enumerate((_sends, _recvs)):
            count, table = _flatten(schedule.steps, getter)
            counts[side].append(count)
            transfers[side].append(table)
    if head is None or len(owned) != head.size:
        raise VerifyError(f"{len(owned)} schedules do not make a group")
    sends, recvs = (
        (np.concatenate([[0], *counts[side]]).cumsum(), np.concatenate(transfers[side]))
        for side in (0, 1)
    )
    group = Group(
        head.name,
        head.kind,
        head.size,
        head.chunks,
        np.array(owned, np.int64).reshape(-1, 2),
        np.array(steps_of, np.int64).cumsum(),
        np.array(reduces, np.bool_),
        sends,
        recvs,
    )
    _check_transfers(group, sends)
    _check_transfers(group, recvs)
    _check_receives(group)
    return group


def _flatten(steps: tuple[Step, ...], getter: Any) -> tuple[Ints, Ints]:
    """Number of transfers by step, and all of them as rows of peer, lo, hi."""
    count = np.fromiter(map(len, map(getter, steps)), np.int64, len(steps))
    transfers = list(chain.from_iterable(map(getter, steps)))
    table = np.empty((len(transfers), 3), np.int64)
    for column, field in enumerate(_fields):
        table[:, column] = np.fromiter(map(field, transfers), np.int64, len(transfers))
    return count, table


def _check_transfers(group: Group, side: tuple[Ints, Ints]) -> None:
    peer, lo, hi = side[1].T
    steps = _steps_of(side)
    wrong = (peer < 0) | (peer >= group.size) | (peer == group.rank_of(steps))
    absent = (lo < 0) | (lo >= hi) | (hi > group.chunks)
    for bad, problem in (
        (wrong, "has no such peer"),
        (absent, "names chunks that are not there"),
    ):
        if bad.any():
            at = int(bad.argmax())
            what = f"transfer with rank {peer[at]} of chunks {lo[at]}:{hi[at]} {problem}"
            raise VerifyError(what, *group.place(int(steps[at])))


def _check_receives(group: Group) -> None:
    peer, lo, hi = group.recvs[1].T
    steps = _steps_of(group.recvs)
    falls = (steps[1:] == steps[:-1]) & (peer[1:] < peer[:-1])
    if falls.any():
        place = group.place(int(steps[falls.argmax()]))
        raise VerifyError("receives are not in ascending order of peer", *place)
    order = ((steps * group.chunks + lo) * (group.chunks + 1) + hi).argsort(kind="stable")
    steps, lo, hi = steps[order], lo[order], hi[order]
    differ = (lo[1:] != lo[:-1]) | (hi[1:] != hi[:-1])
    mixed = (steps[1:] == steps[:-1]) & (lo[1:] < hi[:-1]) & differ
    if mixed.any():
        at = int(mixed.argmax())
        problem = f"receives of chunks {lo[at]}:{hi[at]} and {lo[at + 1]}:{hi[at + 1]} overlap"
        raise VerifyError(problem, *group.place(int(steps[at])), int(lo[at + 1]))


def _steps_of(side: tuple[Ints, Ints]) -> Ints:
    """The step of each transfer."""
    return np.repeat(np.arange(len(side[0]) - 1), np.diff(side[0]))


def match(group: Group) -> Messages:
    """Pair the k-th send from a to b with the k-th receive of b from a."""
    send, recv = group.sends[1], group.recvs[1]
    send_step, recv_step = _steps_of(group.sends), _steps_of(group.recvs)
    src, dst = group.rank_of(send_step), group.rank_of(recv_step)
    send_pair, recv_pair = src * group.size + send[:, 0], recv[:, 0] * group.size + dst
    send_order = send_pair.argsort(kind="stable")
    recv_order = recv_pair.argsort(kind="stable")
    _check_matched(
        group,
        send_pair[send_order],
        recv_pair[recv_order],
        send_step[send_order],
        recv_step[recv_order],
        send[send_order],
        recv[recv_order],
    )
    dst_step, of_recv = np.empty_like(send_step), np.empty_like(recv_step)
    dst_step[send_order] = recv_step[recv_order]
    of_recv[recv_order] = send_order
    return Messages(src, send[:, 0], send_step, dst_step, send[:, 1], send[:, 2], of_recv)


def _check_matched(
    group: Group,
    send_pair: Ints,
    recv_pair: Ints,
    send_step: Ints,
    recv_step: Ints,
    send: Ints,
    recv: Ints,
) -> None:
    """Arguments sorted by pair (source * size + destination), then by time."""
    n = min(len(send), len(recv))
    same = (send_pair[:n] == recv_pair[:n]) & (send[:n, 1:] == recv[:n, 1:]).all(axis=1)
    if same.all() and len(send) == len(recv):
        return
    at = n if same.all() else int(same.argmin())
    # Pairs are sorted, so the side with the lower pair at the first difference has one too many.
    end = group.size**2
    ours = int(send_pair[at]) if at < len(send) else end
    theirs = int(recv_pair[at]) if at < len(recv) else end
    src, dst = divmod(min(ours, theirs), group.size)
    if ours < theirs:
        lo, hi = send[at, 1:]
        rank, step = group.place(int(send_step[at]))
        raise VerifyError(f"send of chunks {lo}:{hi} to rank {dst} has no receive", rank, step, lo)
    lo, hi = recv[at, 1:]
    rank, step = group.place(int(recv_step[at]))
    what = f"receive of chunks {lo}:{hi} from rank {src}"
    if ours > theirs:
        raise VerifyError(f"{what} has no send", rank, step, lo)
    sent = f"chunks {send[at, 1]}:{send[at, 2]} of its step {group.place(int(send_step[at]))[1]}"
    raise VerifyError(f"{what} meets {sent}", rank, step, lo)


def timing(group: Group, messages: Messages) -> tuple[Ints, Ints]:
    """Rounds in which each message moves and each step ends, with rendezvous sends."""
    moved = np.full(len(messages.src), -1)
    ended = np.full(len(group.reduces), -1)
    ends_ready = np.zeros(len(messages.src), np.int8)
    waiting = np.diff(group.sends[0]) + np.diff(group.recvs[0])
    at, last = group.first[:-1].copy(), group.first[1:]
    ranks = np.flatnonzero(at < last)
    begun = at[ranks]
    now = 0
    while len(ranks):
        sends = _ranges(group.sends[0], begun)
        recvs = messages.of_recv[_ranges(group.recvs[0], begun)]
        ends_ready[sends] += 1
        by_send = sends[ends_ready[sends] == 2]
        ends_ready[recvs] += 1
        moving = np.concatenate([by_send, recvs[ends_ready[recvs] == 2]])
        moved[moving] = now
        np.subtract.at(waiting, messages.src_step[moving], 1)
        np.subtract.at(waiting, messages.dst_step[moving], 1)
        done = ranks[waiting[at[ranks]] == 0]
        if not len(done):
            raise _deadlock(group, messages, moved, at, int(ranks[0]))
        ended[at[done]] = now
        at[done] += 1
        begun = at[done][at[done] < last[done]]
        ranks = ranks[at[ranks] < last[ranks]]
        now += 1
    return moved, ended


def _ranges(offsets: Ints, index: Ints) -> Ints:
    """Concatenation of arange(offsets[i], offsets[i + 1]) for each i of index."""
    start, count = offsets[index], offsets[index + 1] - offsets[index]
    return np.repeat(start - (count.cumsum() - count), count) + np.arange(count.sum())


def _deadlock(group: Group, messages: Messages, moved: Ints, at: Ints, rank: int) -> VerifyError:
    """Follow who waits for whom until a rank comes again, and tell the circle."""
    seen: list[int] = []
    while rank not in seen:
        seen.append(rank)
        here = (messages.src_step == at[rank]) | (messages.dst_step == at[rank])
        stuck = int((here & (moved < 0)).argmax())
        src, dst = int(messages.src[stuck]), int(messages.dst[stuck])
        rank = dst if src == rank else src
    circle = [*seen[seen.index(rank) :], rank]
    told = " which waits for ".join(
        f"rank {one} in step {at[one] - group.first[one]}" for one in circle[1:9]
    )
    return VerifyError(
        f"deadlock: waits for {told}{' ...' if len(circle) > 9 else ''}",
        rank,
        int(at[rank] - group.first[rank]),
    )
