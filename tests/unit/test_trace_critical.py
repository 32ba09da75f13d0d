"""The critical path of steps whose schedule is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcsync import trace
from hpcsync.trace.analysis.account import names_of
from hpcsync.trace.analysis.critical import Path as Critical
from hpcsync.trace.analysis.critical import critical_path, shares
from hpcsync.trace.analysis.exchange import exchange
from hpcsync.trace.analysis.tables import collect
from tests.traces import Plan, make, schedule


def paths(folder: Path, plan: Plan) -> list[Critical]:
    with trace.open(make(folder, plan)) as found:
        tables = collect(found, found.ranks, lambda there: there)
        split, names = exchange(tables), names_of(found.names)

        def fetch(rank: int, step: int) -> np.ndarray:
            return found.events(rank, [step])

        return [critical_path(tables, split, names, fetch, step) for step in tables.steps.tolist()]


@pytest.mark.parametrize(
    "plan",
    [
        {},
        {"ranks": 1, "nodes": 1},
        {"ranks": 8, "nodes": 4, "codec": "int8", "noise": 0.1},
        {"rail_ms": 20.0},
        {"held": {(1, 2): 40.0}},
        {"clock_off": {1: 2.0, 3: -2.0}, "unsaid": (3,)},
    ],
    ids=str,
)
def test_a_path_is_as_long_as_its_step(tmp_path: Path, plan: dict[str, Any]) -> None:
    """Whatever the clocks say: no length is taken between two of them."""
    made = Plan(steps=5, **plan)
    true = schedule(made)
    found = paths(tmp_path, made)
    lengths = (true.end - true.begin)[:, 0] / 1e6
    np.testing.assert_allclose([each.ms for each in found], lengths, rtol=1e-3)


def test_it_follows_the_slow_rank(tmp_path: Path) -> None:
    found = paths(tmp_path, Plan(steps=4, slow_forward={2: 40.0}))
    by_rank = shares(found, lambda hop: str(hop.rank))
    assert by_rank[0].name == "2"
    assert by_rank[0].share > 0.9
    forward = next(each for each in shares(found, lambda hop: hop.lane) if each.name == "forward")
    assert forward.ms == pytest.approx(70.0, rel=0.02)
    last = [hand for path in found for hand in path.handovers if hand.bucket >= 0]
    assert {hand.rank for hand in last} == {2}
    assert all(hand.told for hand in last)


def test_it_follows_the_wire_where_that_is_the_bound(tmp_path: Path) -> None:
    found = paths(tmp_path, Plan(steps=4, rail_ms=20.0))
    by_lane = shares(found, lambda hop: hop.lane)
    assert by_lane[0].name == "wire.rail"
    assert sum(each.share for each in by_lane) == pytest.approx(1.0)
    # Two buckets are on the way at once, and all four go over the wire one by one.
    assert {hop.bucket for hop in found[0].hops if hop.lane == "wire.rail"} >= {1, 3}


def test_it_follows_the_bucket_that_was_held_back(tmp_path: Path) -> None:
    found = paths(tmp_path, Plan(steps=4, held={(3, 3): 40.0}))
    assert {hand.rank for path in found for hand in path.handovers if hand.bucket == 3} == {3}


def test_hand_overs_closer_than_clocks_can_tell(tmp_path: Path) -> None:
    found = paths(tmp_path, Plan(steps=4, uncertainty_us=50_000.0))
    assert not any(hand.told for path in found for hand in path.handovers)
