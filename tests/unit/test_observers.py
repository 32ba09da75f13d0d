"""What observers write, from records made by hand."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from hpcsync.observers import (
    CheckpointRecord,
    Observer,
    Observers,
    RunInfo,
    StepDetail,
    StepRecord,
    standard,
)
from hpcsync.observers.log import Log
from hpcsync.observers.metrics import Metrics
from hpcsync.observers.progress import Progress, brief, clock, is_terminal
from hpcsync.observers.summary import Summary, overlap

# The keys that other tools read; more may be added.
PROMISED = {
    *("ranks", "nodes", "steps", "loss_first", "loss_last", "val_loss", "tokens_per_s"),
    *("step_ms", "compute_ms", "comm_ms", "exposed_comm_ms", "wait_ms", "overlap"),
    *("internode_bytes_per_step", "codec", "algorithm", "status"),
}


def info(folder: Path, **changes: Any) -> RunInfo:
    given: dict[str, Any] = {
        "folder": folder,
        "rank": 0,
        "ranks": 4,
        "nodes": 2,
        "host": "a",
        "steps": 10,
        "tokens_per_step": 2048,
        "unit": "byte",
        "val_unit": "bits/byte",
        "codec": "none",
        "algorithm": "hierarchical",
        "every_s": 0.0,
        "run_id": "abcd1234",
    }
    return RunInfo(**{**given, **changes})


def record(step: int, **changes: Any) -> StepRecord:
    given: dict[str, Any] = {
        "step": step,
        "loss": 5.0 - 0.1 * step,
        "lr": 1e-3,
        "grad_norm": 1.25,
        "step_ms": 100.0 + step,
        "compute_ms": 90.0,
        "comm_ms": 40.0,
        "exposed_comm_ms": 10.0,
        "wait_ms": 5.0,
        "tokens_per_s": 20000.0,
        "internode_bytes": 1000.0,
        "loss_scale": 1.0,
        "skipped": False,
    }
    return StepRecord(**{**given, **changes})


def run(observer: Observer, about: RunInfo, steps: int = 3, status: str = "done") -> None:
    observer.started(about)
    observer.evaluated(0, 8.0)
    for step in range(1, steps + 1):
        if step == steps:
            observer.evaluated(step, 3.5)
        observer.stepped(record(step))
    observer.ended(status, "")


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def test_summary_holds_what_is_promised(tmp_path: Path) -> None:
    run(Summary(), info(tmp_path))
    found = summary(tmp_path)
    assert set(found) >= PROMISED
    assert (found["ranks"], found["nodes"], found["steps"]) == (4, 2, 3)
    assert found["loss_first"] == pytest.approx(4.9)
    assert found["loss_last"] == pytest.approx(4.7)
    assert (found["val_loss_first"], found["val_loss"]) == (8.0, 3.5)
    assert found["step_ms"] == 102.0
    assert found["overlap"] == pytest.approx(0.75)
    assert found["wait_ms"] == 5.0
    assert found["tokens_per_s"] == pytest.approx(2048 / 0.102)
    assert found["status"] == "done"
    assert found["run_id"] == "abcd1234"
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_summary_of_a_run_that_failed_before_its_first_step(tmp_path: Path) -> None:
    observer = Summary()
    observer.started(info(tmp_path))
    observer.ended("failed", "out of memory")
    found = summary(tmp_path)
    assert (found["status"], found["detail"], found["steps"]) == ("failed", "out of memory", 0)
    assert found["loss_last"] is None
    assert found["step_ms"] is None


def test_summary_is_json_even_of_a_loss_that_is_nan(tmp_path: Path) -> None:
    observer = Summary()
    observer.started(info(tmp_path))
    observer.stepped(record(1, loss=math.nan, grad_norm=math.inf, skipped=True))
    observer.ended("failed", "")
    found = summary(tmp_path)
    assert found["loss_last"] is None
    assert found["skipped"] == 1
    assert "NaN" not in (tmp_path / "summary.json").read_text()


def test_a_signal_writes_the_summary_at_once(tmp_path: Path) -> None:
    observer = Summary()
    observer.started(info(tmp_path))
    observer.stepped(record(1))
    observer.interrupted("SIGTERM")
    assert summary(tmp_path)["status"] == "interrupted"
    assert summary(tmp_path)["steps"] == 1


def test_the_rank_that_fails_has_the_last_word(tmp_path: Path) -> None:
    zero, one = Summary(), Summary()
    zero.started(info(tmp_path))
    one.started(info(tmp_path, rank=1))
    zero.stepped(record(1))
    one.stepped(record(1))
    one.ended("failed", "rank 1 fell")
    zero.interrupted("SIGTERM")  # the end of the job reaches rank 0 as a signal
    found = summary(tmp_path)
    assert (found["status"], found["detail"], found["steps"]) == ("failed", "rank 1 fell", 1)
    assert set(found) >= PROMISED


def test_ranks_of_two_hosts_do_not_write_into_each_others_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process ids are the same there."""
    aside = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: (aside.append(self), replace(self, to)))
    for host, rank in (("a", 0), ("b", 1), ("a", 2)):
        observer = Summary()
        observer.started(info(tmp_path, rank=rank, host=host))
        observer.ended("failed", "")
    assert len(set(aside)) == 3


def test_other_ranks_write_nothing_of_a_good_run(tmp_path: Path) -> None:
    run(standard(1), info(tmp_path, rank=1))
    assert list(tmp_path.iterdir()) == []


def test_overlap() -> None:
    assert overlap(0.0, 0.0) == 1.0
    assert overlap(10.0, 10.0) == 0.0
    assert overlap(10.0, 12.0) == 0.0
    assert overlap(None, None) is None


def test_metrics_have_a_row_a_step(tmp_path: Path) -> None:
    run(Metrics(), info(tmp_path))
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert [row["val_loss"] for row in rows] == ["", "", "3.5"]
    assert float(rows[1]["loss"]) == pytest.approx(4.8)
    assert {"lr", "grad_norm", "step_ms", "exposed_comm_ms"} <= set(rows[0])
    assert rows[0]["skipped"] == "0"
    assert {row["run_id"] for row in rows} == {"abcd1234"}


def test_metrics_are_in_the_file_before_the_end(tmp_path: Path) -> None:
    observer = Metrics()
    observer.started(info(tmp_path))
    observer.stepped(record(1))
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 2
    observer.ended("failed", "")


def test_log_has_run_step_rank_and_host_in_each_line(tmp_path: Path) -> None:
    log = Log()
    log.started(info(tmp_path))
    log.stepped(record(1, skipped=True, loss_scale=math.inf))
    other = Log()
    other.started(info(tmp_path, rank=3, host="b"))
    other.ended("failed", "no more memory")
    log.ended("failed", "")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["started", "skipped", "ended", "ended"]
    assert [(line["rank"], line["host"]) for line in lines] == [
        (0, "a"),
        (0, "a"),
        (3, "b"),
        (0, "a"),
    ]
    assert {line["run_id"] for line in lines} == {"abcd1234"}
    assert [line["step"] for line in lines] == [0, 1, 0, 1]
    assert lines[1]["loss_scale"] == "inf"
    assert lines[2]["detail"] == "no more memory"


def test_progress_lines(tmp_path: Path) -> None:
    stream = io.StringIO()
    run(Progress(stream), info(tmp_path))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 0/10  held-out loss 8.0000 bits/byte"
    assert lines[1] == ("step 1/10  loss 4.9000  20.3k bytes/s  exposed comm 9.9%  left 0:01")
    assert lines[3].startswith("step 3/10  held-out loss 3.5000")


def test_progress_keeps_to_its_pace(tmp_path: Path) -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    progress.started(info(tmp_path, every_s=3600.0))
    for step in range(1, 11):
        progress.stepped(record(step))
    progress.ended("done", "")
    steps = [line.split()[1] for line in stream.getvalue().splitlines()]
    assert steps == ["1/10", "10/10"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1


def test_progress_on_a_terminal_is_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.get_terminal_size", lambda fd=0: (100, 30))
    monkeypatch.setattr("hpcsync.observers.progress.is_terminal", lambda stream: True)
    stream = Terminal()
    run(Progress(stream), info(tmp_path, steps=3))
    text = stream.getvalue()
    assert "held-out loss 3.5000 bits/byte" in text
    assert "3/3" in text
    assert "\x1b[?25h" in text, "the cursor is shown again"


def test_the_pseudo_terminal_of_mpirun_is_not_one() -> None:
    import os
    import pty

    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as stream:
        assert stream.isatty()
        assert not is_terminal(stream)
    os.close(master)


def test_numbers_for_people() -> None:
    assert [brief(x) for x in (0, 12.4, 999, 1000, 45230, 451000, 2.5e6)] == [
        "0",
        "12",
        "999",
        "1k",
        "45.2k",
        "451k",
        "2.5M",
    ]
    assert [clock(x) for x in (0, 61, 3723.4)] == ["0:00", "1:01", "1:02:03"]


def test_what_is_measured_reaches_those_who_want_it() -> None:
    told: list[StepDetail] = []

    class Curious(Observer):
        def wants_detail(self) -> bool:
            return True

        def measured(self, detail: StepDetail) -> None:
            told.append(detail)

    assert not Observers([Observer(), Observer()]).wants_detail()
    observers = Observers([Observer()])
    observers.join(Curious())
    assert observers.wants_detail()
    observers.measured(StepDetail(queued=2))
    assert told == [StepDetail(queued=2)]


class Broken(Observer):
    def ended(self, status: str, detail: str) -> None:
        raise OSError("disk full")


def test_every_observer_hears_of_the_end_once(capsys: pytest.CaptureFixture[str]) -> None:
    ended: list[str] = []

    class Faulty(Observer):
        def ended(self, status: str, detail: str) -> None:
            raise ValueError("planted")

    class Last(Observer):
        def ended(self, status: str, detail: str) -> None:
            ended.append(status)

    observers = Observers([Broken(), Faulty(), Last()])
    with pytest.raises(ValueError, match="planted"):
        observers.ended("done", "")
    observers.ended("failed", "again")
    assert ended == ["done"]
    assert "the run's broken is not complete: disk full" in capsys.readouterr().err


def test_a_full_disk_does_not_end_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told once; rows are whole, and there again when there is room."""
    observers = Observers([Metrics()])
    observers.started(info(tmp_path))
    observers.stepped(record(1))
    write, room = os.pwrite, [10]

    def full(handle: int, data: bytes, offset: int) -> int:
        if not room:
            raise OSError(28, "No space left on device")
        return write(handle, data[: room.pop()], offset)

    monkeypatch.setattr(os, "pwrite", full)
    observers.stepped(record(2))
    observers.stepped(record(3))
    monkeypatch.undo()
    observers.stepped(record(4))
    observers.ended("done", "")
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "4"]
    assert capsys.readouterr().err.count("WARNING: the run's metrics") == 1


def test_rows_of_a_resumed_run(tmp_path: Path) -> None:
    """Those up to its first step stay, whatever was torn; those that were replayed are added."""
    run(Metrics(), info(tmp_path), steps=5)
    path = tmp_path / "metrics.csv"
    before = path.read_text().splitlines()
    path.write_text("\n".join(before[:-1]) + "\n5,0.3")
    again = Metrics()
    again.resumed({"replayed": [record(4, loss=9.0), record(5, loss=8.0)]})
    again.started(info(tmp_path, first_step=5, run_id="other"))
    again.stepped(record(6))
    again.ended("done", "")
    after = path.read_text().splitlines()
    assert after[:5] == before[:5]
    assert [row.split(",")[0] for row in after[1:]] == ["1", "2", "3", "4", "5", "6"]
    assert [row.rsplit(",", 1)[1] for row in after[-2:]] == ["other", "other"]
    third = Metrics()
    third.started(info(tmp_path, first_step=2))
    third.ended("done", "")
    assert path.read_text().splitlines() == before[:3]


def test_a_summary_is_of_the_whole_run(tmp_path: Path) -> None:
    first = Summary()
    first.started(info(tmp_path))
    first.evaluated(0, 8.0)
    first.stepped(record(1, skipped=True))
    again = Summary()
    again.resumed(first.state())
    again.started(info(tmp_path, first_step=1, checkpoint_step=1))
    again.stepped(record(2))
    again.checkpointed(CheckpointRecord(step=2))
    found = summary(tmp_path)
    assert (found["status"], found["checkpoint_step"], found["first_step"]) == ("running", 2, 1)
    again.checkpointed(CheckpointRecord(step=3, problem="disk full"))
    again.ended("done", "")
    found = summary(tmp_path)
    assert (found["loss_first"], found["val_loss_first"], found["skipped"]) == (4.9, 8.0, 1)
    assert (found["checkpoint_step"], found["checkpoints_failed"]) == (2, 1)


def test_a_summary_counts_what_was_replayed(tmp_path: Path) -> None:
    """The state is that of a checkpoint before the first step."""
    again = Summary()
    again.resumed(Summary().state())
    again.resumed({"replayed": [record(1, loss=7.0), record(2, loss=6.0, skipped=True)]})
    again.started(info(tmp_path, first_step=2, checkpoint_step=0))
    again.evaluated(2, 5.0)
    again.ended("done", "")
    found = summary(tmp_path)
    names = ("steps", "first_step", "checkpoint_step", "loss_first", "loss_last", "skipped")
    assert [found[name] for name in names] == [2, 2, 0, 7.0, 6.0, 1]
    assert found["step_ms"] is None
    assert found["val_loss"] == 5.0


@pytest.mark.parametrize("lost", [True, False])
def test_the_held_out_loss_of_the_last_row_is_filled_in(tmp_path: Path, lost: bool) -> None:
    """If the replay ended at a step whose row, or the loss in it, was lost."""
    first = Metrics()
    first.started(info(tmp_path))
    first.stepped(record(1))
    if not lost:
        first.evaluated(2, 4.5)
        first.stepped(record(2))
    first.ended("done", "")
    again = Metrics()
    again.resumed({"replayed": [record(1), record(2)]})
    again.started(info(tmp_path, first_step=2))
    again.evaluated(2, 5.5)
    again.stepped(record(3))
    again.ended("done", "")
    with (tmp_path / "metrics.csv").open(newline="") as file:
        found = [(row["step"], row["val_loss"]) for row in csv.DictReader(file)]
    assert found == [("1", ""), ("2", "5.5" if lost else "4.5"), ("3", "")]


def test_a_signal_that_is_heard_late_does_not_hide_how_the_run_ended(tmp_path: Path) -> None:
    observer = Summary()
    run(observer, info(tmp_path), status="interrupted")
    before = summary(tmp_path)
    observer.interrupted("SIGTERM")
    assert summary(tmp_path) == before
