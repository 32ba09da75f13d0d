"""Clocks that are compared over MPI, and the trace of a run on several ranks."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from hpcsync import launch, trace
from hpcsync.config import TopologyConfig
from hpcsync.trace import clock
from hpcsync.trace.clock import Clocks
from hpcsync.trace.events import LANE, Events
from hpcsync.trace.links import Links
from tests.mpi.test_train import run

pytestmark = pytest.mark.mpi

SECONDS = 10**9


@pytest.mark.parametrize("ranks_per_node", [0, 1, 2])
def test_clocks_of_one_machine_agree(comm: MPI.Intracomm, ranks_per_node: int) -> None:
    if ranks_per_node and comm.size % ranks_per_node:
        pytest.skip("needs a multiple of two ranks")
    with launch.start(TopologyConfig(ranks_per_node=ranks_per_node)) as runtime:
        clocks = Clocks(runtime)
        for _ in range(3):
            (row,) = clocks.compare()
            assert abs(int(row["offset"])) <= int(row["uncertainty"])
            assert int(row["uncertainty"]) < SECONDS
        clocks.close()


@pytest.mark.parametrize("ranks_per_node", [1, 0])
def test_a_clock_that_is_off_is_found(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch, ranks_per_node: int
) -> None:
    if comm.size == 1:
        pytest.skip("a rank alone has nobody to compare with")
    true_now, off = clock.now, comm.rank == comm.size - 1
    if off:
        monkeypatch.setattr(clock, "now", lambda: true_now() + 2 * SECONDS)
    with launch.start(TopologyConfig(ranks_per_node=ranks_per_node)) as runtime:
        clocks = Clocks(runtime)
        (row,) = clocks.compare()
        clocks.close()
    wanted = -2 * SECONDS if off else 0
    assert abs(int(row["offset"]) - wanted) <= int(row["uncertainty"])


def test_links_are_measured_between_nodes(comm: MPI.Intracomm) -> None:
    with launch.start(TopologyConfig(ranks_per_node=1)) as runtime:
        links = Links(runtime)
        for _ in range(2):
            rate = links.measure()
            assert (rate > 0) == (comm.size > 1)
        links.close()


def of(events: Events, lane: str) -> Events:
    return events[events["lane"] == LANE[lane]]


@pytest.mark.parametrize("codec", ["none", "int8"])
@pytest.mark.parametrize("transport", ["auto", "mpi_host"])
def test_a_run_leaves_a_trace(
    comm: MPI.Intracomm,
    folder: Path,
    codec: str,
    transport: str,
) -> None:
    words = ["train.steps=5", "trace.every=2", f"compress.codec={codec}", "compress.warmup=1"]
    words += [f"comm.transport.node={transport}", "comm.bucket_mb=0.02"]
    words += ["topology.ranks_per_node=2"] if comm.size == 4 else []
    run(folder, *words)
    comm.Barrier()
    with trace.open(folder / "run") as found:
        assert found.problems == []
        assert found.ranks == tuple(range(comm.size))
        assert found.attributes(comm.rank)["pid"] == os.getpid()
        assert found.attributes(comm.rank)["lost"] == 0
        events = found.aligned(comm.rank)
        assert found.steps(comm.rank).tolist() == [2, 4]
        assert found.histogram(comm.rank)[LANE["step"]].sum() == 5
        check(found, events, codec, comm.size)


def check(found: trace.Trace, events: Events, codec: str, size: int) -> None:
    """One rank's events hang together."""
    assert (events["end"] >= events["start"]).all()
    for step in (2, 4):
        own = events[events["step"] == step]
        (whole,) = of(own, "step")
        others = own[own["lane"] != LANE["step"]]
        assert (others["start"] >= whole["start"]).all()
        assert (others["end"] <= whole["end"]).all()
        for lane in ("data", "forward", "backward", "optimizer"):
            assert of(own, lane).shape[0] == 1, lane
        if size == 1:
            continue
        buckets = of(own, "bucket")
        assert sorted(buckets["bucket"]) == list(range(len(buckets)))
        assert len(buckets) > 1
        wires = np.concatenate([of(own, f"wire.{level}") for level in ("node", "rail", "world")])
        assert set(wires["parent"]) <= set(buckets["id"])
        by_id = {int(each["id"]): each for each in buckets}
        for wire in wires:
            bucket = by_id[int(wire["parent"])]
            assert bucket["start"] <= wire["start"] <= wire["end"] <= bucket["end"]
            assert bucket["bucket"] == wire["bucket"]
        coded = codec != "none" and size == 4
        assert (of(own, "encode").shape[0] > 0) == coded
        assert (of(own, "decode").shape[0] > 0) == coded
