"""The benchmarks run, agree with each other's sums and losses, and say what they measured."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from tests import launcher
from tools import bench_allreduce, benchmark
from tools.benchmark import MIB, BenchmarkError


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


@pytest.mark.cluster
def test_training_under_codecs_and_hooks_on_several_links(tmp_path: Path) -> None:
    """A table a rate, with all that was asked for; what is coded sends fewer bytes."""
    path = tmp_path / "found.json"
    tiny = ["model.layers=1", "model.width=64", "model.heads=2", "model.context=32"]
    names = ["none", "ddp", "ddp-fp16", "ddp-powersgd", "hpcsync", "hpcsync-int8"]
    options = ["--only", ",".join(names), "--rounds", "2", "--block", "2", "--json", str(path)]
    cluster = ["--vcluster", "nodes=2", "--links", "none,400mbit", "--ranks-per-node", "1"]
    tool = "tools/bench_train.py"
    outcome = launcher.run(0, tool, *cluster, *options, *tiny, timeout=200)
    outcome.assert_clean()
    assert outcome.status == 0, outcome.describe()
    rows = json.loads(path.read_text())["rows"]
    for rate in ("none", "400mbit"):
        table = {row["name"]: row for row in rows if row["rate"] == rate}
        assert list(table) == names
        assert table["hpcsync"]["loss"] == pytest.approx(table["ddp"]["loss"], rel=1e-4)
        assert table["hpcsync-int8"]["sent_bytes"] < 0.4 * table["hpcsync"]["sent_bytes"]
        assert table["ddp-fp16"]["sent_bytes"] < 0.7 * table["ddp"]["sent_bytes"]
        assert all(row["x_none"] > 0 and row["x_ddp"] > 0 for row in table.values())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["bench_train.py", "--ranks", "2", "--links", "1gbit"], "--links needs --vcluster"),
        (["bench_codecs.py", "--only", "int3"], "no codec 'int3'"),
        (["bench_codecs.py", "--mb", "0"], "above 0"),
        (["bench_learning.py", "--json", "x.json", "--codecs", "int3"], "no codec 'int3'"),
        (["bench_auto.py", "--json", "x.json", "--models", "tiny"], "no 'tiny'"),
    ],
)
def test_wrong_options_are_told(arguments: list[str], text: str) -> None:
    """One line and status 2."""
    tool, *options = arguments
    outcome = launcher.run(0, f"tools/{tool}", *options)
    assert outcome.status == 2, outcome.describe()
    assert text in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_codecs_are_timed_against_a_copy(tmp_path: Path) -> None:
    """Every operation at both sizes, native and not, and what comes out of them."""
    path = tmp_path / "found.json"
    sizes = ["--mb", "0.5", "--piece", "0.25", "--rounds", "2"]
    outcome = launcher.run(0, "tools/bench_codecs.py", *sizes, "--json", str(path), timeout=200)
    assert outcome.status == 0, outcome.describe()
    found = json.loads(path.read_text())
    rows = {(row["codec"], row["operation"], row["mib"]): row for row in found["rows"]}
    for size in (0.5, 0.25):
        assert rows["int8", "encode", size]["touched"] == pytest.approx(size * MIB * 3.25, rel=0.02)
        assert ("sum", "4 -> 4", size) in rows
    assert all(row["share"] > 0 and len(row["seconds"]) == 2 for row in found["rows"])
    quality = {row["codec"]: row for row in found["quality"]}
    assert quality["none"]["error_normal"] == 0
    assert 0 < quality["int8"]["error_normal"] < 0.02
    assert quality["int8"]["ratio_normal"] == pytest.approx(0.254, rel=0.01)
    assert 0.9 < quality["topk"]["count_over_k"] < 1.1
    assert {row["codec"] for row in found["rows"]} == {*quality, "sum"}


@pytest.mark.usefixtures("mpi")
def test_learning_goes_on_where_it_was(tmp_path: Path) -> None:
    """Runs that the file holds are not repeated."""
    path = tmp_path / "learning.json"
    tiny = ["layers=1", "width=32", "heads=2", "context=32"]
    options = ["--json", str(path), "--work", str(tmp_path / "runs"), "--codecs", "bf16"]
    options += ["--steps", "2", "--ranks", "2", "--set", "compress.warmup=0", "--nice", "1"]
    options += [part for key in tiny for part in ("--set", f"model.{key}")]
    tool = "tools/bench_learning.py"
    for seeds, said in (("1", "# 2 of 2: bf16, seed 1: "), ("2", "# 1 of 2: none, seed 2: ")):
        outcome = launcher.run(0, tool, *options, "--seeds", seeds, timeout=200)
        outcome.assert_clean()
        assert outcome.status == 0, outcome.describe()
        assert said in outcome.stdout
    runs = json.loads(path.read_text())["runs"]
    assert set(runs) == {"none 1", "bf16 1", "none 2", "bf16 2"}
    assert runs["bf16 1"]["sent"] < 0.7 * runs["none 1"]["sent"]
    assert runs["bf16 1"]["val_loss"] == pytest.approx(runs["none 1"]["val_loss"], rel=0.01)


@pytest.mark.cluster
def test_auto_is_measured_beside_each_choice(tmp_path: Path) -> None:
    """Two links in one job, and nothing to do when it is started again."""
    path = tmp_path / "auto.json"
    options = ["--json", str(path), "--links", "200mbit,none", "--models", "mlp-0.2M"]
    options += ["--layouts", "2x1", "--seconds", "0.5", "--settle", "4"]
    outcome = launcher.run(0, "tools/bench_auto.py", *options, timeout=200)
    outcome.assert_clean()
    assert outcome.status == 0, outcome.describe()
    setups = json.loads(path.read_text())["setups"]
    assert set(setups) == {"2x1 mlp-0.2M 200mbit", "2x1 mlp-0.2M none"}
    for found in setups.values():
        assert set(found["seconds"]) == {"none", "bf16", "auto"}
        assert found["chose"].split(",")[0] in ("none", "bf16")
    again = launcher.run(0, "tools/bench_auto.py", *options)
    assert again.status == 0
    assert "of 2 setups" in again.stdout
    assert "1/2" not in again.stdout
