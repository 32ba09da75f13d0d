"""Trace files: what is written is read, whatever happens to the writer and to other files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcsync import trace
from hpcsync.errors import UserError
from hpcsync.trace import writer
from hpcsync.trace.collector import Collector, Source, event_cost_ns, histogram, memory_of
from hpcsync.trace.events import BINS, CLOCK, EVENT, LANE, LANES, MEMORY, Events, bins_of
from hpcsync.trace.recorder import FORWARD, Recorder, Ring, room
from hpcsync.trace.writer import Head, NodeFile
from hpcsync.wording import ranges

TOPOLOGY = [[0, 1], [2, 3]]


def head(node: int = 0, run_id: str = "abc") -> Head:
    run = {
        "config": "[train]\nsteps = 3\n",
        "topology": json.dumps(TOPOLOGY),
        "codec": "int8",
        "algorithm": "hierarchical",
        "buckets": json.dumps([{"index": 0, "bytes": 400, "elements": 100, "coded": 90}]),
        "links": "{}",
    }
    return Head(
        run_id=run_id, node=node, nodes=2, ranks=4, every=2, ring=64, hpcsync="0.0", run=run
    )


def about(*ranks: int) -> dict[int, dict[str, object]]:
    return {rank: {"host": "here", "local_rank": rank % 2, "pid": 77 + rank} for rank in ranks}


def some(count: int, seed: int) -> Events:
    random = np.random.default_rng(seed)
    found = np.zeros(count, EVENT)
    found["start"] = np.sort(random.integers(0, 10**9, count))
    found["end"] = found["start"] + random.integers(0, 10**6, count)
    found["step"] = 2 * (1 + np.arange(count) // 10)
    found["lane"] = random.integers(0, len(LANES), count)
    return found


def node_file(
    run: Path, node: int, complete: bool = True, run_id: str = "abc"
) -> dict[int, Events]:
    """Write a node's file in two flushes; the events of its ranks."""
    ranks = TOPOLOGY[node]
    file = NodeFile(run / "trace", head(node, run_id), about(*ranks))
    events = {rank: some(5000 + rank, rank) for rank in ranks}
    for rank in ranks:
        file.add(rank, events[rank][:100])
        file.add_clock(rank, np.array([(1000, 5 * rank, 3), (3000, 15 * rank, 4)], CLOCK))
        file.count(rank, np.full((len(LANES), BINS), rank, np.uint64), 2)
    file.flush()
    for rank in ranks:
        file.add(rank, events[rank][100:])
        file.add_memory(rank, np.array([(2, 10, 20)], MEMORY))
        file.count(rank, np.ones((len(LANES), BINS), np.uint64), 1)
    file.flush(complete=complete)
    return events


def test_what_is_written_is_read(tmp_path: Path) -> None:
    wanted = node_file(tmp_path, 0) | node_file(tmp_path, 1)
    with trace.open(tmp_path) as found:
        assert (found.ranks, found.problems, found.complete) == ((0, 1, 2, 3), [], True)
        facts = found.facts
        assert (facts.run_id, facts.ranks, facts.nodes, facts.every) == ("abc", 4, 2, 2)
        assert (facts.codec, facts.algorithm, facts.topology) == (
            "int8",
            "hierarchical",
            ((0, 1), (2, 3)),
        )
        assert facts.buckets[0]["coded"] == 90
        assert [found.node_of(rank) for rank in found.ranks] == [0, 0, 1, 1]
        for rank in found.ranks:
            np.testing.assert_array_equal(found.events(rank), wanted[rank])
            picked = found.events(rank, [4, 6])
            assert set(picked["step"]) == {4, 6}
            assert found.attributes(rank) == {
                "host": "here",
                "local_rank": rank % 2,
                "pid": 77 + rank,
                "lost": 3,
            }
            assert (found.histogram(rank) == rank + 1).all()
            assert found.memory(rank)["peak"].tolist() == [20]
    assert sorted(path.name for path in (tmp_path / "trace").iterdir()) == ["node0.h5", "node1.h5"]


def test_what_is_known_of_the_run_may_change(tmp_path: Path) -> None:
    file = NodeFile(tmp_path / "trace", head(), about(0))
    file.flush()
    file.describe({**head().run, "algorithm": "direct"})
    file.flush(complete=True)
    with trace.open(tmp_path) as found:
        assert (found.facts.algorithm, found.facts.codec) == ("direct", "int8")


def test_times_are_put_on_one_clock(tmp_path: Path) -> None:
    node_file(tmp_path, 0)
    with trace.open(tmp_path) as found:
        times = np.array([1000, 2000, 3000, 5000, 0], np.int64)
        assert found.offset(1, times).tolist() == [5, 10, 15, 25, 0]  # the drift goes on
        assert found.offset(0, times).tolist() == [0] * 5
        assert found.uncertainty(1) == 4
        local, aligned = found.events(1), found.aligned(1)
        np.testing.assert_array_equal(
            aligned["start"] - local["start"], found.offset(1, local["start"])
        )


def test_a_file_that_has_grown_is_followed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PART_BYTES", 60_000)
    file = NodeFile(tmp_path / "trace", head(), about(0))
    batches = [some(3000, seed) for seed in range(4)]
    for batch in batches:
        file.add(0, batch)
        file.count(0, np.ones((len(LANES), BINS), np.uint64), 1)
        file.flush()
    file.flush(complete=True)
    assert len(list((tmp_path / "trace").iterdir())) > 2
    with trace.open(tmp_path) as found:
        np.testing.assert_array_equal(found.events(0), np.concatenate(batches))
        assert (found.histogram(0) == 4).all()
        assert found.attributes(0)["lost"] == 4


def test_missing_files_are_told_and_the_others_read(tmp_path: Path) -> None:
    node_file(tmp_path, 1, complete=False)
    with trace.open(tmp_path) as found:
        assert found.ranks == (2, 3)
        assert any("ranks 0-1 of 4 have no events" in problem for problem in found.problems)
        assert any("did not end well" in problem for problem in found.problems)
        with pytest.raises(UserError, match="no rank 0; there are 2 to 3"):
            found.events(0)


@pytest.mark.parametrize("kind", ["truncated", "foreign", "text", "newer", "other run"])
def test_what_cannot_be_read_is_left_out(tmp_path: Path, kind: str) -> None:
    node_file(tmp_path, 0)
    node_file(tmp_path, 1, run_id="other" if kind == "other run" else "abc")
    path = tmp_path / "trace" / "node1.h5"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "text":
        path.write_text("hello")
    elif kind == "foreign":
        with h5py.File(path, "w") as file:
            file["x"] = 1
    elif kind == "newer":
        with h5py.File(path, "a") as file:
            file.attrs["version"] = 99
    with trace.open(tmp_path) as found:
        assert found.ranks == (0, 1)
        assert any("node1.h5" in problem for problem in found.problems)


def test_no_trace_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        trace.open(tmp_path / "none")
    with pytest.raises(UserError, match=r"no trace in it .*trace\.enabled=true"):
        trace.open(tmp_path)
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace" / "node0.h5").write_text("no")
    with pytest.raises(UserError, match="not readable as HDF5"):
        trace.open(tmp_path)


def test_files_open_after_a_kill(tmp_path: Path) -> None:
    """A writer that flushes as fast as it can is killed at any moment."""
    script = textwrap.dedent(f"""
        import sys
        sys.path[:0] = {sys.path!r}
        from pathlib import Path
        from tests.unit.test_trace_file import about, head, some
        from hpcsync.trace.writer import NodeFile
        file = NodeFile(Path({str(tmp_path / "trace")!r}), head(), about(0))
        print("go", flush=True)
        for seed in range(10**6):
            file.add(0, some(500, seed))
            file.flush()
    """)
    for wait in (0.05, 0.12, 0.21):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        until = time.monotonic() + 20
        while not (tmp_path / "trace" / "node0.h5").exists() and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with trace.open(tmp_path) as found:
            events = found.events(0)
            assert events.shape[0] % 500 == 0
            assert events.shape[0] > 0
        (tmp_path / "trace" / "node0.h5").unlink()


def test_the_collector_keeps_sampled_steps_and_counts_all(tmp_path: Path) -> None:
    memories = [np.zeros(room(1000), np.uint8) for _ in range(2)]
    recorders = [Recorder(memory=memory) for memory in memories]
    file = NodeFile(tmp_path / "trace", head(), about(0, 1))
    sources = {rank: Source(Ring(memory), os.getpid()) for rank, memory in enumerate(memories)}
    collector = Collector(file, sources, every=2)
    collector.start()
    for step in range(1, 8):
        for recorder in recorders:
            start = 1000 * step
            recorder.begin_step(step)
            recorder.add(FORWARD, start, start + 500)
            recorder.end_step(start)
    collector.add_clock(1, np.array([(1, 2, 3)], CLOCK))
    collector.stop(complete=True)
    assert collector.problem == ""
    with trace.open(tmp_path) as found:
        assert found.complete
        for rank in (0, 1):
            assert set(found.events(rank)["step"]) == {2, 4, 6}
            counted = found.histogram(rank)
            assert counted[LANE["forward"]].sum() == 7
            assert counted[LANE["step"]].sum() == 7
            assert found.memory(rank)["resident"][-1] > 1 << 20
        assert found.clock(1)["offset"].tolist() == [2]


@pytest.mark.parametrize("kind", [OSError, RuntimeError])  # HDF5 raises both
def test_a_disk_without_room_ends_the_trace_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    memory = np.zeros(room(10), np.uint8)
    file = NodeFile(tmp_path / "trace", head(), about(0))
    collector = Collector(file, {0: Source(Ring(memory), os.getpid())}, every=1)

    def full(**_: object) -> float:
        raise kind("no space left on device")

    monkeypatch.setattr(file, "flush", full)
    collector.start()
    collector.stop(complete=True)
    assert "no space left" in collector.problem


def test_histograms_and_small_things() -> None:
    durations = np.array([0, 999, 1000, 1500, 2000, 10**6, 2**62], np.int64)
    assert bins_of(durations).tolist() == [0, 0, 0, 1, 2, 19, BINS - 1]
    found = np.zeros(3, EVENT)
    found["step"], found["end"], found["lane"] = [0, 1, 1], 1000, LANE["data"]
    assert histogram(found)[LANE["data"], 0] == 2
    assert ranges([]) == ""
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    resident, peak = memory_of(os.getpid())
    assert peak >= resident > 0
    assert memory_of(2**30) == (0, 0)
    assert event_cost_ns() > 0


def test_a_resumed_run_writes_further_parts_and_is_read_alone(tmp_path: Path) -> None:
    for number, run_id in enumerate(("first", "second")):
        file = NodeFile(tmp_path / "trace", head(0, run_id), about(0))
        file.flush(complete=True)
        with h5py.File(file.path, "a") as made:
            made.attrs["created"] = f"2026-01-0{number + 1}T00:00:00+00:00"
    assert sorted(path.name for path in (tmp_path / "trace").iterdir()) == [
        "node0-001.h5",
        "node0.h5",
    ]
    found = trace.open(tmp_path)
    assert found.facts.run_id == "second"
    assert any("of another run (first)" in problem for problem in found.problems)
