"""The benchmarks of traces run, and say what they measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import launcher
from tools import bench_whatif

TINY = ("model.layers=1", "model.width=32", "model.heads=2", "model.context=32")


@pytest.mark.cluster
def test_a_trace_beside_steps_with_and_without_communication(tmp_path: Path) -> None:
    path, kept = tmp_path / "found.json", tmp_path / "kept"
    options = ["--rounds", "2", "--block", "2", "--json", str(path), "--keep", str(kept)]
    cluster = ["--vcluster", "nodes=2,rate=200mbit", "--ranks-per-node", "1"]
    outcome = launcher.run(0, "tools/bench_trace.py", *cluster, *options, *TINY, timeout=200)
    outcome.assert_clean()
    assert outcome.status == 0, outcome.describe()
    found = json.loads(path.read_text())
    assert [row["name"] for row in found["costs"]] == ["none", "serial", "silent", "ring", "traced"]
    assert [row["name"] for row in found["truths"]] == ["exposed", "overlap"]
    assert all(0 <= row["trace"] <= 1 for row in found["truths"])
    assert sorted(each.name for each in (kept / "trace").iterdir()) == ["node0.h5", "node1.h5"]


def test_reading_a_large_trace_is_timed() -> None:
    words = ["--ranks", "4", "--nodes", "2", "--steps", "4", "--window", "2-3"]
    outcome = launcher.run(0, "tools/bench_tracing.py", *words, timeout=120)
    assert outcome.status == 0, outcome.describe()
    assert "4 steps, " in outcome.stdout
    lines = outcome.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[-2:]] == ["summary", "export --steps 2-3"]


def test_predictions_beside_runs_are_medians_over_rounds() -> None:
    found = {"int8": [(200.0, 110.0, 100.0), (210.0, 90.0, 100.0), (220.0, 130.0, 100.0)]}
    assert bench_whatif.rows_of(found) == [["int8", "210.0", "110.0", "100.0", "+10.0%", "+30.0%"]]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["bench_trace.py", "--ranks", "2", "--only", "fast"], "no contender 'fast'"),
        (["bench_whatif.py", "--cases", "faster"], "no case 'faster'"),
    ],
)
def test_wrong_options_are_told(arguments: list[str], text: str) -> None:
    tool, *options = arguments
    outcome = launcher.run(0, f"tools/{tool}", *options)
    assert outcome.status == 2 or "bench_trace" in tool, outcome.describe()
    assert outcome.status != 0
    assert text in outcome.text
