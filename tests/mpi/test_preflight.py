"""Transfers are timed and compared on real ranks; costs are saved, and taken by the auto choice."""

from __future__ import annotations

import argparse
import datetime
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

from hpcsync.collectives import Collectives, saved_costs
from hpcsync.collectives.costs import LinkCost
from hpcsync.collectives.saved_costs import Place, SavedCosts
from hpcsync.config import CommConfig, CompressConfig
from hpcsync.gradients.auto import Auto
from hpcsync.gradients.compression import Compression
from hpcsync.gradients.plan import Parameter
from hpcsync.launch import Runtime, mpi_library
from hpcsync.preflight import __main__, compute, survey, turns, wire
from hpcsync.preflight.options import parse
from hpcsync.topology import Topology

pytestmark = pytest.mark.mpi

SMALL = compute.Size(64, 1 << 16)


@pytest.fixture(params=[0, 1, 2], ids="width {}".format)
def runtime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Nodes of so many ranks; 0: all on one. Everything is small."""
    monkeypatch.setitem(compute._SIZES, "cpu", SMALL)
    monkeypatch.setattr(compute, "_WINDOW_S", 0.01)
    monkeypatch.setattr(wire, "_LONG_ENOUGH_S", 0.002)
    monkeypatch.setattr(survey, "_IN_NODE", 1 << 19)
    monkeypatch.setattr(survey, "_BETWEEN_NODES", 1 << 19)
    threads = torch.get_num_threads()
    topology = Topology.group(["host"] * MPI.COMM_WORLD.size, request.param)
    made = Runtime(MPI.COMM_WORLD.Dup(), topology, 60.0)
    yield made
    made.close()
    torch.set_num_threads(threads)


def flight(runtime: Runtime, *words: str) -> Any:
    """What the command finds on these ranks, and its status; nodes are never called slow."""
    options: argparse.Namespace = parse(["--slow", "1e-9", *words])
    return __main__.preflight(runtime, options)


def test_all_is_measured_and_right(
    runtime: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(runtime.bcast(str(tmp_path)))
    path = folder / "costs.json"
    assert flight(runtime, "--json", "--save", str(path)) == 0
    text = capsys.readouterr().out
    if runtime.rank:
        assert text == ""
        return
    told = json.loads(text)
    topology = runtime.topology
    assert [each["rank"] for each in told["ranks"]] == list(range(topology.size))
    assert len({each["checksum"] for each in told["ranks"]}) == 1
    assert [node["ranks"] for node in told["nodes"]] == [list(ranks) for ranks in topology.nodes]
    levels = told["levels"]
    assert ("rail" in levels) == (topology.node_count > 1)
    assert ("node" in levels) == any(len(ranks) > 1 for ranks in topology.nodes)
    for level in levels.values():
        assert level["transfers"] > 0
        assert level["faults"] == []
        assert level["rate"] > 0
        assert level["all_ranks"]["wire_s"] > 0
    if not levels:
        assert "not saved, since there are none" in told["saved"]
        return
    kept = saved_costs.read(path)
    assert kept is not None
    assert set(kept.levels) == set(levels)
    assert kept.place == Place.here(topology, mpi_library()[0])


@pytest.mark.parametrize("slow_looks", [1, 2, 9])
def test_a_node_is_named_for_what_lasts(
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    slow_looks: int,
) -> None:
    """Somebody else's busy moment is over when it is looked at again."""
    if runtime.topology.node_count < 2:
        pytest.skip("one node has none to be compared with")
    looks: list[float] = []

    def rates(self: survey.Survey) -> list[compute.Rates]:
        looks.append(time.monotonic())
        slow = 0.5 if len(looks) <= slow_looks else 1.0
        last = runtime.topology.node_count - 1
        return [
            compute.Rates(slow if runtime.topology.node_of(rank) == last else 1.0, 1.0, 0, "cpu")
            for rank in range(runtime.size)
        ]

    monkeypatch.setattr(__main__, "_AGAIN_S", (0.0, 0.01))
    monkeypatch.setattr(survey.Survey, "compute", rates)
    options = parse(["--json", "--slow", "0.8", "--save", "none"])
    # Links of nodes that are one machine may differ, which is not looked at here.
    monkeypatch.setattr(survey.Survey, "between_nodes", lambda self: survey.Level())
    monkeypatch.setattr(survey.Survey, "in_nodes", lambda self: survey.Level())
    status = __main__.preflight(runtime, options)
    assert len(looks) == min(slow_looks, 2) + 1
    assert status == (__main__.NAMED if slow_looks == 9 else 0)
    if runtime.rank == 0:
        slow = json.loads(capsys.readouterr().out)["slow"]
        assert {each["what"] for each in slow} == ({"product"} if slow_looks == 9 else set())


def test_a_transfer_that_is_changed_on_its_way_is_found(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every stream into rank 1 has one bit flipped after it has come."""
    once = wire.Wire._stream

    def flips(self: wire.Wire, other: int, out: wire.Words, into: wire.Words) -> list[float]:
        arrivals = once(self, other, out, into)
        if self._rank == 1:
            into[into.size // 2] ^= np.uint64(1 << 40)
        return arrivals

    monkeypatch.setattr(wire.Wire, "_stream", flips)
    status = flight(runtime, "--json", "--save", "")
    text = capsys.readouterr().out
    takes_part = any(
        1 in pair
        for waves in (
            turns.in_nodes(runtime.topology, list(runtime.topology.names)),
            turns.between_nodes(runtime.topology, list(runtime.topology.names)),
        )
        for wave in waves
        for pair in wave
    )
    assert status == (4 if takes_part else 0)
    if runtime.rank or not takes_part:
        return
    told = json.loads(text)
    faults = [fault for level in told["levels"].values() for fault in level["faults"]]
    assert faults
    for fault in faults:
        assert fault["receiver"] == 1
        assert fault["words"] == 1
        assert fault["first"] == fault["nbytes"] // 2
    assert runtime.topology.names[runtime.topology.node_of(1)] in told["exclude"]


def test_a_message_between_all_ranks_that_is_changed_is_found(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    once = survey._Filled.look

    def flips(self: survey._Filled, came: Any, sender: int) -> None:
        if sender == 0 and came.size > 100:
            came[100] ^= 1
        once(self, came, sender)

    monkeypatch.setattr(survey._Filled, "look", flips)
    status = flight(runtime, "--json", "--save", "")
    text = capsys.readouterr().out
    if runtime.size == 1:
        assert status == 0
        return
    assert status == 4
    if runtime.rank == 0:
        told = json.loads(text)
        faults = [fault for level in told["levels"].values() for fault in level["faults"]]
        assert {fault["sender"] for fault in faults} == {0}
        assert {fault["first"] for fault in faults} == {100}


def test_a_rank_that_stands_still_for_a_turn_is_named(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 1 comes back when its partner has given it up; all others go on, and it is told."""
    monkeypatch.setattr(survey, "_SILENT", 0.1)
    once, slept = wire.Wire._ping, []

    def sleeps(self: wire.Wire, other: int) -> float:
        if self._rank == 1 and not slept:
            slept.append(other)
            while not self._comm.Iprobe(other, wire._STOP):
                time.sleep(0.01)
        return once(self, other)

    monkeypatch.setattr(wire.Wire, "_ping", sleeps)
    status = flight(runtime, "--json", "--save", "costs.json")
    told = capsys.readouterr()
    (partner, *_) = runtime.bcast(slept, 1) if runtime.size > 1 else [None]
    if partner is None:
        assert status == 0
        return
    assert status == 4
    here = runtime.topology.names[runtime.topology.node_of(runtime.rank)]
    if runtime.rank == partner:
        assert f"nothing has come from rank 1 to rank {partner} for " in told.err
        assert f"rank {partner} is on {here}" in told.err
    if runtime.rank == 0:
        found = json.loads(told.out)
        node = runtime.topology.node_of(1)
        assert found["wrong"] == [runtime.topology.names[node]] == found["exclude"]
        faults = [fault for level in found["levels"].values() for fault in level["faults"]]
        assert {(fault["sender"], fault["receiver"]) for fault in faults} == {(1, partner)}
        assert any(fault["late"] for fault in faults)
        assert "not saved" in found["saved"]


def test_no_time_leaves_turns_out_and_says_so(
    runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flight(runtime, "--seconds", "1e-6", "--save", "") == 0
    text = capsys.readouterr().out
    if runtime.rank == 0 and runtime.topology.node_count == 4:
        assert "left out: " in text
        assert "--seconds gives more" in text


# -- the auto choice -----------------------------------------------------------------------


def keep(runtime: Runtime, folder: Path, **place: Any) -> Path:
    """A file of costs that were measured on these ranks, but for ``place``."""
    path = Path(runtime.bcast(str(folder))) / "costs.json"
    here = replace(Place.here(runtime.topology, mpi_library()[0]), **place)
    made = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    levels = {"node": LinkCost(7e-6, 1e-9), "rail": LinkCost(33e-6, 2e-8)}
    if runtime.rank == 0:
        SavedCosts(made=made, place=here, levels=levels).write(path)
    runtime.barrier()
    return path


def auto_line(runtime: Runtime, path: Path) -> str:
    """What the auto choice says of a small model at its start."""
    comm = CommConfig(costs=str(path), node_transport="mpi_host")
    config = CompressConfig(codec="auto", where="all", min_elements=1)
    compression = Compression(Collectives(runtime, comm), config, 0)
    params = [Parameter("weight", 1 << 16, "float32", 4, (256, 256))]
    lines = runtime.allgather_object(Auto(compression, comm, params).line())
    assert len(set(lines)) == 1, "all ranks hold the same numbers"
    return str(lines[0])


def test_saved_costs_take_the_place_of_the_probe(
    runtime: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = auto_line(runtime, keep(runtime, tmp_path))
    told = capsys.readouterr().err
    if runtime.size == 1:
        assert "nothing to code" in line
        return
    rate = "50 MB/s, 33 us" if runtime.topology.node_count > 1 else "1000 MB/s, 7 us"
    assert f"link {rate} by preflight of " in line
    assert ("auto: link as of" in told) == (runtime.rank == 0)


def test_costs_of_another_place_are_told_and_left(
    runtime: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = auto_line(runtime, keep(runtime, tmp_path, processor="Another"))
    told = capsys.readouterr().err
    assert "preflight" not in line
    if runtime.size > 1 and runtime.rank == 0:
        (said,) = [text for text in told.splitlines() if "costs.json" in text]
        assert "is not used: it was measured with processor Another" in said


def test_a_broken_file_is_told_and_left(
    runtime: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = keep(runtime, tmp_path)
    if runtime.rank == 0:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"levels": []}))
    line = auto_line(runtime, path)
    told = capsys.readouterr().err
    assert "preflight" not in line
    if runtime.size > 1 and runtime.rank == 0:
        (said,) = [text for text in told.splitlines() if "costs.json" in text]
        assert "not the costs of links (levels is [])" in said


def test_without_a_file_links_are_probed_in_silence(
    runtime: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = auto_line(runtime, tmp_path / "none.json")
    assert "preflight" not in line
    assert "costs" not in capsys.readouterr().err
