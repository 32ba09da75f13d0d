"""Nodes' links are measured in pairs, and a slow one is told by its node."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpcsync import trace
from hpcsync.trace.analysis.findings import Finding
from hpcsync.trace.analysis.summary import summarise
from hpcsync.trace.links import partner, turns
from tests.traces import make

FAST = 1.2e8


@pytest.mark.parametrize("nodes", [2, 3, 4, 5, 6, 7, 8, 64, 511, 512])
def test_pairs_differ_from_turn_to_turn(nodes: int) -> None:
    met: list[set[int]] = [set() for _ in range(nodes)]
    for turn in range(turns(nodes)):
        for node in range(nodes):
            other = partner(node, nodes, turn)
            if other is not None:
                assert other != node
                assert partner(other, nodes, turn) == node
                assert other not in met[node]
                met[node].add(other)
    assert min(map(len, met)) >= min(nodes - 1, 2)


def findings(folder: Path, rates: list[list[float]], **plan: Any) -> list[Finding]:
    told = [
        {"step": step, "nodes": {str(node): rate for node, rate in enumerate(each)}}
        for step, each in enumerate(rates)
    ]
    plan = {"ranks": 3, "nodes": 3, "rail_ms": 8.0, "links": json.dumps({"rates": told}), **plan}
    with trace.open(make(folder, **plan)) as found:
        return summarise(found, found.ranks).findings


@pytest.mark.parametrize(
    "rates",
    [
        [[FAST, 2e7, FAST]],
        [[FAST, 2e7, FAST], [FAST, 2.5e7, 1.2e8]],
        [[FAST, FAST, FAST], [FAST, FAST, FAST], [FAST, 2e7, FAST]],
        [[FAST, 2e7, FAST], [FAST, 2e7, FAST], [FAST, FAST, FAST]],
        [[FAST, 6e7, FAST], [FAST, 6e7, FAST]],
        [[FAST, FAST, FAST]] * 4 + [[FAST, 6e7, FAST]] * 2,
    ],
    ids=["once", "throughout", "at last", "mostly", "half", "half at last"],
)
def test_a_slow_link_is_named_by_what_was_measured(
    tmp_path: Path, rates: list[list[float]]
) -> None:
    (fault,) = findings(tmp_path, rates)
    assert (fault.kind, fault.node) == ("link", 1)
    rate = next(each[1] for each in reversed(rates) if each[1] < FAST)
    assert f"link of node 1 is slow: {rate / 1e6:.0f} MB/s were measured, 120 of" in fault.text


@pytest.mark.parametrize(
    "rates",
    [
        [],
        [[FAST, 1.0e8, 0.9e8]],
        [[FAST, 2e7, FAST], [FAST, FAST, FAST]],
        [[FAST, FAST, FAST], [7.2e7, 1.36e8, 1.36e8]],
        [[FAST, 6e7, FAST]],
        [[FAST, 2e7]],
        [[2e7, 2e7, 2e7]],
    ],
    ids=["never", "even", "before", "a busy moment", "and no other", "two nodes", "all"],
)
def test_no_link_is_named_without_need(tmp_path: Path, rates: list[list[float]]) -> None:
    assert findings(tmp_path, rates) == []


def test_a_slow_link_that_costs_nothing_is_not_named(tmp_path: Path) -> None:
    assert findings(tmp_path, [[FAST, 2e7, FAST]], rail_ms=0.01, node_ms=0.01) == []
