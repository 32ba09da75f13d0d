"""What Prometheus is told: samples as it would read them, by file and by HTTP."""

from __future__ import annotations

import builtins
import math
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcsync.config import MetricsConfig
from hpcsync.errors import UserError
from hpcsync.observers import (
    CheckpointRecord,
    LevelDetail,
    RunInfo,
    StepDetail,
    StepRecord,
    standard,
)
from hpcsync.observers.detail import of_step
from hpcsync.trace.events import EVENT, LANE, NAMES

DETAIL = StepDetail(
    data_s=0.002,
    update_s=0.01,
    queued=3,
    stalls=1,
    checkpoint_s=2.5,
    levels=(
        LevelDetail(level="node", transfers_s=(1e-4,), busy_s=1e-4),
        LevelDetail(
            level="rail",
            codec="int8",
            sent_bytes=1000.0,
            plain_bytes=4000.0,
            busy_s=0.02,
            transfers_s=(0.015, 0.02, 1.5),
        ),
    ),
)


def info(folder: Path, **changes: Any) -> RunInfo:
    given: dict[str, Any] = {
        "folder": folder,
        "rank": 3,
        "ranks": 4,
        "nodes": 2,
        "host": "n1",
        "steps": 10,
        "tokens_per_step": 2048,
        "unit": "byte",
        "val_unit": "bits/byte",
        "codec": "int8",
        "algorithm": "hierarchical",
        "every_s": 0.0,
        "run_id": "abcd1234",
        "node": 1,
        "local_rank": 0,
    }
    return RunInfo(**{**given, **changes})


def record(step: int, **changes: Any) -> StepRecord:
    given: dict[str, Any] = {
        "step": step,
        "loss": 5.0 - 0.1 * step,
        "lr": 1e-3,
        "grad_norm": 1.25,
        "step_ms": 100.0,
        "compute_ms": 85.0,
        "comm_ms": 40.0,
        "exposed_comm_ms": 10.0,
        "wait_ms": 5.0,
        "tokens_per_s": 20480.0,
        "internode_bytes": 1000.0,
        "loss_scale": 1.0,
        "skipped": False,
        "codec": "int8",
    }
    return StepRecord(**{**given, **changes})


Sample = tuple[str, dict[str, str], float]


def parsed(text: str) -> list[Sample]:
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus_client missing")
    return [
        (sample.name, dict(sample.labels), sample.value)
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    ]


def value(samples: list[Sample], name: str, **labels: str) -> float:
    (found,) = (
        each[2]
        for each in samples
        if each[0] == f"hpcsync_{name}" and labels.items() <= each[1].items()
    )
    return found


@pytest.fixture
def prometheus() -> Any:
    pytest.importorskip("prometheus_client", reason="prometheus_client missing")
    from hpcsync.observers.prometheus import Prometheus

    return Prometheus


@pytest.fixture
def told(prometheus: Any, tmp_path: Path) -> Iterator[list[Sample]]:
    """What stands in the file after three steps."""
    path = tmp_path / "hpcsync.prom"
    observer = prometheus(str(path))
    observer.started(info(tmp_path / "my-run"))
    observer.evaluated(0, 8.0)
    for step in (1, 2, 3):
        observer.measured(DETAIL)
        observer.stepped(record(step, skipped=step == 2))
    observer.ended("done", "")
    yield parsed(path.read_text())
    assert [each.name for each in tmp_path.iterdir()] == ["hpcsync.prom"], "renamed into place"


def test_every_sample_names_run_and_place(told: list[Sample]) -> None:
    place = {"job": "my-run", "run_id": "abcd1234", "node": "1", "rank": "3"}
    assert told
    for name, labels, _ in told:
        assert name.startswith("hpcsync_")
        assert place.items() <= labels.items()


def test_the_state_of_the_run(told: list[Sample]) -> None:
    assert value(told, "run_info", algorithm="hierarchical", codec="int8", ranks="4") == 1
    assert value(told, "running") == 0
    assert (value(told, "step"), value(told, "steps_total")) == (3, 3)
    assert value(told, "skipped_steps_total") == 1
    assert value(told, "loss") == pytest.approx(4.7)
    assert value(told, "val_loss", unit="bits/byte") == 8
    assert value(told, "learning_rate") == 1e-3
    assert value(told, "tokens_total", unit="byte") == 3 * 2048
    assert value(told, "exposed_ratio") == pytest.approx(0.1)
    assert value(told, "internode_bytes_total", codec="int8") == 3000


def test_times_are_histograms_in_seconds(told: list[Sample]) -> None:
    for name, mean in (("step", 0.1), ("compute", 0.085), ("wait", 0.005), ("update", 0.01)):
        assert value(told, f"{name}_seconds_count") == 3
        assert value(told, f"{name}_seconds_sum") == pytest.approx(3 * mean)
    assert value(told, "aggregation_seconds_sum", codec="int8") == pytest.approx(0.12)
    # An upper bound belongs to its bin.
    assert value(told, "step_seconds_bucket", le="0.05") == 0
    assert value(told, "step_seconds_bucket", le="0.1") == 3
    assert value(told, "step_seconds_bucket", le="+Inf") == 3


def test_levels_have_bytes_latency_and_throughput(told: list[Sample]) -> None:
    rail = {"level": "rail", "codec": "int8"}
    assert value(told, "sent_bytes_total", **rail) == 3000
    assert value(told, "uncoded_bytes_total", **rail) == 12000
    assert value(told, "busy_seconds_total", **rail) == pytest.approx(0.06)
    assert value(told, "throughput_bytes_per_second", **rail) == pytest.approx(50000)
    assert value(told, "transfer_seconds_bucket", le="0.02", **rail) == 6
    assert value(told, "transfer_seconds_bucket", le="2.0", **rail) == 9
    names = {name for name, labels, _ in told if labels.get("level") == "node"}
    assert "hpcsync_uncoded_bytes_total" not in names, "nobody counted them"


def test_queue_stalls_and_checkpoints(told: list[Sample]) -> None:
    assert value(told, "queue_length") == 3
    assert value(told, "stalls_total") == 3
    assert value(told, "checkpoint_stall_seconds_sum") == 7.5


def test_checkpoints_and_those_that_were_not_saved(prometheus: Any, tmp_path: Path) -> None:
    path = tmp_path / "hpcsync.prom"
    observer = prometheus(str(path))
    observer.started(info(tmp_path))
    observer.checkpointed(CheckpointRecord(step=5, nbytes=1000, durable_s=2.5))
    observer.checkpointed(CheckpointRecord(step=7, problem="No space left on device"))
    observer.ended("done", "")
    told = parsed(path.read_text())
    assert value(told, "checkpoint_seconds_sum") == 2.5
    assert value(told, "checkpoint_bytes_total") == 1000
    assert value(told, "checkpoint_step") == 5
    assert value(told, "checkpoint_timestamp_seconds") > 1.7e9
    assert value(told, "checkpoint_failures_total") == 1
    assert value(told, "checkpoint_failed") == 1


def test_what_nobody_measures_is_not_exported(prometheus: Any, tmp_path: Path) -> None:
    path = tmp_path / "hpcsync.prom"
    observer = prometheus(str(path))
    observer.started(info(tmp_path))
    observer.stepped(record(1, loss=math.nan))
    observer.ended("failed", "")
    text = path.read_text()
    for name in (
        "queue",
        "stalls",
        "checkpoint_s",
        "checkpoint_failed",
        "sent_bytes",
        "transfer",
        "data",
        "val_loss",
    ):
        assert f"hpcsync_{name}" not in text
    assert math.isnan(value(parsed(text), "loss"))


def test_names_follow_the_conventions(prometheus: Any) -> None:
    """https://prometheus.io/docs/practices/naming: base units, _total on counters alone."""
    from hpcsync.observers.prometheus import FAMILIES

    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    for family in FAMILIES:
        assert family.name.endswith("_total") == (family.kind == "counter"), family.name
        assert bool(family.bounds) == (family.kind == "histogram"), family.name
        assert list(family.bounds) == sorted(set(family.bounds))
        if family.kind == "histogram":
            assert family.name.endswith("_seconds")
        assert not any(unit in family.name for unit in ("_ms", "_mb", "percent")), family.name
        assert family.text.endswith(".")


def test_a_scrape_by_http(prometheus: Any, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    observer = prometheus(port=port - 1)
    observer.started(info(tmp_path, local_rank=1))
    observer.stepped(record(7))
    url = f"http://127.0.0.1:{port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as reply:
        samples = parsed(reply.read().decode())
    assert (value(samples, "step"), value(samples, "running")) == (7, 1)
    observer.ended("done", "")
    with pytest.raises(OSError):
        urllib.request.urlopen(url, timeout=1)


def test_a_port_that_is_taken_is_one_line(prometheus: Any, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        observer = prometheus(port=other.getsockname()[1])
        with pytest.raises(UserError, match=r"metrics.http_port: cannot listen on port \d+") as at:
            observer.started(info(tmp_path))
        assert "\n" not in str(at.value)
    with pytest.raises(UserError, match=r"metrics\.http_port"):
        prometheus(port=65535).started(info(tmp_path, local_rank=1))


def test_a_file_that_cannot_be_written_is_one_line(prometheus: Any, tmp_path: Path) -> None:
    observer = prometheus(str(tmp_path / "nowhere" / "x.prom"))
    with pytest.raises(UserError, match=r"metrics.textfile: .*x.prom cannot be written") as at:
        observer.started(info(tmp_path))
    assert "\n" not in str(at.value)


def test_a_disk_that_fills_up_does_not_end_the_run(
    prometheus: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "metrics"
    folder.mkdir()
    observer = prometheus(str(folder / "x.prom"))
    observer.started(info(tmp_path))
    (folder / "x.prom").unlink()
    folder.rmdir()
    observer._written_s = -math.inf
    observer.stepped(record(1))
    observer._written_s = -math.inf
    observer.stepped(record(2))
    observer.ended("done", "")
    assert capsys.readouterr().err.count("the run goes on") == 1


# Which ranks export


def exporters(rank: int, **keys: Any) -> list[Any]:
    from hpcsync.observers.prometheus import Prometheus

    members = standard(rank, MetricsConfig(**keys)).members
    return [each for each in members if isinstance(each, Prometheus)]


def test_nothing_is_exported_unless_the_deck_says_so() -> None:
    assert not exporters(0)
    assert not standard(0, MetricsConfig()).wants_detail()


def test_the_ranks_that_the_deck_names_export(prometheus: Any) -> None:
    assert len(exporters(2, http_port=9400, http_ranks=(0, 2))) == 1
    assert not exporters(1, http_port=9400, http_ranks=(0, 2))
    assert len(exporters(0, textfile="a.prom")) == 1
    assert not exporters(1, textfile="a.prom")
    (own,) = exporters(1, textfile="a-{rank}.prom")
    assert own._textfile == "a-1.prom"
    assert standard(0, MetricsConfig(textfile="a.prom")).wants_detail()


@pytest.mark.parametrize(
    ("keys", "key"), [({"textfile": "a.prom"}, "textfile"), ({"http_port": 9400}, "http_port")]
)
def test_a_missing_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], key: str
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("prometheus_client"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'hpcsync\[metrics\]'") as at:
        standard(0, MetricsConfig(**keys))
    assert str(at.value).startswith(f"metrics.{key}: ")
    assert "\n" not in str(at.value)


# What a rank's spans say


def spans(*rows: tuple[str, str, float, float, int]) -> Any:
    """Events of (name, lane, start s, end s, bytes)."""
    found = np.zeros(len(rows), EVENT)
    for event, (name, lane, start, end, nbytes) in zip(found, rows, strict=True):
        event["name"], event["lane"] = NAMES.index((name, lane)), LANE[lane]
        event["start"], event["end"], event["bytes"] = start * 1e9, end * 1e9, nbytes
    return found


def test_spans_become_what_is_measured() -> None:
    found = of_step(
        spans(
            ("batch", "data", 0, 1, 0),
            ("optimizer", "optimizer", 9, 9.5, 0),
            ("queued", "queue", 2, 4, 0),
            ("queued", "queue", 3, 5, 0),
            ("queued", "queue", 6, 7, 0),
            ("fill", "queue", 2, 7, 0),
            ("transfer", "wire.rail", 2, 4, 100),
            ("transfer", "wire.rail", 3, 3.5, 50),
            ("transfer", "wire.rail", 6, 6.25, 10),
            ("transfer", "wire.node", 2, 2.5, 0),
        ),
        codecs={"rail": "int8"},
        plain_bytes={"rail": 640},
    )
    assert (found.data_s, found.update_s, found.queued) == (1.0, 0.5, 2)
    assert found.checkpoint_s is None
    assert found.stalls == 0
    node, rail = found.levels
    assert (node.level, node.codec, node.plain_bytes, node.busy_s) == ("node", "none", None, 0.5)
    assert (rail.level, rail.codec, rail.sent_bytes, rail.plain_bytes) == ("rail", "int8", 160, 640)
    assert rail.busy_s == pytest.approx(2.25)
    assert list(rail.transfers_s) == [2.0, 0.5, 0.25]


def test_a_stall_is_a_second_in_which_nothing_under_way_moves() -> None:
    moving = spans(("transfer", "wire.rail", 0, 1.5, 1), ("transfer", "wire.node", 0.8, 0.9, 1))
    assert of_step(moving).stalls == 0
    still = spans(("transfer", "wire.rail", 0, 3.5, 1), ("transfer", "wire.node", 1.2, 1.3, 1))
    assert of_step(still).stalls == 2
    apart = spans(("transfer", "wire.rail", 0, 0.5, 1), ("transfer", "wire.rail", 9, 9.5, 1))
    assert of_step(apart).stalls == 0


def test_a_step_without_spans() -> None:
    found = of_step(np.zeros(0, EVENT))
    assert (found.data_s, found.queued, found.stalls, found.levels) == (None, 0, 0, ())
