"""Nodes whose link is slow.

Ranks that exchange over a slow link all take equally long for it, so their events do not tell whose
link it is. What was measured of each node's link does (``trace.links``), from three nodes on: two
have one link between them, and nothing to compare it with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .findings import Finding
from .straggler import LEAST_SHARE
from .tables import Tables

SLOW = 0.6  # of the middle node's bandwidth
_VERY_SLOW = 0.3  # ranks on busy cores measure half of what a link has, at times
_ADVICE = "look at its cable, port and other traffic; compress.codec=auto sends fewer bytes over it"


def slow_links(tables: Tables, links: Mapping[str, Any]) -> list[Finding]:
    """Nodes whose link holds up the others.

    Args:
        links: of the run; ``rates`` are measurements, each of all nodes' bytes/s, the earliest
            first.
    """
    measured = [each for told in links.get("rates", ()) if len(each := _rates(told)) >= 3]
    moving = tables.mean("wire.rail") + tables.mean("wire.world")
    if not measured or moving < LEAST_SHARE / 2 * tables.mean("whole"):
        return []
    found = []
    for node in sorted(measured[-1]):
        told = [each for each in measured if node in each]
        shares = [each[node] / float(np.median(list(each.values()))) for each in told]
        if not _lasting(shares):
            continue
        last = max(at for at, share in enumerate(shares) if share < SLOW)
        share, rate = shares[last], told[last][node]
        found.append(
            Finding(
                kind="link",
                node=node,
                lane="wire.rail",
                lost_ms=moving / 1e6 * max(1 - share, 0.0),
                text=f"link of node {node} is slow: {rate / 1e6:.0f} MB/s were measured, "
                f"{rate / share / 1e6:.0f} of most nodes",
                advice=_ADVICE,
            )
        )
    return found


def _rates(told: Mapping[str, Any]) -> dict[int, float]:
    return {
        int(node): float(rate) for node, rate in told.get("nodes", {}).items() if float(rate) > 0
    }


def _lasting(shares: Sequence[float]) -> bool:
    """Whether a node's link was slow more than once, in most measurements or in the last two; or
    is so slow now that no busy moment explains it."""
    slow = [share < SLOW for share in shares]
    again = sum(slow) > 1 and (2 * sum(slow) > len(slow) or all(slow[-2:]))
    return again or shares[-1] < _VERY_SLOW
