"""What a rank's spans of one step say, for metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from ..trace.events import LANE, LANES, NAMES, WIRES, Events
from .base import LevelDetail, StepDetail

STALL_S = 1.0
_QUEUED = NAMES.index(("queued", "queue"))


def of_step(
    events: Events,
    codecs: Mapping[str, str] | None = None,
    plain_bytes: Mapping[str, float] | None = None,
) -> StepDetail:
    """What the spans of one step come to.

    Args:
        events: of one rank and one step, dtype ``trace.events.EVENT``, in any order.
        codecs: by level; ``none`` where a level is not named.
        plain_bytes: that a step would send without coding, by level.
    """
    wires = events[_of_lanes(events, WIRES)]
    return StepDetail(
        data_s=_spent(events, "data"),
        update_s=_spent(events, "optimizer"),
        queued=_most_at_once(events[events["name"] == _QUEUED]),
        stalls=_stalls(wires),
        checkpoint_s=_spent(events, "checkpoint"),
        levels=tuple(_levels(wires, codecs or {}, plain_bytes or {})),
    )


def _levels(
    wires: Events, codecs: Mapping[str, str], plain_bytes: Mapping[str, float]
) -> Iterator[LevelDetail]:
    for lane in np.unique(wires["lane"]):
        found = wires[wires["lane"] == lane]
        level = LANES[int(lane)].removeprefix("wire.")
        yield LevelDetail(
            level=level,
            codec=codecs.get(level, "none"),
            sent_bytes=float(found["bytes"].sum()),
            plain_bytes=plain_bytes.get(level),
            busy_s=_busy_s(found),
            transfers_s=((found["end"] - found["start"]) / 1e9).tolist(),
        )


def _of_lanes(events: Events, lanes: tuple[str, ...]) -> NDArray[np.bool_]:
    return np.isin(events["lane"], [LANE[lane] for lane in lanes])


def _spent(events: Events, lane: str) -> float | None:
    """Seconds in a lane whose spans do not overlap; None if there are none."""
    found = events[events["lane"] == LANE[lane]]
    return float((found["end"] - found["start"]).sum()) / 1e9 if found.shape[0] else None


def _busy_s(events: Events) -> float:
    """Seconds in which at least one span was under way."""
    found = events[np.argsort(events["start"], kind="stable")]
    ended = np.maximum.accumulate(found["end"])
    since = np.maximum(found["start"][1:], ended[:-1])
    first = found["end"][:1] - found["start"][:1]
    return float(first.sum() + np.maximum(found["end"][1:] - since, 0).sum()) / 1e9


def _under_way(events: Events) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Times at which spans begin or end, ascending, and how many are under way from each on."""
    times = np.concatenate([events["start"], events["end"]])
    changes = np.repeat([1, -1], events.shape[0])
    order = np.argsort(times, kind="stable")
    return times[order], np.cumsum(changes[order])


def _most_at_once(events: Events) -> int:
    return int(_under_way(events)[1].max(initial=0))


def _stalls(wires: Events) -> int:
    times, open_ = _under_way(wires)
    still = np.diff(times) >= STALL_S * 1e9
    return int((still & (open_[:-1] > 0)).sum())
