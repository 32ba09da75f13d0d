"""Two runs, what changed between them, and how sure that is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcsync import trace
from hpcsync.errors import UserError
from hpcsync.trace.analysis.compare import Change, Comparison, check_comparable, compare, student
from hpcsync.trace.analysis.compare import welch as half_width
from hpcsync.trace.analysis.tables import collect
from hpcsync.trace.file import RunFacts
from tests.traces import make


def compared(folder: Path, first: dict[str, Any], second: dict[str, Any]) -> Comparison:
    tables, facts = [], []
    for name, plan in (("a", first), ("b", {"seed": 1, **second})):
        with trace.open(make(folder / name, **plan)) as found:
            tables.append(collect(found, found.ranks))
            facts.append(found.facts)
    return compare(tables[0], tables[1], (facts[0], facts[1]), 0.05)


def lane(found: Comparison, name: str) -> Change:
    return next(each for each in found.lanes if each.name == name)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (1e6, 1.960)]
)
def test_quantiles_of_student(freedom: float, quantile: float) -> None:
    """From the tables in any textbook."""
    assert student(0.95, freedom) == pytest.approx(quantile, rel=0.01)


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(500):
        a, b = rng.normal(0, 1, 12), rng.normal(0, 3, 6)
        hits += abs(b.mean() - a.mean()) <= half_width(a, b, 0.95)
    assert 0.92 <= hits / 500 <= 0.98
    assert half_width(np.ones(1), np.ones(5), 0.95) == np.inf
    assert half_width(np.ones(3), np.ones(5), 0.95) == 0


def test_equal_runs_are_the_same(tmp_path: Path) -> None:
    found = compared(tmp_path, {"noise": 0.05}, {"noise": 0.05})
    assert not found.slower
    assert {each.verdict for each in found.lanes if each.a_ms > 1} == {"same"}
    assert found.settings == []
    assert [each.name for each in found.buckets] == ["0", "1", "2", "3"]


def test_what_got_slower_is_named(tmp_path: Path) -> None:
    found = compared(tmp_path, {}, {"rail_ms": 6.0})
    assert found.slower
    whole, rail = lane(found, "whole"), lane(found, "wire.rail")
    assert whole.verdict == rail.verdict == "slower"
    assert lane(found, "forward").verdict == "same"
    assert whole.low < whole.change < whole.high
    assert {each.verdict for each in found.buckets} == {"slower"}
    assert compared(tmp_path / "back", {"rail_ms": 6.0}, {}).lanes[0].verdict == "faster"


def test_a_change_within_the_noise_is_not_told(tmp_path: Path) -> None:
    found = compared(tmp_path, {"noise": 0.3, "steps": 4}, {"noise": 0.3, "steps": 4, "seed": 3})
    whole = lane(found, "whole")
    assert whole.low < 0 < whole.high
    assert whole.verdict == "same"


def test_other_buckets_are_not_compared(tmp_path: Path) -> None:
    found = compared(tmp_path, {}, {"buckets": 3, "codec": "int8"})
    assert found.buckets == []
    assert found.settings == [("compress.codec", "none", "int8")]


def facts(**changes: Any) -> RunFacts:
    return RunFacts(**{"run_id": "x", "ranks": 4, "nodes": 2, "every": 1, **changes})


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (facts(ranks=8), "4 and 8 ranks"),
        (facts(nodes=4), "2 and 4 nodes"),
        (facts(config="[model]\nwidth = 3\n"), "model.width is not set in one and 3 in the other"),
        (facts(config="[train]\nglobal_batch = 8\n"), "train.global_batch"),
    ],
)
def test_runs_that_do_not_compare(other: RunFacts, told: str) -> None:
    with pytest.raises(UserError, match=told):
        check_comparable(facts(), other)


def test_runs_of_other_codecs_and_names_compare() -> None:
    deck = '[compress]\ncodec = "int8"\n[run]\nname = "b"\n'
    check_comparable(facts(), facts(config=deck))
