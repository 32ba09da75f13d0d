"""Faults planted in traces are found by name, and nothing is found where none was planted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcsync import trace
from hpcsync.trace.analysis.findings import Finding
from hpcsync.trace.analysis.straggler import excess, imbalance, since
from hpcsync.trace.analysis.summary import Summary, summarise
from tests.traces import make

FOUR = {"ranks": 8, "nodes": 4}


def summary(folder: Path, **plan: Any) -> Summary:
    with trace.open(make(folder, **plan)) as found:
        return summarise(found, found.ranks)


def only(found: Summary) -> Finding:
    assert len(found.findings) == 1, found.findings
    return found.findings[0]


@pytest.mark.parametrize(
    "plan",
    [
        {},
        {"ranks": 1, "nodes": 1},
        {"ranks": 2, "nodes": 2, "noise": 0.1},
        {"noise": 0.1},
        {**FOUR, "codec": "int8", "noise": 0.05},
        {**FOUR, "noise": 0.1, "rail_ms": 8.0},
        {"rail_ms": 12.0},
        {"drift_ppm": {1: 40.0, 3: -30.0}},
        {"steps": 2},
        {"steps": 1},
        {"buckets": 1},
        {"uncertainty_us": 20_000.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_clean_run_has_no_fault(tmp_path: Path, plan: dict[str, Any], seed: int) -> None:
    assert summary(tmp_path, seed=seed, **plan).findings == []


@pytest.mark.parametrize(
    ("plan", "rank", "lane"),
    [
        ({"slow_forward": {2: 25.0}}, 2, "forward"),
        ({"slow_forward": {1: 25.0}, "ranks": 2}, 1, "forward"),
        ({"slow_forward": {5: 25.0}, "noise": 0.05, **FOUR}, 5, "forward"),
        ({"slow_backward": {0: 25.0}}, 0, "backward"),
        ({"slow_backward": {6: 25.0}, "rail_ms": 6.0, **FOUR}, 6, "backward"),
        ({"slow_data": {3: 25.0}}, 3, "data"),
    ],
)
def test_a_slow_rank_is_named(tmp_path: Path, plan: dict[str, Any], rank: int, lane: str) -> None:
    found = summary(tmp_path, **plan)
    fault = only(found)
    assert (fault.kind, fault.ranks, fault.lane) == ("straggler", (rank,), lane)
    assert fault.lost_ms == pytest.approx(25.0, rel=0.1)
    assert f"rank {rank} " in fault.text
    assert found.slowest[0].rank == rank
    assert found.slowest[0].best > 1.15
    assert found.slowest[0].past == pytest.approx(1.0, abs=0.1)


def test_the_worst_straggler_is_the_verdict(tmp_path: Path) -> None:
    found = summary(tmp_path, slow_forward={2: 25.0})
    assert found.verdict.bound == "straggler"
    assert "rank 2 (node 1) is slow in forward" in found.verdict.text
    assert "host" in found.verdict.advice


def test_ranks_of_a_slow_node_are_named_together(tmp_path: Path) -> None:
    fault = only(summary(tmp_path, slow_forward={4: 25.0, 5: 26.0}, **FOUR))
    assert (fault.ranks, fault.node) == ((4, 5), 2)
    assert "node 2 (ranks 4-5) is slow in forward" in fault.text


def test_a_rank_that_became_slow(tmp_path: Path) -> None:
    found = summary(tmp_path, slow_forward={2: 40.0}, fault_from=7)
    fault = only(found)
    assert (fault.ranks, fault.since) == ((2,), 8)
    assert found.slowest[0].past > 1.3


def test_a_single_slow_step_is_no_straggler(tmp_path: Path) -> None:
    assert summary(tmp_path, slow_forward={2: 200.0}, fault_from=11).findings == []


def test_a_slow_loader_on_all_ranks(tmp_path: Path) -> None:
    found = summary(tmp_path, slow_data=dict.fromkeys(range(4), 40.0))
    fault = only(found)
    assert (fault.kind, fault.ranks) == ("data", ())
    assert fault.lost_ms == pytest.approx(41.0, rel=0.05)
    assert found.verdict.bound == "data"


@pytest.mark.parametrize(
    ("rank", "bucket", "plan"),
    [(1, 2, {}), (3, 0, {}), (0, 3, {"noise": 0.03}), (1, 1, {"ranks": 2}), (5, 3, FOUR)],
)
def test_a_bucket_that_is_held_back(
    tmp_path: Path, rank: int, bucket: int, plan: dict[str, Any]
) -> None:
    fault = only(summary(tmp_path, held={(rank, bucket): 40.0}, **plan))
    assert (fault.kind, fault.ranks, fault.bucket) == ("bucket", (rank,), bucket)
    assert fault.lost_ms == pytest.approx(40.0, rel=0.1)
    assert f"bucket {bucket} is held back at rank {rank} " in fault.text


LUMPED = {"ranks": 3, "nodes": 3, "buckets": 3, "ready": (0.2, 0.9, 1.0), "backward_ms": 4.0}


@pytest.mark.parametrize(("rank", "bucket"), [(1, 1), (0, 2), (2, 0)])
@pytest.mark.parametrize("noise", [0.01, 0.1])
def test_a_hook_that_holds_back_one_bucket(
    tmp_path: Path, rank: int, bucket: int, noise: float
) -> None:
    """The backward pass is longer for it, and most of it belongs to one bucket anyway."""
    fault = only(summary(tmp_path, hooked={(rank, bucket): 40.0}, noise=noise, **LUMPED))
    assert (fault.kind, fault.ranks, fault.bucket) == ("bucket", (rank,), bucket)
    assert fault.lost_ms == pytest.approx(40.0, rel=0.35)


@pytest.mark.parametrize("noise", [0.01, 0.1])
def test_a_slow_backward_pass_is_no_held_back_bucket(tmp_path: Path, noise: float) -> None:
    fault = only(summary(tmp_path, slow_backward={1: 40.0}, noise=noise, **LUMPED))
    assert (fault.kind, fault.ranks, fault.lane) == ("straggler", (1,), "backward")


@pytest.mark.parametrize("shape", [FOUR, {"ranks": 3, "nodes": 3}], ids=str)
@pytest.mark.parametrize("fault_from", [0, 6])
def test_a_slow_link_is_named(tmp_path: Path, shape: dict[str, int], fault_from: int) -> None:
    found = summary(tmp_path, slow_link={2: 4.0}, fault_from=fault_from, rail_ms=4.0, **shape)
    fault = only(found)
    assert (fault.kind, fault.node) == ("link", 2)
    assert found.verdict.bound == "communication"
    assert "link of node 2 is slow" in found.verdict.text


def test_a_late_node_has_no_slow_link(tmp_path: Path) -> None:
    found = summary(tmp_path, slow_forward={4: 60.0, 5: 60.0}, rail_ms=4.0, **FOUR)
    assert [fault.kind for fault in found.findings] == ["straggler"]


def test_a_clock_that_was_measured_is_corrected(tmp_path: Path) -> None:
    found = summary(tmp_path, clock_off={3: 2.0}, drift_ppm={3: 30.0})
    fault = only(found)
    assert (fault.kind, fault.ranks, fault.fault) == ("clock", (3,), True)
    assert "clock of rank 3 is 2.000 s ahead of the others'; times are corrected" in fault.text
    assert found.arrival.spread_ms < 5


def test_clocks_of_two_hosts_may_differ(tmp_path: Path) -> None:
    found = only(summary(tmp_path, clock_off={2: -500.0, 3: -500.0}))
    assert (found.kind, found.ranks, found.fault) == ("clock", (2, 3), False)
    assert "behind" in found.text


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("seconds", [2.0, -2.0, 0.3])
def test_a_clock_that_was_measured_wrongly_is_named(
    tmp_path: Path, ranks: int, seconds: float
) -> None:
    found = summary(tmp_path, ranks=ranks, clock_off={1: seconds}, unsaid=(1,))
    fault = only(found)
    assert (fault.kind, fault.ranks) == ("clock", (1,))
    assert f"{abs(seconds):.3f} s {'ahead of' if seconds > 0 else 'behind'}" in fault.text
    # Its times take part in no comparison, so the others' stay true.
    assert found.arrival.spread_ms < 5


def test_what_clocks_cannot_tell_is_said(tmp_path: Path) -> None:
    coarse = summary(tmp_path / "coarse", uncertainty_us=20_000.0)
    fine = summary(tmp_path / "fine", uncertainty_us=5.0)
    assert not coarse.arrival.told
    assert fine.arrival.told


@pytest.mark.parametrize(
    ("plan", "bound", "advice"),
    [
        ({}, "compute", "whatif"),
        ({"config": '[train]\nprecision = "fp32"\n'}, "compute", "train.precision=bf16"),
        ({"rail_ms": 20.0}, "communication", "compress.codec=auto"),
        ({"rail_ms": 20.0, "codec": "bf16"}, "communication", "compress.codec=int8"),
        (
            {"rail_ms": 20.0, "config": "[comm]\noverlap = false\n"},
            "communication",
            "comm.overlap=true",
        ),
        ({"rail_ms": 20.0, "codec": "int8"}, "communication", "train.accumulate=2"),
        ({"rail_ms": 20.0, "config": "not TOML ["}, "communication", "compress.codec=auto"),
    ],
)
def test_the_verdict_and_what_to_try(
    tmp_path: Path, plan: dict[str, Any], bound: str, advice: str
) -> None:
    verdict = summary(tmp_path, **plan).verdict
    assert verdict.bound == bound
    assert advice in verdict.advice


def test_imbalance_is_the_largest_over_the_mean() -> None:
    assert imbalance(np.array([[1.0, 2.0], [3.0, 2.0]])) == pytest.approx((1.5 + 1.0) / 2)
    assert imbalance(np.zeros((2, 3))) == 1.0


def test_excess_needs_another_rank_and_most_steps() -> None:
    whole = np.full((2, 10), 100.0)
    values = np.zeros((2, 10))
    values[1, 0] = 90.0
    assert excess(values, whole).tolist() == [0, 0]
    values[1] = 20.0
    assert excess(values, whole).tolist() == [0, 20]
    assert excess(values[:1], whole[:1]).tolist() == [0]


def test_since_when() -> None:
    steps = np.arange(1, 11)
    late = np.where(steps > 6, 30.0, 0.5)
    assert since(late, steps, 10.0) == 7
    assert since(np.full(10, 30.0), steps, 30.0) is None
