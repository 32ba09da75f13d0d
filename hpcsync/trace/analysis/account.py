"""One rank: where the time of each of its steps went, and when its buckets came and went.

A moment of a step counts once, for the first of these that covers it:

    idle       waiting at the end of the step until all ranks have come to it
    exposed    computation stands still for the exchange of gradients: its thread works on that
               between two gradients, or waits for it at the end of the backward pass
    data, optimizer, compute (forward and backward), other (checkpoints, and what no span covers)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..events import LANE, WIRES, Events
from .intervals import Times, Union, covered, joined, union

PARTS = ("compute", "exposed", "data", "optimizer", "idle", "other")
"""That a step's time is divided into, without rest."""

STAGES = (*WIRES, "encode", "combine", "decode")
"""Parts of an exchange; a wire's stage includes the coding that is done in it."""

COLUMNS = (
    *("whole", *PARTS),
    *("agreement", "driven", "forward", "backward", "checkpoint", "uncovered"),
    *("comm", *STAGES),
    *("bytes", *(f"bytes.{name}" for name in WIRES)),
)
"""Of a step, in ns (bytes in bytes): ``agreement`` is the wait at the end of the
step, ``driven`` the part of ``exposed`` within the backward
pass, ``comm`` the time in which a bucket was being exchanged."""


class Names(NamedTuple):
    """Codes in a file of the names that share a lane with others."""

    exposed: int
    driven: int
    agreement: int
    fill: int
    queued: int
    combine: int


def names_of(texts: tuple[str, ...]) -> Names:
    """Their codes in this file; -1 for one that it does not know."""
    return Names(*(texts.index(name) if name in texts else -1 for name in Names._fields))


@dataclass(frozen=True, slots=True)
class Buckets:
    """Buckets of a rank, (steps, buckets): ns of the rank's own clock, NaN where there was none.

    Attributes:
        fill: from the first gradient to the last.
        launched, first, done: when it was launched, began its first round, and was finished.
        backward: when the step's last backward pass began, (steps,).
        nbytes: size in bytes.
    """

    index: NDArray[np.int64]
    fill: NDArray[np.float64]
    launched: NDArray[np.float64]
    first: NDArray[np.float64]
    done: NDArray[np.float64]
    nbytes: NDArray[np.float64]
    backward: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Account:
    """A rank's steps.

    Attributes:
        steps: (steps,), ascending.
        columns: of ``COLUMNS``, (steps,) each.
        begin, arrive, end: of the step, its arrival at the agreement, and the end of that; ns of
            the rank's own clock.
    """

    steps: NDArray[np.int64]
    columns: dict[str, NDArray[np.float64]]
    begin: NDArray[np.float64]
    arrive: NDArray[np.float64]
    end: NDArray[np.float64]
    buckets: Buckets


def account(events: Events, names: Names) -> Account | None:
    """The account of a rank's complete steps; None if there is none.

    Args:
        events: of one rank, on its own clock, in any order.
    """
    begun = events[events["lane"] == LANE["step"]]
    steps = np.unique(begun["step"]).astype(np.int64)
    if not steps.shape[0]:
        return None
    # A step whose own span is missing was cut off: by a kill, or by the ring.
    place = np.searchsorted(steps, events["step"])
    whole = steps[np.minimum(place, steps.shape[0] - 1)] == events["step"]
    events, place = events[whole], place[whole]
    return _Rank(events, place, steps, names).account()


class _Rank:
    """The work of ``account``: masks over a rank's events, and the windows of its steps."""

    def __init__(
        self, events: Events, place: NDArray[np.int64], steps: NDArray[np.int64], names: Names
    ) -> None:
        self.lane, self.name = events["lane"], events["name"]
        # Fields of records lie apart in memory.
        self.start = np.ascontiguousarray(events["start"])
        self.end = np.ascontiguousarray(events["end"])
        self.events, self.place, self.steps, self.names = events, place, steps, names
        main = np.isin(self.lane, [LANE[name] for name in ("step", *_MAIN)])
        self.low = np.full(steps.shape, np.iinfo(np.int64).max)
        self.high = np.full(steps.shape, np.iinfo(np.int64).min)
        np.minimum.at(self.low, place[main], self.start[main])
        np.maximum.at(self.high, place[main], self.end[main])

    def of(self, lane: str, name: int | None = None) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = self.lane == LANE[lane]
        return found if name is None else found & (self.name == name)

    def union(self, mask: NDArray[np.bool_]) -> Union:
        return union(self.start[mask], self.end[mask])

    def within(self, spans: Union) -> NDArray[np.float64]:
        return covered(spans, self.low, self.high).astype(np.float64)

    def account(self) -> Account:
        agreement = self.of("wait", self.names.agreement)
        columns = self._parts(agreement) | self._exchange()
        end = self.high.astype(np.float64)
        arrive = end.copy()
        arrive[self.place[agreement]] = self.start[agreement]
        return Account(
            steps=self.steps,
            columns=columns,
            begin=self.low.astype(np.float64),
            arrive=arrive,
            end=end,
            buckets=self._buckets(),
        )

    def _parts(self, agreement: NDArray[np.bool_]) -> dict[str, NDArray[np.float64]]:
        exposed = self.of("wait") & ~agreement
        forward, backward = self.of("forward"), self.of("backward")
        found = {"whole": (self.high - self.low).astype(np.float64)}
        taken, so_far = Union(self.start[:0], self.end[:0]), np.zeros(self.steps.shape)
        found["driven"] = self.within(self.union(self.of("wait", self.names.driven)))
        for part, mask in (
            ("idle", agreement),
            ("exposed", exposed),
            ("data", self.of("data")),
            ("optimizer", self.of("optimizer")),
            ("compute", forward | backward),
            ("checkpoint", self.of("checkpoint")),
        ):
            taken = joined(taken, self.union(mask))
            reached = self.within(taken)
            found[part], so_far = reached - so_far, reached
        found["agreement"] = found["idle"].copy()
        found["uncovered"] = found["whole"] - so_far
        found["other"] = found["uncovered"] + found["checkpoint"]
        found["forward"] = self.within(self.union(forward))
        found["backward"] = self.within(self.union(backward))
        return found

    def _exchange(self) -> dict[str, NDArray[np.float64]]:
        buckets = self.union(self.of("bucket"))
        combine = self.of("encode", self.names.combine)
        found = {
            "comm": self.within(buckets),
            "encode": self.within(self.union(self.of("encode") & ~combine)),
            "combine": self.within(self.union(combine)),
            "decode": self.within(self.union(self.of("decode"))),
            "bytes": self._bytes(self.of("bucket")),
        }
        for lane in WIRES:
            mask = self.of(lane)
            found[lane] = self.within(self.union(mask))
            found[f"bytes.{lane}"] = self._bytes(mask)
        return found

    def _bytes(self, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
        count = self.steps.shape[0]
        total = np.bincount(self.place[mask], self.events["bytes"][mask], count)
        return total.astype(np.float64)

    def _buckets(self) -> Buckets:
        mask = self.of("bucket")
        numbers = self.events["bucket"]
        index = np.unique(numbers[mask]).astype(np.int64)
        shape = (self.steps.shape[0], index.shape[0])

        def table(mask: NDArray[np.bool_], values: NDArray[np.int64]) -> NDArray[np.float64]:
            made = np.full(shape, np.nan)
            if index.shape[0]:
                column = np.searchsorted(index, numbers[mask]).clip(max=index.shape[0] - 1)
                known = index[column] == numbers[mask]
                made[self.place[mask][known], column[known]] = values[mask][known]
            return made

        duration = self.end - self.start
        fill, queued = self.of("queue", self.names.fill), self.of("queue", self.names.queued)
        launched = table(mask, self.start)
        backward = np.full(shape[0], np.nan)
        passes = self.of("backward")
        np.fmax.at(backward, self.place[passes], self.start[passes].astype(np.float64))
        return Buckets(
            index=index,
            fill=table(fill, duration),
            launched=launched,
            first=launched + np.nan_to_num(table(queued, duration)),
            done=table(mask, self.end),
            nbytes=table(mask, self.events["bytes"]),
            backward=backward,
        )


_MAIN = ("data", "forward", "backward", "optimizer", "wait")

__all__ = ["COLUMNS", "PARTS", "STAGES", "Account", "Buckets", "Times", "account", "names_of"]
