"""What the benchmarks make of their samples, and how they keep results; nothing is measured."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tools import auto_figures, bench_auto, bench_learning, codec_work, contenders, links
from tools.benchmark import BenchmarkError


class Shaped:
    """A cluster that only remembers its rates; "bad" is none."""

    def __init__(self) -> None:
        self.rates: list[str] = []

    def set_rate(self, rate: str) -> None:
        if rate == "bad":
            raise links_error("no such rate")
        self.rates.append(rate)


def links_error(text: str) -> Exception:
    from tools.namespaces import ClusterError

    return ClusterError(text)


def alone() -> Any:
    """What Links asks of a job of one rank."""
    return SimpleNamespace(rank=0, barrier=lambda: None, bcast=lambda value: value)


def test_a_job_has_its_links_shaped() -> None:
    """In the order of its wishes, and an error comes back in one line."""
    cluster: Any = Shaped()
    with links.served(cluster) as folder:
        for _ in range(2):  # a later job finds what an earlier one has left
            job = links.Links(alone(), str(folder))
            job.shape("200mbit")
            job.shape("none")
        with pytest.raises(BenchmarkError, match="links of bad: no such rate"):
            job.shape("bad")
    assert cluster.rates == ["200mbit", "none"] * 2


def test_rates_are_a_list() -> None:
    """Each of them as tc spells it."""
    assert links.rates("1gbit, none") == ["1gbit", "none"]
    for text in (",", "1gbit,fast"):
        with pytest.raises(BenchmarkError):
            links.rates(text)


def test_contenders_have_known_codecs() -> None:
    """The plain ones, any codec, auto, and a codec of one's own."""
    for name in ("none", "ddp-fp16", "ddp-powersgd", "hpcsync-int8", "hpcsync-auto"):
        contenders.check(name)
    contenders.check("hpcsync-mine.codecs:Mine")
    for name in ("nccl", "hpcsync-", "hpcsync-int3", "ddp-int8", "int8"):
        with pytest.raises(BenchmarkError, match="no contender"):
            contenders.check(name)


# -- auto --------------------------------------------------------------------------------


def test_ratios_are_taken_in_pairs() -> None:
    """A machine that slows down slows both; one disturbed round counts little."""
    drift = np.linspace(1, 2, 11)
    middle, error = auto_figures.ratio(list(1.1 * drift), list(drift))
    assert middle == pytest.approx(1.1)
    assert error == pytest.approx(0, abs=1e-9)
    samples = [1.0, 1.01, 0.99, 1.0, 9.0]
    middle, error = auto_figures.ratio(samples, [1.0] * 5)
    assert middle == 1.0
    assert 0 < error < 0.02


def test_auto_is_judged_by_the_best_choice() -> None:
    """And by uncoded; the best is the one with the smallest median."""
    found = auto_figures.judge({"none": [4.0, 4.0], "bf16": [2.0, 2.0], "auto": [2.1, 2.1]})
    assert found["best"] == "bf16"
    assert found["over_best"] == pytest.approx(1.05)
    assert found["over_none"] == pytest.approx(0.525)


def test_the_summary_counts_setups() -> None:
    """Within 3%, or not, and what noise may explain."""
    rows = [
        {"over_best": 1.01, "over_none": 0.5, "error": 0.01},
        {"over_best": 1.04, "over_none": 1.0, "error": 0.01},
        {"over_best": 1.10, "over_none": 1.1, "error": 0.01},
        {"over_best": 0.99, "over_none": 0.99, "error": 0.01},
    ]
    best, none = auto_figures.summary(rows)
    assert "2 of 4 setups (50%), at worst +10.0%" in best
    assert best.endswith("standard errors: 1")
    assert "3 of 4 setups (75%)" in none
    assert none.endswith("faster: 1")


def auto_options(path: Path, *more: str) -> argparse.Namespace:
    return bench_auto.arguments().parse_args(["--json", str(path), *more])


def test_measured_setups_are_not_repeated(tmp_path: Path) -> None:
    """The file tells what is missing, whatever else is asked for then."""
    path = tmp_path / "auto.json"
    plan = bench_auto.Plan(auto_options(path))
    assert len(plan.missing("2x1")) + len(plan.missing("2x2")) >= 60
    plan.put(bench_auto.key_of("2x1", "mlp-1M", "1gbit"), {"over_best": 1.0})
    again = bench_auto.Plan(auto_options(path, "--models", "mlp-1M", "--links", "1gbit,none"))
    assert again.missing("2x1") == [("mlp-1M", "none")]
    assert again.missing("2x2") == [("mlp-1M", "1gbit"), ("mlp-1M", "none")]
    assert again.rows() == [{"over_best": 1.0}]
    with pytest.raises(BenchmarkError, match="another file"):
        bench_auto.Plan(auto_options(path, "--allow", "none,int8"))


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (["--allow", "bf16"], "allow none"),
        (["--allow", "none,int3"], "no 'int3'"),
        (["--models", "mlp"], "no 'mlp'"),
        (["--layouts", "2"], "2x1"),
        (["--layouts", "1x2"], "2x1"),
        (["--links", "fast"], "1gbit"),
    ],
)
def test_wrong_campaigns_are_told(tmp_path: Path, wrong: list[str], text: str) -> None:
    """In one line, before anything starts."""
    with pytest.raises(BenchmarkError, match=text):
        bench_auto.Plan(auto_options(tmp_path / "auto.json", *wrong))


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    """What is no result is not overwritten."""
    path = tmp_path / "notes.json"
    path.write_text('{"mine": 1}')
    with pytest.raises(BenchmarkError, match="holds no results"):
        bench_auto.Plan(auto_options(path))
    with pytest.raises(BenchmarkError, match="holds no results"):
        bench_learning.Results(learning_options(path))


# -- learning ----------------------------------------------------------------------------


def learning_options(path: Path, *more: str) -> argparse.Namespace:
    return bench_learning.arguments().parse_args(["--json", str(path), *more])


def test_codecs_bring_their_settings(tmp_path: Path) -> None:
    """Those of the promise, then the user's; uncoded is always there."""
    names = bench_learning.variants("topk/compress.ratio=0.05,int8,int8")
    assert names == ["none", "topk/compress.ratio=0.05", "int8"]
    options = learning_options(tmp_path / "l.json", "--set", "model.layers=1", "--steps", "7")
    settings = bench_learning.settings_of(names[1], 3, options)
    assert {"train.steps=7", "run.seed=3", "compress.codec=topk"} <= set(settings)
    assert settings[-2:] == ["model.layers=1", "compress.ratio=0.05"]
    assert "compress.rank=8" in bench_learning.settings_of("powersgd", 1, options)
    for wrong in ("int3", "int8/ratio"):
        with pytest.raises(BenchmarkError):
            bench_learning.variants(wrong)


def test_losses_are_compared_by_seed(tmp_path: Path) -> None:
    """Kept after each run, read again, and another setup goes elsewhere."""
    path = tmp_path / "l.json"
    results = bench_learning.Results(learning_options(path))
    for seed, plain, coded in ((1, 2.0, 2.02), (2, 4.0, 3.96), (3, 3.0, None)):
        for name, loss in (("none", plain), ("int8", coded)):
            if loss:
                results.put(name, seed, {"val_loss": loss, "sent": 8 * loss, "skipped": 0})
    again = bench_learning.Results(learning_options(path))
    assert again.get("none", 3)
    assert again.get("int8", 3) is None
    none, int8 = again.table(["none", "int8", "topk"], range(1, 6))
    assert none[:2] == ["none", "3"]
    assert int8[:5] == ["int8", "2", "2.9900", "+0.00", "+1.00"]
    assert json.loads(path.read_text())["setup"]["steps"] == 400
    with pytest.raises(BenchmarkError, match="another setup"):
        bench_learning.Results(learning_options(path, "--steps", "10"))


# -- codecs ------------------------------------------------------------------------------


def test_matrices_fill_a_piece() -> None:
    """Square, one after the other, none beyond the end."""
    for count in (1, 3, 1000, 1 << 18, 3 << 20, (1 << 20) + 5):
        found, used = codec_work.matrices(count)
        assert sum(each.shape[0] * each.shape[1] for each in found) == used <= count
        assert [each.start for each in found] == list(range(0, used, used // len(found)))
        assert used > count // 2 or count < 4


def test_sums_write_the_mean_everywhere() -> None:
    """The operations that are timed do what they are called."""
    for operation in codec_work.sums(1000):
        operation.run()
        sources, _, outs = operation.name.partition(" -> ")
        assert operation.touched == (int(sources) + int(outs)) * 4000
        assert operation.source == int(sources) * 4000


def test_heavy_tails_are_heavy() -> None:
    """Kurtosis far above a normal distribution's 3."""
    for make, heavy in ((codec_work.normal, False), (codec_work.heavy, True)):
        values = make(100_000).astype(np.float64)
        kurtosis = float((values**4).mean() / (values**2).mean() ** 2)
        assert (kurtosis > 6) is heavy
