"""How much of the communication is hidden behind computation.

    overlap = 1 - exposed / alone

``exposed`` is the time in which computation stood still for the exchange. Waiting for a rank that
is late in most steps is left out: without an exchange the others would wait for it at the end of
the step. Ranks that are late by turns cost what they do because there is an exchange.

``alone`` is what the exchange would take if nothing was computed meanwhile. The time in which
buckets are on their way would be too much for that: beside a backward pass they are on their way
for longer, since the processor has other work. The bytes of the busiest node over the rate that was
measured of its link are too little: a link is not kept busy all the time. Waiting at the end of the
backward pass nothing is computed, so by the share of that it is the former, else the latter. Where
no links were measured, it is the time on the way, from when all ranks had launched the bucket.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .exchange import Exchange, waits
from .tables import Tables

_MOST = 0.75  # of the steps


@dataclass(frozen=True, slots=True)
class Hiding:
    """Communication of a step; ns, means over ranks and steps.

    Attributes:
        alone: that it would take by itself.
        exposed: in which computation stood still for it, ranks aside that are late in most steps.
        moving: in which it stood still for transfers alone, late ranks aside.
    """

    alone: float
    exposed: float
    moving: float

    @property
    def overlap(self) -> float:
        """The hidden share; NaN where there is no communication."""
        return 1.0 - self.exposed / self.alone if self.alone > 0 else float("nan")


def hiding(tables: Tables, found: Exchange, links: Mapping[str, Any]) -> Hiding:
    """What is hidden of the exchange.

    Args:
        links: of the run; measurements under ``rates``.
    """
    driven, exposed = tables.mean("driven"), tables.mean("exposed")
    late = waits(tables, found)
    lasting = float(np.quantile(late, 1 - _MOST, axis=1).mean())
    moving = max(exposed - float(late.mean()), driven)
    taken, wire = _under_way(tables, found), _on_wire(tables, links)
    if wire is not None and wire < taken:
        taken = wire + (taken - wire) * min((moving - driven) / taken, 1.0)
    return Hiding(max(taken, exposed - lasting), exposed - lasting, moving)


def _on_wire(tables: Tables, links: Mapping[str, Any]) -> float | None:
    """ns for the bytes of the node that takes longest; None without a measurement of its link."""
    sent = (tables.columns["bytes.wire.rail"] + tables.columns["bytes.wire.world"]).mean(axis=1)
    rates = [told.get("nodes", {}) for told in links.get("rates", ())]
    longest = None
    for node in np.unique(tables.node).tolist():
        nbytes = float(sent[tables.node == node].sum())
        known = [float(each[str(node)]) for each in rates if float(each.get(str(node), 0)) > 0]
        if not nbytes or not known:
            return None
        longest = max(longest or 0.0, nbytes / float(np.median(known)) * 1e9)
    return longest


def _under_way(tables: Tables, found: Exchange) -> float:
    """ns of a step in which a bucket was moving that all ranks had launched: mean over ranks."""
    if not found.active.size:
        return 0.0
    end = np.where(np.isnan(tables.done), 0.0, tables.done)
    start = end - np.nan_to_num(found.transfer)[None]
    order = np.argsort(start, axis=2)
    start, end = (np.take_along_axis(each, order, axis=2) for each in (start, end))
    reached = np.maximum.accumulate(end, axis=2)
    before = np.concatenate([np.full((*start.shape[:2], 1), -np.inf), reached[:, :, :-1]], axis=2)
    return float(np.maximum(end - np.maximum(start, before), 0.0).sum(axis=2).mean())
