"""Nodes whose link is slow.

Ranks that exchange over a slow link all take equally long for it, so durations do not tell whose
link it is, and two nodes cannot be told apart at all. Two things can: which rank's message a stage
waited for alone, after all others had come; and what was measured of the nodes' links. A rank that
came late is waited for, too; but its own stages are the shorter for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .findings import Finding
from .straggler import LEAST_SHARE
from .tables import Tables

_SLOW = 0.6  # of the middle node's bandwidth
_ALONE = 0.15  # of the stages' time that the others waited for one node alone
_ADVICE = "look at its cable, port and other traffic; compress.codec=auto sends fewer bytes over it"


def slow_links(tables: Tables, links: Mapping[str, Any]) -> list[Finding]:
    """Nodes whose link holds up the others."""
    return _waited_for(tables) or _measured(tables, links)


def _waited_for(tables: Tables) -> list[Finding]:
    nodes = np.unique(tables.node)
    step = float(np.median(tables.columns["whole"]))
    if nodes.shape[0] < 3 or tables.rail.sum() <= 0:
        return []
    home = dict(zip(tables.ranks, tables.node.tolist(), strict=True))
    blame = {}
    for node in nodes.tolist():
        others = np.flatnonzero(tables.node != node)
        alone = np.zeros((others.shape[0], tables.steps.shape[0]))
        for at, row in enumerate(others):
            for rank, waited in tables.waits[row].items():
                if home.get(rank) == node:
                    alone[at] += waited
        theirs = tables.rail[others].mean(axis=0)
        # By so much this node's own stages are the shorter, since it came late to them.
        late = np.maximum(theirs - tables.rail[tables.node == node].mean(axis=0), 0.0)
        shares = (np.median(alone, axis=0) - late) / np.maximum(theirs, 1.0)
        blame[node] = float(np.median(shares))
    worst = max(blame, key=lambda node: blame[node])
    rest = max(value for node, value in blame.items() if node != worst)
    weight = blame[worst] * float(np.minimum(tables.columns["wire.rail"].mean(), step)) / step
    if blame[worst] < _ALONE or blame[worst] < 2 * max(rest, 0.0) or weight < LEAST_SHARE / 2:
        return []
    taken = blame[worst] * tables.mean("wire.rail")
    text = (
        f"link of node {worst} is slow: the other nodes wait for its messages alone in "
        f"{blame[worst]:.0%} of the time of their exchange between nodes"
    )
    return [
        Finding(
            kind="link",
            node=int(worst),
            lane="wire.rail",
            lost_ms=taken / 1e6,
            text=text,
            advice=_ADVICE,
        )
    ]


def _measured(tables: Tables, links: Mapping[str, Any]) -> list[Finding]:
    """By ``links["nodes"]``: bytes/s of each node's link, by the node's number."""
    told = links.get("nodes")
    if not isinstance(told, Mapping) or len(told) < 3:
        return []
    rates = {int(node): float(rate) for node, rate in told.items() if float(rate) > 0}
    usual = float(np.median(list(rates.values()))) if rates else 0.0
    return [
        Finding(
            kind="link",
            node=node,
            lane="wire.rail",
            lost_ms=tables.mean("wire.rail") / 1e6 * (1 - rate / usual),
            text=f"link of node {node} is slow: {rate / 1e6:.0f} MB/s were measured, "
            f"{usual / 1e6:.0f} of most nodes",
            advice=_ADVICE,
        )
        for node, rate in sorted(rates.items())
        if rate < _SLOW * usual
    ]
