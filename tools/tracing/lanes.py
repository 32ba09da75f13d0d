"""How lanes look: colours, rows, and places beside each other for spans that overlap.

Colours keep a contrast of 3:1 to white (WCAG 2.2, 1.4.11), compute is blue and green, waiting red,
the wires violet, coding pink, and what is only in a queue grey.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpcsync.trace.events import LANE, LANES, Events

COLOURS = {
    "step": "#6E7681",
    "data": "#B86E00",
    "forward": "#3B87D0",
    "backward": "#1B4A99",
    "optimizer": "#1B8A5A",
    "wait": "#D1342F",
    "queue": "#868E96",
    "bucket": "#57606A",
    "encode": "#C2479A",
    "wire.node": "#128F8F",
    "wire.rail": "#7C3AED",
    "wire.world": "#4C1D95",
    "decode": "#7A1F5C",
    "checkpoint": "#7A4E1D",
}
BANDS = {
    "compute": ("data", "forward", "backward", "optimizer", "wait", "checkpoint"),
    "exchange": ("wire.node", "wire.rail", "wire.world", "encode", "decode"),
}
FEW_RANKS = 8  # of which each lane has a row of its own
_DEEPEST = 6  # places of a row; further spans share them
ON_TOP = ("encode", "decode")  # inside a span of a wire; drawn last


@dataclass(frozen=True)
class Row:
    """A line of a picture: one lane of a rank, or several.

    Attributes:
        label: the lane, or the band of lanes.
        events: in order of their start.
        slots: the place of each event, from 0 on; ``depth`` is their number.
    """

    rank: int
    node: int
    label: str
    events: Events
    slots: NDArray[np.int64]
    depth: int


def detail_of(asked: str, ranks: int) -> str:
    """ "lanes" or "compact" for so many ranks."""
    return asked if asked != "auto" else "lanes" if ranks <= FEW_RANKS else "compact"


def rows(tables: Iterable[tuple[int, int, Events]], detail: str) -> list[Row]:
    """The rows of (rank, node, events), rank by rank.

    Args:
        detail: "lanes" gives a row to each lane that any rank has, "compact" two to each rank,
            one for computing and one for the exchange.
    """
    held = list(tables)
    if detail == "compact":
        return [_band(rank, node, label, events) for rank, node, events in held for label in BANDS]
    used = {int(lane) for _, _, events in held for lane in np.unique(events["lane"])}
    shown = [index for index, name in enumerate(LANES) if index in used and name != "step"]
    return [
        _lane(rank, node, LANES[lane], events[events["lane"] == lane])
        for rank, node, events in held
        for lane in shown
    ]


def slots(start: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.int64]:
    """The lowest free place of each span, so that no two in one place overlap.

    Args:
        start: ascending.
    """
    count = start.shape[0]
    places = np.zeros(count, np.int64)
    if count < 2 or bool((start[1:] >= np.maximum.accumulate(end)[:-1]).all()):
        return places
    free: list[int] = []
    busy: list[tuple[int, int]] = []
    made = 0
    for index, (begin, stop) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        while busy and busy[0][0] <= begin:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            place = heapq.heappop(free)
        else:
            place, made = made, made + 1
        places[index] = place
        heapq.heappush(busy, (max(stop, begin + 1), place))
    return places


def _lane(rank: int, node: int, label: str, events: Events) -> Row:
    places = slots(events["start"], events["end"])
    depth = min(int(places.max(initial=0)) + 1, _DEEPEST)
    return Row(rank, node, label, events, places % depth, depth)


def _band(rank: int, node: int, label: str, events: Events) -> Row:
    lanes = [LANE[name] for name in BANDS[label]]
    events = events[np.isin(events["lane"], lanes)]
    return Row(rank, node, label, events, np.zeros(events.shape[0], np.int64), 1)
