"""The critical path of a step: what its length follows, from rank to rank, walked backwards.

    the rank that came to the end of the step last   (it waited there least)
      optimizer <- the exchange that its backward pass waited for
        <- the rank that began that bucket last      (the exchange was shortest there)
          <- its backward pass until the bucket was launched <- forward <- data <- begin of the step

A bucket that was queued until another was done follows that one. Every length is taken on one
rank's own clock, and ranks hand over where both are done with the same thing; no clocks are
compared.
(As in Böhme and others, Scalable critical-path based performance analysis, IPDPS 2012.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..events import LANE, Events
from .account import Names
from .exchange import Exchange
from .intervals import Times, Union, covered, joined, union
from .tables import Numbers, Tables

_MAIN = ("data", "forward", "backward", "optimizer", "wait", "checkpoint")
_INSIDE = ("encode", "decode", "wire.node", "wire.rail", "wire.world")
_LEAST_NS = 20e3  # ranks that differ by less came together, whatever clocks say

Fetch = Callable[[int, int], Events]
"""(rank, step) -> the rank's events in it, on its own clock."""


@dataclass(frozen=True, slots=True)
class Hop:
    """A stretch of the path on one rank; ``bucket`` is -1 outside of exchanges."""

    rank: int
    lane: str
    bucket: int
    ms: float


@dataclass(frozen=True, slots=True)
class Handover:
    """Where the path goes over to the rank that came last.

    Attributes:
        margin_ms: by which it came after the next to last.
        told: whether that is more than the two ranks' clocks are uncertain by.
    """

    rank: int
    bucket: int
    margin_ms: float
    told: bool


@dataclass(frozen=True, slots=True)
class Path:
    """The critical path of a step, in order of time."""

    step: int
    hops: tuple[Hop, ...]
    handovers: tuple[Handover, ...]

    @property
    def ms(self) -> float:
        return sum(hop.ms for hop in self.hops)


def critical_path(tables: Tables, found: Exchange, names: Names, fetch: Fetch, step: int) -> Path:
    """The critical path of a step of the tables."""
    return _Walk(tables, found, names, fetch, int(np.searchsorted(tables.steps, step))).run()


class _Walk:
    def __init__(
        self, tables: Tables, found: Exchange, names: Names, fetch: Fetch, at: int
    ) -> None:
        self.tables, self.found, self.names, self.fetch, self.at = tables, found, names, fetch, at
        self.step = int(tables.steps[at])
        self.hops: list[Hop] = []
        self.handovers: list[Handover] = []

    def run(self) -> Path:
        idle = self.tables.columns["agreement"][:, self.at]
        if idle.any():
            row = self._last(idle, -1)
        else:
            row = int(self.tables.columns["whole"][:, self.at].argmax())
        end = self.tables.arrive[row, self.at] - self.tables.shift[row, self.at]
        self._add(row, "agreement", float(idle[row]))
        place: tuple[int, float] | None = (row, float(end))
        while place is not None:
            place = self._main(*place)
        return Path(self.step, tuple(reversed(self.hops)), tuple(reversed(self.handovers)))

    def _add(self, row: int, lane: str, ns: float, bucket: int = -1) -> None:
        if ns > 0:
            self.hops.append(Hop(self.tables.ranks[row], lane, bucket, ns / 1e6))

    def _main(self, row: int, end: float) -> tuple[int, float] | None:
        """Back along a rank's own work from ``end``: to the begin of the step, or to where another
        rank launched what this one waited for."""
        events = self.fetch(self.tables.ranks[row], self.step)
        lanes = np.isin(events["lane"], [LANE[name] for name in _MAIN])
        lanes &= (events["name"] != self.names.agreement) & (events["start"] < end)
        spans = np.sort(events[lanes], order="start")[::-1]
        begin = float(events["start"][lanes | (events["lane"] == LANE["step"])].min(initial=end))
        for span in spans:
            start, stop = float(span["start"]), min(float(span["end"]), end)
            if stop <= start:
                continue
            self._add(row, "other", end - stop)
            lane = _name(int(span["lane"]))
            if lane == "wait":
                place = self._waited(row, start, stop)
                if place is not None:
                    return place
            self._add(row, "exposed" if lane == "wait" else lane, stop - start)
            end = start
        self._add(row, "other", end - begin)
        return None

    def _waited(self, row: int, start: float, stop: float) -> tuple[int, float] | None:
        """Where the exchange was launched that a rank waited for, or None if there was none."""
        done = self.tables.done[row, self.at]
        ended = np.where((done > start) & (done <= stop + _LEAST_NS), done, -np.inf)
        if not done.shape[0] or not np.isfinite(ended.max()):
            return None
        k = int(ended.argmax())
        self._add(row, "exposed", stop - float(done[k]))
        return self._exchange(k, set())

    def _exchange(self, k: int, seen: set[int]) -> tuple[int, float]:
        """Back through a bucket's exchange, on the rank on which it was shortest."""
        tables, at = self.tables, self.at
        active = self.found.active[:, at, k]
        row = self._last(np.where(np.isnan(active), np.inf, active), int(tables.buckets[k]))
        first, launched = float(tables.first[row, at, k]), float(tables.launched[row, at, k])
        self._inside(row, k, first, float(tables.done[row, at, k]))
        seen.add(k)
        done = tables.done[row, at]
        before = np.where((done > launched) & (done <= first), done, -np.inf)
        before[list(seen)] = -np.inf
        if np.isfinite(before.max()):
            earlier = int(before.argmax())
            self._add(row, "queue", first - float(before[earlier]), int(tables.buckets[k]))
            return self._exchange(earlier, seen)
        self._add(row, "queue", first - launched, int(tables.buckets[k]))
        return row, launched

    def _inside(self, row: int, k: int, first: float, done: float) -> None:
        """What a bucket did from its first round until it was done; a moment counts for coding
        before the wire's stage that it is part of."""
        bucket = int(self.tables.buckets[k])
        events = self.fetch(self.tables.ranks[row], self.step)
        events = events[events["bucket"] == bucket]
        low, high = np.array([first], np.int64), np.array([done], np.int64)
        taken, so_far = Union(low[:0], low[:0]), 0
        parts = []
        for lane in _INSIDE:
            spans = events[events["lane"] == LANE[lane]]
            taken = joined(taken, union(_times(spans, "start"), _times(spans, "end")))
            reached = int(covered(taken, low, high)[0])
            parts.append((lane, reached - so_far))
            so_far = reached
        self._add(row, "bucket", max(done - first - so_far, 0.0), bucket)
        for lane, ns in reversed(parts):
            self._add(row, lane, float(ns), bucket)

    def _last(self, lengths: Numbers, bucket: int) -> int:
        """The rank that came last to what all are done with together: its part was shortest."""
        if lengths.shape[0] == 1:
            return 0
        first, second = np.argsort(lengths, kind="stable")[:2].tolist()
        margin = float(lengths[second] - lengths[first])
        unsure = self.tables.uncertainty[[first, second]].sum()
        told = margin > max(_LEAST_NS, unsure if np.isfinite(unsure) else 0.0)
        self.handovers.append(Handover(self.tables.ranks[first], bucket, margin / 1e6, bool(told)))
        return int(first)


def _times(events: Events, name: str) -> Times:
    return np.ascontiguousarray(events[name])


def _name(lane: int) -> str:
    return next(name for name, code in LANE.items() if code == lane)


@dataclass(frozen=True, slots=True)
class Share:
    """Of the paths of several steps: mean time a step, and share of their length."""

    name: str
    ms: float
    share: float


def shares(paths: Sequence[Path], key: Callable[[Hop], str]) -> list[Share]:
    """How the paths' length divides by ``key``, the largest first."""
    total: dict[str, float] = {}
    for path in paths:
        for hop in path.hops:
            total[key(hop)] = total.get(key(hop), 0.0) + hop.ms
    whole = sum(total.values()) or 1.0
    found = [Share(name, ms / len(paths), ms / whole) for name, ms in total.items()]
    return sorted(found, key=lambda each: -each.ms)
