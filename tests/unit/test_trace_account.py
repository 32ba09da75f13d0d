"""Where the time of steps goes, against the schedule that a trace was made of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hpcsync import trace
from hpcsync.errors import UserError
from hpcsync.trace.analysis.account import PARTS, account, names_of
from hpcsync.trace.analysis.exchange import collectives, exchange, middle, waiting_share
from hpcsync.trace.analysis.summary import summarise
from hpcsync.trace.analysis.tables import Tables, collect
from hpcsync.trace.events import EVENT, LANE
from hpcsync.trace.file import Trace
from tests.traces import MIB, Plan, make, schedule

PLAN = Plan(ranks=8, nodes=4, codec="int8", slow_forward={5: 30.0}, drift_ppm={2: 20.0})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("run"), PLAN)


def tables(run: Path) -> Tables:
    with trace.open(run) as found:
        return collect(found, found.ranks, lambda there: there)


def test_parts_sum_to_the_step_and_are_as_planned(run: Path) -> None:
    true, found = schedule(PLAN), tables(run)
    columns = found.columns
    np.testing.assert_allclose(sum(columns[part] for part in PARTS), columns["whole"])
    for name, planned in (
        ("whole", true.end - true.begin),
        ("forward", true.forward - true.data),
        ("data", true.data - true.begin),
        ("agreement", true.end - true.optimizer),
    ):
        # A clock that drifts by 20 ppm is that much off in durations, too.
        np.testing.assert_allclose(columns[name], planned.T, rtol=3e-5, atol=10)
    # What a rank is idle since the exchange ended later on another counts as exposed.
    waited = (true.exposed - true.backward + true.end - true.optimizer).T
    np.testing.assert_allclose(columns["exposed"] + columns["idle"], waited, rtol=3e-5, atol=10)
    assert (columns["exposed"] >= (true.exposed - true.backward).T * (1 - 3e-5) - 10).all()


def test_transfer_is_told_apart_from_waiting(run: Path) -> None:
    true, found = schedule(PLAN), tables(run)
    split = exchange(found)
    np.testing.assert_allclose(split.transfer, (true.done - true.first).min(axis=1), rtol=1e-4)
    assert split.wait.min() >= 0
    # The late rank waits for nobody; the others for it.
    assert split.wait[5].mean() < 1e5
    assert split.wait[[0, 7]].mean() > 10e6
    assert split.late[5].mean() > 10e6
    # 30 ms of about 35 that are exposed on seven ranks of eight.
    assert waiting_share(found, split) == pytest.approx(0.8, abs=0.1)


def test_bandwidths_of_a_collective(run: Path) -> None:
    found = tables(run)
    first = collectives(found, exchange(found))[0]
    assert first.nbytes == PLAN.bucket_mib * MIB
    assert first.algbw == pytest.approx(first.nbytes / first.transfer_ms / 1e6)
    assert first.busbw == pytest.approx(first.algbw * 2 * 7 / 8)
    assert (first.last, first.last_share) == (5, 1.0)


def test_overlap_is_what_compute_hides(tmp_path: Path) -> None:
    hidden = summary(make(tmp_path / "hidden", rail_ms=0.2))
    bare = summary(make(tmp_path / "bare", rail_ms=30.0))
    assert hidden.overlap > 0.6
    assert bare.overlap < 0.2
    assert hidden.comm_ms < bare.comm_ms
    exposed = next(part for part in bare.parts if part.name == "exposed")
    assert bare.overlap == pytest.approx(1 - exposed.ms / bare.comm_ms, abs=0.01)


def test_what_the_exchange_takes_by_itself_lies_between_its_bounds(tmp_path: Path) -> None:
    told = {"rates": [{"step": 0, "nodes": {"0": 1e9, "1": 1e9}}]}
    found = summary(make(tmp_path / "run", rail_ms=8.0, links=json.dumps(told)))
    bare = summary(make(tmp_path / "bare", rail_ms=8.0))
    sent = found.tables.columns["bytes.wire.rail"][found.tables.node == 0].mean(axis=1).sum()
    assert sent / 1e9 * 1e3 < found.alone_ms < bare.alone_ms
    exposed = next(part for part in found.parts if part.name == "exposed")
    assert found.overlap == pytest.approx(1 - exposed.ms / found.alone_ms, abs=0.02)


def test_working_for_the_exchange_is_no_computation() -> None:
    names = ("exposed", "driven", "agreement", "fill", "queued", "combine", "step", "backward")
    rows = np.zeros(4, EVENT)
    rows["step"] = 1
    for row, lane, name, start, end in (
        (rows[0], "step", "step", 0, 100),
        (rows[1], "backward", "backward", 10, 80),
        (rows[2], "wait", "driven", 30, 45),
        (rows[3], "wait", "exposed", 80, 95),
    ):
        row["lane"], row["name"] = LANE[lane], names.index(name)
        row["start"], row["end"] = start, end
    found = account(rows, names_of(names))
    assert found is not None
    parts = {name: int(found.columns[name][0]) for name in ("compute", "exposed", "driven")}
    assert parts == {"compute": 55, "exposed": 30, "driven": 15}


def summary(run: Path):
    with trace.open(run) as found:
        return summarise(found, found.ranks)


def test_stages_that_run_side_by_side_count_once() -> None:
    events = np.zeros(4, EVENT)
    events["step"], events["start"] = 1, [0, 10, 20, 90]
    events["end"] = [100, 60, 70, 120]
    events["lane"] = [LANE[name] for name in ("step", "wire.rail", "wire.rail", "checkpoint")]
    found = account(events, names_of(()))
    assert found is not None
    assert found.columns["wire.rail"].tolist() == [60]
    assert found.columns["other"].tolist() == [100]
    assert found.columns["checkpoint"].tolist() == [10]


def test_a_step_that_was_cut_off_does_not_count() -> None:
    events = np.zeros(3, EVENT)
    events["step"], events["start"], events["end"] = [1, 1, 2], [0, 0, 100], [100, 40, 140]
    events["lane"] = [LANE["step"], LANE["forward"], LANE["forward"]]
    found = account(events, names_of(()))
    assert found is not None
    assert found.steps.tolist() == [1]
    assert found.columns["forward"].tolist() == [40]
    assert account(events[2:], names_of(())) is None


def test_the_middle_of_two_is_the_smaller() -> None:
    assert middle(np.array([[4.0], [9.0]])) == 4
    assert middle(np.array([[9.0], [4.0], [5.0]])) == 5


def test_ranks_with_few_steps_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path, steps=8)
    events = Trace.events

    def cut(self: Trace, rank: int, steps: object = None) -> np.ndarray:
        found = events(self, rank)
        last = {1: 2, 2: 0, 3: 6}.get(rank, 8)
        return found[found["step"] <= last]

    monkeypatch.setattr(Trace, "events", cut)
    with trace.open(run) as found:
        kept = collect(found, found.ranks)
        assert kept.ranks == (0, 3)
        assert kept.steps.tolist() == [2, 3, 4, 5, 6]
        assert found.problems == [
            "rank 2 has no complete step; left out",
            "rank 1 has less than half of the steps; left out",
        ]
        with pytest.raises(UserError, match="no complete step of rank 2"):
            collect(found, [2])


def test_one_rank_alone(tmp_path: Path) -> None:
    found = summary(make(tmp_path, ranks=1, nodes=1))
    assert np.isnan(found.overlap)
    assert found.collectives == []
    assert found.verdict.bound == "compute"
