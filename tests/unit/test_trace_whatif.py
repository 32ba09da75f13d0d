"""Predictions from a trace, against traces of what was predicted."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hpcsync.trace
from hpcsync.collectives.costs import Load
from hpcsync.errors import UserError
from hpcsync.trace.analysis.whatif import Seen, observe
from hpcsync.trace.events import EVENT
from tests import traces
from tools.tracing import changes, whatif

MIB = 1 << 20
SLOW = {"ranks": 2, "nodes": 2, "steps": 8, "rail_ms": 6.0, "node_ms": 0.0}


def asked(*words: str) -> int:
    parser = argparse.ArgumentParser()
    whatif.arguments(parser)
    return whatif.run(parser.parse_args(list(words)))


def predicted(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert asked(*words, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def seen(folder: Path) -> Seen:
    with hpcsync.trace.open(folder) as trace:
        return observe((trace.events(rank) for rank in trace.ranks), trace.names)


def test_a_step_is_taken_apart(tmp_path: Path) -> None:
    found = seen(traces.make(tmp_path, ranks=4, nodes=2, steps=8, noise=0.0, rail_ms=3.0))
    assert found.steps == 8
    assert found.ranks == 4
    assert found.before_s == pytest.approx(30e-3)
    assert found.backward_s == pytest.approx(60e-3)
    assert found.optimizer_s == pytest.approx(5e-3)
    parts = found.before_s + found.backward_s + found.exposed_s + found.rest_s
    assert parts == pytest.approx(found.step_s)
    assert found.leads == pytest.approx(
        [
            pytest.approx((share / 4, lead))
            for share, lead in zip((1, 2, 3, 4), (45e-3, 30e-3, 15e-3, 0), strict=True)
        ]
    )
    assert found.buckets == (4 * MIB,) * 4
    assert not found.coded
    assert found.wire_bytes == pytest.approx(4 * 4 * MIB / 2, rel=0.01)
    assert found.driven == 0


def test_a_slow_rank_is_what_others_wait_for(tmp_path: Path) -> None:
    """Of each step the last rank counts, so waiting for it is not taken for exchange."""
    clean = seen(traces.make(tmp_path / "clean", ranks=4, nodes=2, steps=8))
    late = seen(traces.make(tmp_path / "late", ranks=4, nodes=2, steps=8, slow_forward={2: 40.0}))
    assert late.before_s == pytest.approx(clean.before_s + 40e-3, rel=0.05)
    assert late.exposed_s == pytest.approx(clean.exposed_s, rel=0.2)


def test_nothing_changed_is_the_traced_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, codec in (("plain", "none"), ("coded", "int8")):
        folder = traces.make(tmp_path / name, codec=codec, **SLOW)
        found = predicted(capsys, str(folder))
        assert found["step_ms"] == pytest.approx(found["traced_step_ms"], rel=1e-3)


@pytest.mark.parametrize(("times", "rail_ms"), [("2x", 3.0), ("0.5x", 12.0), ("0.25x", 24.0)])
def test_other_links(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], times: str, rail_ms: float
) -> None:
    folder = traces.make(tmp_path / "traced", **SLOW)
    true = seen(traces.make(tmp_path / "true", **{**SLOW, "rail_ms": rail_ms}))
    found = predicted(capsys, str(folder), "--bandwidth", times)
    assert found["step_ms"] == pytest.approx(true.step_s * 1e3, rel=0.15)


def test_a_rate_is_shared_and_kept_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = traces.make(tmp_path, **SLOW)
    slow = predicted(capsys, str(folder), "--bandwidth", "100mbit")
    assert slow["step_ms"] > 16 * MIB * 8 / 100e6 * 1e3
    assert "link between nodes" in slow["dominates"]
    fast = predicted(capsys, str(folder), "--bandwidth", "100gbit")
    assert fast["exposed_ms"] < 0.2 * slow["exposed_ms"]


def test_what_a_link_that_is_known_fell_short_is_latency(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = traces.make(tmp_path, **SLOW)
    true = "1470mbit"  # 1 MiB in 6 ms, and headers
    halved = predicted(capsys, str(folder), "--bandwidth", "735mbit", "--was", true)
    by_factor = predicted(capsys, str(folder), "--bandwidth", "0.5x")
    assert halved["step_ms"] == pytest.approx(by_factor["step_ms"], rel=0.05)
    no_wire = predicted(capsys, str(folder), "--bandwidth", "100gbit", "--was", "50gbit")
    assert no_wire["step_ms"] == pytest.approx(no_wire["traced_step_ms"], rel=0.05)


def test_a_codec_sends_fewer_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = traces.make(tmp_path, **{**SLOW, "rail_ms": 40.0})
    plain = predicted(capsys, str(folder))
    for name, share in (("bf16", 0.5), ("int8", 0.26), ("int8_shared", 0.6)):
        found = predicted(capsys, str(folder), "--codec", name)
        assert found["exposed_ms"] < plain["exposed_ms"] * (share + 0.25)
        assert any(name in line for line in found["assumed"])
    coded = traces.make(tmp_path / "coded", codec="int8", **SLOW)
    back = predicted(capsys, str(coded), "--codec", "none")
    assert back["exposed_ms"] > predicted(capsys, str(coded))["exposed_ms"]


def test_more_ranks_share_the_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = traces.make(tmp_path, ranks=4, nodes=2, steps=8)
    now = predicted(capsys, str(folder))
    shared = predicted(capsys, str(folder), "--ranks", "8")
    assert shared["step_ms"] < 0.75 * now["step_ms"]
    kept = predicted(capsys, str(folder), "--ranks", "8", "--batch", "rank")
    assert kept["step_ms"] >= 0.95 * now["step_ms"]
    assert any("samples" in line for line in shared["assumed"])
    crowded = predicted(capsys, str(folder), "--ranks", "8", "--nodes", "2", "--cores", "2")
    assert crowded["step_ms"] > 0.9 * now["step_ms"], "twice the ranks on the same cores"


def test_one_node_has_no_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = traces.make(tmp_path, ranks=2, nodes=1, steps=4)
    for words in (["--nodes", "2"], ["--bandwidth", "2x"], ["--nodes", "2", "--bandwidth", "2x"]):
        with pytest.raises(UserError, match="one node"):
            asked(str(folder), *words)
    spread = predicted(
        capsys, str(folder), "--ranks", "4", "--nodes", "2", "--bandwidth", "100mbit"
    )
    assert spread["exposed_ms"] > 500
    alone = traces.make(tmp_path / "alone", ranks=1, nodes=1, steps=4)
    assert predicted(capsys, str(alone))["exposed_ms"] < 1


def test_buckets_of_another_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = traces.make(tmp_path, **{**SLOW, "bucket_mib": 16.0, "rail_ms": 1.0})
    large = predicted(capsys, str(folder))
    small = predicted(capsys, str(folder), "--bucket-mb", "2")
    assert small["exposed_ms"] < 0.6 * large["exposed_ms"], "less is left when the last is ready"


def test_regrouped_buckets_hold_the_same_bytes() -> None:
    loads = [Load(MIB, 64)] * 8
    for size in (0.5, 1.0, 3.0, 8.0, 100.0):
        made = changes.regrouped(loads, size, 1.0, coded=True)
        assert sum(load.nbytes for load in made) == pytest.approx(8 * (4 * MIB + 64), rel=1e-4)
    assert len(changes.regrouped(loads, 100.0, 1.0, coded=True)) <= 5
    assert len(changes.regrouped(loads, 1.0, 1.0, coded=True)) == 32


def test_what_cannot_be_is_told(tmp_path: Path) -> None:
    folder = traces.make(tmp_path, **SLOW)
    for words, text in (
        (["--bandwidth", "fast"], "--bandwidth"),
        (["--bandwidth", "0x"], "--bandwidth"),
        (["--bandwidth", "1gbit", "--was", "much"], "--was"),
        (["--ranks", "0"], "--nodes"),
        (["--ranks", "2", "--nodes", "3"], "--nodes"),
        (["--bucket-mb", "0"], "--bucket-mb"),
        (["--codec", "int9"], "int9"),
    ):
        with pytest.raises(UserError, match=text):
            asked(str(folder), *words)
    with pytest.raises(UserError, match="no whole step"):
        observe([np.zeros(0, EVENT)], ("step",))
