"""What a schedule costs by the alpha-beta-gamma model, in closed form and by walking its steps.

A message of n bytes takes alpha + n beta; adding n bytes takes n gamma. A rank sends and receives
at the same time, but one message each way at a time, so a step costs
max(sends, receives) alpha + max(bytes sent, bytes received) beta + (bytes added) gamma.

Thakur, Rabenseifner and Gropp, IJHPCA 19(1), 2005, section 3, for the model, and section 4 for most
of the closed forms. The model misses in the middle sizes and knows no crowded links: it picks a
first choice and explains it; measuring decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hpcsync.schedules.base import Action, Fold, Kind, Schedule, Step


@dataclass(frozen=True, slots=True)
class Link:
    """Latency of a message (s), time of a byte (s/B), time to add a byte (s/B)."""

    alpha_s: float
    beta_s_per_byte: float
    gamma_s_per_byte: float


@dataclass(frozen=True, slots=True)
class Terms:
    """Messages, and bytes moved and added, as shares of the buffer, on the critical path."""

    messages: float
    moved: float
    added: float

    def seconds(self, nbytes: float, link: Link) -> float:
        moved, added = self.moved * nbytes, self.added * nbytes
        return (
            self.messages * link.alpha_s
            + moved * link.beta_s_per_byte
            + added * link.gamma_s_per_byte
        )


def cost(
    what: str | Schedule,
    nbytes: float,
    size: int,
    link: Link,
    kind: Kind = Kind.ALLREDUCE,
) -> float:
    """Seconds for a buffer of `nbytes` over `size` ranks.

    A name is priced by its closed form; the native algorithm as the best of the others. A schedule
    is priced by its own steps, as if its peers never made it wait, and `kind` is its own. Raises
    ValueError.
    """
    if isinstance(what, Schedule):
        if what.size != size:
            raise ValueError(f"a schedule of {what.size} ranks is not one of {size}")
        return sum(step_cost(step, nbytes / what.chunks, link) for step in what.steps)
    if what == "native":
        return min(cost(name, nbytes, size, link, kind) for name in _FORMS)
    if what not in _FORMS:
        raise ValueError(f"no cost of algorithm {what!r}; there are {', '.join(_FORMS)}, native")
    if size < 1:
        raise ValueError(f"a group of {size} ranks")
    return _FORMS[what](kind, size).seconds(nbytes, link)


def choose(nbytes: float, size: int, link: Link, kind: Kind = Kind.ALLREDUCE) -> str:
    """The name of the cheapest algorithm; among equals the first of direct, ring, halving,
    doubling, so that a sum in rank order at one place wins a tie."""
    return min(_FORMS, key=lambda name: cost(name, nbytes, size, link, kind))


def walk(schedules: Sequence[Schedule], nbytes: float, link: Link) -> float:
    """Seconds until the last rank of a group is done, with rendezvous sends: a step ends its own
    cost after the last of its peers' matching steps has begun. Schedules must have been verified.
    """
    chunk = nbytes / schedules[0].chunks
    meets = _meetings(schedules)
    begins = [[0.0] for _ in schedules]
    at = [0] * len(schedules)
    ready = list(range(len(schedules)))
    blocked: dict[tuple[int, int], list[int]] = {}
    while ready:
        rank = ready.pop()
        if at[rank] == len(schedules[rank].steps):
            continue
        others = meets[rank][at[rank]]
        missing = next(((peer, at_) for peer, at_ in others if len(begins[peer]) <= at_), None)
        if missing is not None:
            blocked.setdefault(missing, []).append(rank)
            continue
        start = max([begins[rank][-1], *(begins[peer][step] for peer, step in others)])
        begins[rank].append(start + step_cost(schedules[rank].steps[at[rank]], chunk, link))
        at[rank] += 1
        ready += [rank, *blocked.pop((rank, at[rank]), [])]
    return max(times[-1] for times in begins)


def step_cost(step: Step, chunk_bytes: float, link: Link) -> float:
    """Seconds of one step whose peers are ready, with chunks of `chunk_bytes`."""
    sent = sum(one.hi - one.lo for one in step.sends)
    received = sum(one.hi - one.lo for one in step.recvs)
    messages = max(len({one.peer for one in step.sends}), len({one.peer for one in step.recvs}))
    added = received if step.action is Action.REDUCE else 0
    terms = Terms(messages, max(sent, received), added)
    return terms.seconds(chunk_bytes, link)


def _meetings(schedules: Sequence[Schedule]) -> list[list[set[tuple[int, int]]]]:
    """For each step of each rank, the (rank, step) that it exchanges messages with."""
    posted: dict[tuple[int, int], list[int]] = {}
    for schedule in schedules:
        for number, step in enumerate(schedule.steps):
            for one in step.sends:
                posted.setdefault((schedule.rank, one.peer), []).append(number)
    meets: list[list[set[tuple[int, int]]]] = [[set() for _ in one.steps] for one in schedules]
    for schedule in schedules:
        taken: dict[int, int] = {}
        for number, step in enumerate(schedule.steps):
            for one in step.recvs:
                nth = taken.get(one.peer, 0)
                taken[one.peer] = nth + 1
                sent = posted[one.peer, schedule.rank][nth]
                meets[schedule.rank][number].add((one.peer, sent))
                meets[one.peer][sent].add((schedule.rank, number))
    return meets


def _both_ways(kind: Kind, messages: float, share: float) -> Terms:
    """`messages` and `share` of the buffer one way, to be added in a reduce-scatter."""
    if kind is Kind.REDUCE_SCATTER:
        return Terms(messages, share, share)
    if kind is Kind.ALLGATHER:
        return Terms(messages, share, 0)
    return Terms(2 * messages, 2 * share, share)


def _ring(kind: Kind, size: int) -> Terms:
    return _both_ways(kind, size - 1, (size - 1) / size)


def _halving(kind: Kind, size: int) -> Terms:
    fold = Fold.of(size)
    terms = _both_ways(kind, fold.power.bit_length() - 1, (fold.power - 1) / fold.power)
    return _folded(kind, fold, terms)


def _doubling(kind: Kind, size: int) -> Terms:
    if kind is not Kind.ALLREDUCE:
        return _both_ways(kind, (size - 1).bit_length(), (size - 1) / size)
    fold = Fold.of(size)
    steps = fold.power.bit_length() - 1
    return _folded(kind, fold, Terms(steps, steps, steps))


def _folded(kind: Kind, fold: Fold, terms: Terms) -> Terms:
    if not fold.extra:
        return terms
    extra = _both_ways(kind, 1, 1)
    return Terms(
        terms.messages + extra.messages, terms.moved + extra.moved, terms.added + extra.added
    )


_FORMS: dict[str, Callable[[Kind, int], Terms]] = {
    "direct": _ring,
    "ring": _ring,
    "halving": _halving,
    "doubling": _doubling,
}
