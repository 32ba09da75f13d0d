"""Export of a trace: every rule of the Trace Event Format that readers hold it to."""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hpcsync.trace
from hpcsync.errors import UserError
from hpcsync.trace.events import LANES
from tests import traces
from tools.tracing import export


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two nodes of two ranks; rank 3's clock is 2 s ahead."""
    folder = tmp_path_factory.mktemp("run")
    return traces.make(folder, ranks=4, nodes=2, steps=5, codec="int8", clock_off={3: 2.0})


def exported(run: Path, *words: str) -> int:
    parser = argparse.ArgumentParser()
    export.arguments(parser)
    return export.run(parser.parse_args([str(run), *words]))


def whole(run: Path, path: Path, *words: str) -> dict[str, Any]:
    """The file's content."""
    assert exported(run, "-o", str(path), *words) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def slices(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in found["traceEvents"] if event["ph"] == "X"]


def test_events_keep_to_the_format(run: Path, tmp_path: Path) -> None:
    found = whole(run, tmp_path / "out.json")
    assert set(found) == {"displayTimeUnit", "otherData", "traceEvents"}
    assert found["displayTimeUnit"] == "ms"
    keys = {
        "M": {"ph", "name", "pid", "tid", "args"},
        "X": {"ph", "name", "cat", "pid", "tid", "ts", "dur", "args"},
        "s": {"ph", "name", "cat", "id", "pid", "tid", "ts"},
        "t": {"ph", "name", "cat", "id", "pid", "tid", "ts"},
        "f": {"ph", "bp", "name", "cat", "id", "pid", "tid", "ts"},
    }
    for event in found["traceEvents"]:
        assert set(event) == keys[event["ph"]]
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        # Number 0 is the idle process to readers.
        assert event["pid"] > 0
        if event["ph"] != "M":
            assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert event["cat"] in LANES
            assert event["args"]["step"] in (4, 5)


def test_every_span_of_the_window_is_there(run: Path, tmp_path: Path) -> None:
    found = slices(whole(run, tmp_path / "out.json", "--steps", "2-3", "--ranks", "1,3"))
    with hpcsync.trace.open(run) as trace:
        events = [trace.aligned(rank, [2, 3]) for rank in (1, 3)]
        names = trace.names
    assert len(found) == sum(each.shape[0] for each in events)
    by_number = {(event["pid"] - 1, event["args"]["id"]): event for event in found}
    for rank, mine in zip((1, 3), events, strict=True):
        for event in mine:
            made = by_number[rank, int(event["id"])]
            assert made["name"] == names[event["name"]]
            assert made["cat"] == LANES[event["lane"]]
            assert made["args"]["parent"] == event["parent"]
            assert made["args"].get("bytes", 0) == event["bytes"]
            assert made["args"].get("bucket", -1) == event["bucket"]
            assert round(made["ts"] * 1000) == event["start"]
            assert round(made["dur"] * 1000) == event["end"] - event["start"]


def test_slices_of_a_thread_do_not_overlap(run: Path, tmp_path: Path) -> None:
    threads = defaultdict(list)
    for event in slices(whole(run, tmp_path / "out.json")):
        start = round(event["ts"] * 1000)
        threads[event["tid"]].append((start, start + round(event["dur"] * 1000), event))
    for spans in threads.values():
        assert len({event["pid"] for _, _, event in spans}) == 1
        assert len({event["cat"] for _, _, event in spans}) == 1
        spans.sort(key=lambda each: each[:2])
        for (_, end, _), (start, _, _) in itertools.pairwise(spans):
            assert start >= end


def test_processes_and_threads_are_named(run: Path, tmp_path: Path) -> None:
    found = whole(run, tmp_path / "out.json")
    names: dict[str, dict[int, Any]] = defaultdict(dict)
    for event in found["traceEvents"]:
        if event["ph"] == "M":
            thread = event["tid"] if event["name"].startswith("thread") else event["pid"]
            names[event["name"]][thread] = next(iter(event["args"].values()))
    assert [names["process_name"][pid] for pid in (1, 4)] == ["rank 0 node0", "rank 3 node1"]
    assert "50.0 us" in names["process_labels"][4]
    for event in slices(found):
        assert names["thread_name"][event["tid"]].startswith(event["cat"])


def test_arrows_lead_through_a_bucket(run: Path, tmp_path: Path) -> None:
    found = whole(run, tmp_path / "out.json")
    spans = {(event["tid"], event["ts"]): event for event in slices(found)}
    ways = defaultdict(list)
    for event in found["traceEvents"]:
        if event["ph"] in "stf":
            ways[event["id"]].append(event)
    assert len(ways) == 4 * 2 * 4, "ranks, steps, buckets"
    for way in ways.values():
        assert "".join(event["ph"] for event in way) == "stf"
        bound = [spans[event["tid"], event["ts"]] for event in way]
        assert [each["name"] for each in bound] == ["fill", "bucket", "transfer"]
        assert len({(each["args"]["step"], each["args"]["bucket"]) for each in bound}) == 1


def test_clocks_are_aligned(run: Path, tmp_path: Path) -> None:
    found = slices(whole(run, tmp_path / "out.json"))
    ends = defaultdict(list)
    for event in found:
        if event["name"] == "bucket":
            key = event["args"]["step"], event["args"]["bucket"]
            ends[key].append(event["ts"] + event["dur"])
    for each in ends.values():
        assert np.ptp(each) < 120, "us; rank 3 was 2 s ahead"


def test_compressed_by_the_name_of_the_file(run: Path, tmp_path: Path) -> None:
    plain = whole(run, tmp_path / "out.json")
    path = tmp_path / "out.json.gz"
    assert exported(run, "-o", str(path)) == 0
    with gzip.open(path, "rt") as file:
        assert json.load(file) == plain
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out.json", "out.json.gz"]


def test_what_cannot_be_is_told(run: Path, tmp_path: Path) -> None:
    for words, text in (
        (["--steps", "99"], "no step 99"),
        (["--ranks", "7"], "no rank 7"),
        (["-o", str(tmp_path / "none" / "out.json")], "--output"),
    ):
        with pytest.raises(UserError, match=text):
            exported(run, *words)
    assert not list(tmp_path.iterdir())


def test_perfetto_reads_it(run: Path, tmp_path: Path) -> None:
    """The trace processor itself, where it is installed: its package would download it."""
    processor = pytest.importorskip("perfetto.trace_processor", reason="perfetto missing")
    shell = shutil.which("trace_processor_shell")
    if shell is None:
        pytest.skip("trace_processor_shell missing: put Perfetto's binary on PATH")
    found = whole(run, tmp_path / "out.json")
    config = processor.TraceProcessorConfig(bin_path=shell)
    with processor.TraceProcessor(trace=str(tmp_path / "out.json"), config=config) as opened:
        row = next(opened.query("select count(*) as spans, max(depth) as depth from slice"))
        assert (row.spans, row.depth) == (len(slices(found)), 0)
        errors = opened.query("select name from stats where severity = 'error' and value > 0")
        assert [row.name for row in errors] == []
