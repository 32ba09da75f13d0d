"""tools/bench_checkpoint.py: on two ranks every way saves, and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import launcher
from tools import bench_checkpoint, savers
from tools.benchmark import BenchmarkError

pytestmark = pytest.mark.timeout(300)
TOOL = str(launcher.ROOT / "tools" / "bench_checkpoint.py")


@pytest.mark.usefixtures("mpi")
def test_every_way_saves_and_nothing_is_left(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["--ranks", "2", "--state", "12M", "--rounds", "1", "--step-ms", "0,5"]
    words += ["--replay-rounds", "1", "--block", "2", "--warm-up", "1", "--folder", str(disk)]
    words += ["--json", str(found), "model.layers=1", "model.width=24", "model.context=16"]
    outcome = launcher.run(0, TOOL, *words, cwd=tmp_path, timeout=240)
    assert outcome.status == 0, outcome.describe()
    outcome.assert_clean()
    assert list(disk.iterdir()) == []
    told = json.loads(found.read_text())
    assert [row["name"] for row in told["replay"]] == ["off", "on"]
    assert told["replay"][1]["logged_bytes"] > 0
    assert [table[0]["step_ms"] for table in told["saving"]] == [0, 5]
    for table in told["saving"]:
        assert [row["name"] for row in table] == list(bench_checkpoint.NAMES)
        for row in table:
            counts = {key: len(values) for key, values in row["samples"].items()}
            assert counts == {"stall": 1, "durable": 1, "lost": 1, "copy": 1}
            assert len(bench_checkpoint.cells(row)) == len(bench_checkpoint.HEADS)


def test_the_state_is_about_as_large_as_asked() -> None:
    state = savers.make_state(50 << 20)
    assert abs(savers.size(state) - (50 << 20)) < 8 << 20
    assert list(state) == ["model", "exp_avg", "exp_avg_sq"]


def test_unknown_ways_and_steps_are_told() -> None:
    parser = bench_checkpoint.arguments()
    assert parser.parse_args([]).step_ms == [0.0, 50.0]
    options = parser.parse_args(["--only", "plain,hpcsync, plain"])
    assert bench_checkpoint.chosen(options) == ["plain", "hpcsync"]
    with pytest.raises(BenchmarkError, match="no way 'nccl'"):
        bench_checkpoint.chosen(parser.parse_args(["--only", "nccl"]))
    for text in ("", "fast", "-1"):
        with pytest.raises(SystemExit):
            parser.parse_args([f"--step-ms={text}"])
