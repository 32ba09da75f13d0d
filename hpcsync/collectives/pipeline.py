"""How long an exchange that runs beside the backward pass takes: a simulation of events, pure.

A rank has one thread that communicates and one wire. Buckets become complete one after the other
while the backward pass runs; each is cut into segments, and a segment goes through its stages:

    bucket complete -> node sum -> encode -> wire -> add -> wire -> decode -> node gather
                       processor             wire    ...

A resource serves one stage at a time, in order of arrival. Work of the communicating thread takes
processor time from the backward pass where cores are full, so all that is still to come of that
pass is put off.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of a segment.

    Attributes:
        cpu_s: processor time of the communicating thread.
        wire_s: time that the wire is taken; 0 for a stage that does not use it.
        latency_s: from the moment the wire is free again to the arrival.
    """

    cpu_s: float
    wire_s: float = 0.0
    latency_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """A bucket: when it would be complete, in seconds of undisturbed backward pass, and what
    is then to be done: the stages of one segment, and how many such segments."""

    at_s: float
    stages: tuple[Stage, ...]
    segments: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """Seconds from the beginning of the backward pass.

    Attributes:
        backward_s: its end, with all delays.
        end_s: end of the exchange, or of the backward pass if that is later.
        wire_s: in which the wire was busy.
        cpu_s: processor time of the communicating thread.
    """

    backward_s: float
    end_s: float
    wire_s: float
    cpu_s: float


@dataclass(slots=True)
class _Segment:
    stages: tuple[Stage, ...]
    at: int = 0


class _Run:
    def __init__(
        self, arrivals: Sequence[Arrival], backward_s: float, delay: float, stretch: float
    ) -> None:
        self.arrivals = deque(sorted(arrivals, key=lambda each: each.at_s))
        self.backward_s = backward_s
        self.delay = delay
        self.stretch = stretch
        self.shift = 0.0
        self.cpu_s = 0.0
        self.wire_s = 0.0
        self.events: list[tuple[float, int, bool | None, _Segment | None]] = []
        self.numbers = itertools.count()
        self.waiting: dict[bool, deque[_Segment]] = {False: deque(), True: deque()}
        self.free = {False: True, True: True}

    def run(self) -> Outcome:
        now = 0.0
        while self.events or self.arrivals:
            ready = self.arrivals[0].at_s + self.shift if self.arrivals else math.inf
            if not self.events or ready <= self.events[0][0]:
                now = max(now, ready)
                bucket = self.arrivals.popleft()
                for _ in range(bucket.segments):
                    self.enter(_Segment(bucket.stages))
            else:
                now, _, released, segment = heapq.heappop(self.events)
                if released is not None:
                    self.free[released] = True
                if segment is not None:
                    segment.at += 1
                    self.enter(segment)
            self.serve(now)
        backward = self.backward_s + self.shift
        return Outcome(backward, max(now, backward), self.wire_s, self.cpu_s)

    def enter(self, segment: _Segment) -> None:
        if segment.at < len(segment.stages):
            self.waiting[segment.stages[segment.at].wire_s > 0].append(segment)

    def serve(self, now: float) -> None:
        for wire in (False, True):
            if not self.free[wire] or not self.waiting[wire]:
                continue
            segment = self.waiting[wire].popleft()
            stage = segment.stages[segment.at]
            busy = max(stage.wire_s, stage.cpu_s * self.stretch)
            self.cpu_s += stage.cpu_s
            if wire:
                self.wire_s += busy
            if now < self.backward_s + self.shift:
                self.shift += stage.cpu_s * self.delay
            self.free[wire] = False
            if stage.latency_s:
                self.post(now + busy, wire, None)
                self.post(now + busy + stage.latency_s, None, segment)
            else:
                self.post(now + busy, wire, segment)

    def post(self, at: float, released: bool | None, segment: _Segment | None) -> None:
        heapq.heappush(self.events, (at, next(self.numbers), released, segment))


def simulate(
    arrivals: Sequence[Arrival], backward_s: float, delay: float, stretch: float
) -> Outcome:
    """Run the buckets through.

    Args:
        backward_s: length of the backward pass when nothing disturbs it.
        delay: seconds by which one second of the communicating thread's processor time puts the
            backward pass off: 0 with cores to spare, 1 where they share one, more where ranks do.
        stretch: seconds that one second of processor time takes.
    """
    return _Run(arrivals, backward_s, delay, stretch).run()
