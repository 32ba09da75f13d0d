"""The size of a trace before the run, against traces that were written."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

import hpcsync.trace
from hpcsync import config as configs
from hpcsync.errors import UserError
from hpcsync.topology import Topology
from hpcsync.trace.events import EVENT
from tests import traces
from tools.tracing import estimate, sample
from tools.tracing.deck import even

MIB = 1 << 20


def estimated(*words: str) -> int:
    parser = argparse.ArgumentParser()
    estimate.arguments(parser)
    return estimate.run(parser.parse_args(list(words)))


def values(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert estimated(*words, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_traced_run_is_estimated_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same run again takes what it took; four times the steps about four times as much."""
    folder = traces.make(tmp_path, ranks=4, nodes=2, steps=100, buckets=4)
    size = sum(path.stat().st_size for path in (tmp_path / "trace").iterdir())
    again = values(capsys, str(folder))
    assert again["total_bytes"] == pytest.approx(size, rel=0.05)
    with hpcsync.trace.open(folder) as trace:
        assert again["spans"] == trace.events(0, [5]).shape[0]
    longer = values(capsys, str(folder), "--steps", "400")
    assert longer["steps_written"] == 400
    assert longer["rank_bytes"] == pytest.approx(4 * again["rank_bytes"], rel=0.2)
    wider = values(capsys, str(folder), "--ranks", "512", "--every", "10")
    assert wider["steps_written"] == 10
    assert wider["total_bytes"] > 10 * again["total_bytes"]


def test_a_sample_is_near_a_written_trace(tmp_path: Path) -> None:
    """Bytes a span that a small file has, and a synthetic run has."""
    folder = traces.make(tmp_path, ranks=1, nodes=1, steps=1000, buckets=8)
    size = sum(path.stat().st_size for path in (folder / "trace").iterdir())
    with hpcsync.trace.open(folder) as trace:
        count = trace.events(0).shape[0]
    cost = sample.measure(count // 1000)
    assert size == pytest.approx(
        cost.file_bytes + cost.rank_bytes + count * cost.span_bytes + 1000 * cost.step_bytes,
        rel=0.6,
    )


@pytest.mark.parametrize(
    ("overrides", "topology", "expected"),
    [
        ([], even(1, 1), 7 + 2 * 3),
        ([], even(2, 2), 7 + 2 * (3 + 3)),
        ([], even(4, 2), 7 + 2 * (3 + 3 * 3)),
        ([], even(4, 1), 7 + 2 * (3 + 1)),
        (["comm.algorithm=ring"], even(4, 2), 7 + 2 * (3 + 3)),
        (["train.accumulate=2"], even(2, 2), 9 + 2 * (3 + 3)),
        # A piece of int8 is larger; it is encoded, combined and decoded.
        (["compress.codec=int8"], even(2, 2), 7 + 2 * (3 + 1 + 3)),
        (["compress.codec=int8"], even(8, 4), 7 + 2 * (3 + 3 + 7)),
        (["compress.codec=int8", "compress.where=all"], even(4, 2), 7 + 2 * (3 + 1 + 7)),
    ],
)
def test_spans_are_counted_as_they_are_recorded(
    overrides: list[str], topology: Topology, expected: int
) -> None:
    """Two buckets of 3 MiB."""
    config = configs.load(None, overrides)
    assert estimate.spans(config, topology, [3 * MIB] * 2) == expected


def test_a_deck_gives_steps_and_ring(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["train.steps=500", "trace.every=5", "trace.ring=64"]
    shape = ["--ranks", "16", "--nodes", "2", "--buckets", "3", "--segments", "2"]
    found = values(capsys, *settings, *shape)
    assert found["spans"] == 7 + 3 * (3 + 2 * 3)
    assert found["steps_written"] == 100
    assert found["ring_bytes"] == 64 * EVENT.itemsize
    assert found["files"] == 1
    assert found["total_bytes"] == pytest.approx(2 * found["node_bytes"])
    estimated(*settings, *shape)
    assert "trace.ring=64" in capsys.readouterr().out


def test_a_ring_that_is_large_enough_is_not_spoken_of(capsys: pytest.CaptureFixture[str]) -> None:
    estimated("--buckets", "3")
    text = capsys.readouterr().out
    assert "trace.ring" not in text
    assert "whole trace" in text


def test_what_cannot_be_is_told(tmp_path: Path) -> None:
    folder = traces.make(tmp_path / "run", ranks=1, nodes=1, steps=1)
    for words, text in (
        (["--ranks", "0"], "--ranks"),
        (["--ranks", "2", "--nodes", "3", "--buckets", "1"], "--nodes"),
        ([str(folder), "--buckets", "3"], "--buckets"),
        ([str(tmp_path)], "no trace"),
        (["no-such-deck", "--buckets", "1"], "no-such-deck"),
    ):
        with pytest.raises(UserError, match=text):
            estimated(*words)
