"""The benchmarks run, agree with each other's sums and losses, and say what they measured."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from tests import launcher
from tools import bench_allreduce, benchmark
from tools.benchmark import BenchmarkError


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    """The last size's rows of a --json file, by name."""
    return {row["name"]: row for row in json.loads(path.read_text())["rows"]}


@pytest.mark.parametrize(
    ("text", "size"), [("4096", 4096), ("64K", 65536), ("1.5m", 3 << 19), ("25MiB", 25 << 20)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    """As people write them."""
    assert benchmark.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "K", "1.2.3", "-4", "0", "4T"])
def test_other_texts_are_no_sizes(text: str) -> None:
    """argparse tells the user."""
    with pytest.raises(argparse.ArgumentTypeError, match="no size"):
        benchmark.parse_size(text)


def test_rates_are_bits_a_second() -> None:
    """In tc's spelling."""
    assert benchmark.parse_rate("1gbit") == 1e9
    assert benchmark.parse_rate("500mbit") == 5e8
    assert benchmark.parse_rate("none") == 0
    with pytest.raises(BenchmarkError, match="1gbit"):
        benchmark.parse_rate("fast")


def test_bound_is_the_buffer_over_the_link() -> None:
    """25 MiB between two nodes over 1 Gbit/s: 210 ms."""
    assert bench_allreduce.bound_seconds(25 << 20, 2, 1e9) == pytest.approx(0.2097, rel=1e-3)


def test_sizes_rise_to_the_end() -> None:
    """Both ends are measured."""
    options = bench_allreduce.arguments().parse_args(["-b", "4K", "-e", "16K", "-f", "2"])
    assert bench_allreduce.sizes(options, 4) == [1024, 2048, 4096]


def test_unknown_names_are_told() -> None:
    """One line, before ranks start."""
    with pytest.raises(BenchmarkError, match="no contender 'nccl'"):
        bench_allreduce.chosen(bench_allreduce.arguments().parse_args(["--only", "nccl"]), 2, 1)
    tool = "tools/bench_allreduce.py"
    outcome = launcher.run(0, tool, "--vcluster", "node=2")
    assert outcome.status == 2
    assert "no such key 'node'" in outcome.stderr
    assert "Traceback" not in outcome.stderr


@pytest.mark.usefixtures("mpi")
def test_every_algorithm_sums_right(tmp_path: Path) -> None:
    """All of them on three ranks of one node, with a size that does not divide."""
    path = tmp_path / "found.json"
    options = ["--sizes", "1000,100K", "--rounds", "2", "--no-gloo", "--json", str(path)]
    outcome = launcher.run(3, "tools/bench_allreduce.py", *options, timeout=120)
    outcome.assert_clean()
    assert outcome.status == 0, outcome.describe()
    rows = rows_of(path)
    assert set(rows) >= {"hpcsync direct", "hpcsync ring", "hpcsync native", "mpi"}
    assert all(row["right"] and row["time_us"] > 0 for row in rows.values())


@pytest.mark.cluster
def test_allreduce_between_nodes(tmp_path: Path) -> None:
    """A hierarchical sum sends the buffer once; direct sends it twice."""
    path = tmp_path / "found.json"
    options = ["--sizes", "1M", "--rounds", "2", "--calls", "2", "--only"]
    options += ["hierarchical,direct,mpi", "--json", str(path)]
    tool = "tools/bench_allreduce.py"
    outcome = launcher.run(0, tool, "--vcluster", "nodes=2,rate=none", *options, timeout=120)
    outcome.assert_clean()
    assert outcome.status == 0, outcome.describe()
    rows = rows_of(path)
    assert rows["hpcsync hierarchical"]["sent_bytes"] == pytest.approx(1 << 20, rel=0.3)
    assert rows["hpcsync direct"]["sent_bytes"] == pytest.approx(2 << 20, rel=0.3)


@pytest.mark.cluster
def test_training_under_hpcsync_and_ddp_gives_one_loss(tmp_path: Path) -> None:
    """Same model, data and steps; and only those that exchange send anything."""
    path = tmp_path / "found.json"
    tiny = ["model.layers=1", "model.width=32", "model.heads=2", "model.context=32"]
    options = ["--rounds", "2", "--block", "2", "--json", str(path), *tiny]
    tool = "tools/bench_train.py"
    cluster = ["--vcluster", "nodes=2,rate=1gbit", "--ranks-per-node", "1"]
    outcome = launcher.run(0, tool, *cluster, *options, timeout=200)
    outcome.assert_clean()
    assert outcome.status == 0, outcome.describe()
    rows = rows_of(path)
    assert set(rows) == {"none", "ddp", "hpcsync"}
    assert rows["hpcsync"]["loss"] == pytest.approx(rows["ddp"]["loss"], rel=1e-4)
    assert rows["hpcsync"]["sent_bytes"] > 4 * rows["none"]["sent_bytes"]
