"""When a checkpoint is due, by a clock that the tests turn."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpcsync.checkpoint.saver import Saver
from hpcsync.checkpoint.triggers import SAVE_NOW, STOP_AFTER_SAVE, Triggers
from hpcsync.checkpoint.worker import Worker
from hpcsync.intervals import Interval, best


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "monotonic", made)
    return made


def test_by_steps(tmp_path: Path, clock: Clock) -> None:
    triggers = Triggers(Interval(steps=3), tmp_path, 1.0)
    assert [step for step in range(1, 10) if triggers.due(step, writing=False)] == [3, 6, 9]


def test_a_step_that_is_told_twice_asks_once() -> None:
    asked: list[int] = []

    def due(step: int, *, writing: bool) -> bool:
        asked.append(step)
        return True

    triggers = SimpleNamespace(due=due, stop=False)
    saver: Any = SimpleNamespace(
        asked=False,
        _runtime=SimpleNamespace(rank=0),
        _triggers=triggers,
        _writing=(),
        _publishing=(),
        _offered_step=-1,
    )
    assert [Saver.offer(saver, step)[0] for step in (4, 4, None, 5)] == [1, 0, 0, 1]
    assert asked == [4, 5]


def test_never(tmp_path: Path, clock: Clock) -> None:
    triggers = Triggers(Interval(), tmp_path, 1.0)
    clock.now += 1e9
    assert not any(triggers.due(step, writing=False) for step in range(1, 1000))


def test_by_time_since_the_last_one(tmp_path: Path, clock: Clock) -> None:
    triggers = Triggers(Interval(seconds=60.0), tmp_path, 1.0)
    found = []
    for step in range(1, 20):
        clock.now += 25
        if triggers.due(step, writing=False):
            found.append(step)
            triggers.taken(step)
    assert found == [3, 6, 9, 12, 15, 18]


def test_auto_weighs_the_stall_and_what_writing_slows(tmp_path: Path, clock: Clock) -> None:
    """Steps of 1 s, of 1.5 s while writing; a stall of 2 s: 3.5 s with three such steps."""
    mtbf_s = 1000.0
    triggers = Triggers(Interval(auto=True), tmp_path, mtbf_s)
    step = 0

    def steps(count: int, seconds: float, *, writing: bool) -> list[bool]:
        nonlocal step
        found = []
        for _ in range(count):
            step += 1
            clock.now += seconds
            found.append(triggers.due(step, writing=writing))
        return found

    assert steps(10, 1.0, writing=False) == [False] * 9 + [True]
    triggers.taken(10)
    assert not any(steps(3, 1.5, writing=True))
    triggers.saved(10, 2.0, 4.5)
    wait_s = best(3.5, mtbf_s)
    later = steps(200, 1.0, writing=False)
    assert later.index(True) + 1 == pytest.approx(wait_s - 4.5, abs=1)


def test_auto_tries_again_after_a_failure(tmp_path: Path, clock: Clock) -> None:
    triggers = Triggers(Interval(auto=True), tmp_path, 100.0)
    assert sum(triggers.due(step, writing=False) for step in range(1, 15)) == 1
    triggers.taken(10)
    triggers.failed(10)
    assert sum(triggers.due(step, writing=False) for step in range(15, 30)) == 1


def test_files_are_looked_for_once_a_second_and_removed_when_obeyed(
    tmp_path: Path, clock: Clock
) -> None:
    triggers = Triggers(Interval(), tmp_path, 1.0)
    assert not triggers.due(1, writing=False)
    (tmp_path / SAVE_NOW).touch()
    assert not triggers.due(2, writing=False)
    clock.now += 1.1
    assert triggers.due(3, writing=False)
    triggers.taken(3)
    clock.now += 1.1
    assert not triggers.due(4, writing=True), "it is being obeyed"
    triggers.saved(3, 0.1, 0.1)
    assert not (tmp_path / SAVE_NOW).exists()
    (tmp_path / STOP_AFTER_SAVE).touch()
    clock.now += 1.1
    assert triggers.due(5, writing=False)
    assert triggers.stop
    triggers.taken(5)
    triggers.failed(5)
    clock.now += 10
    assert not triggers.due(6, writing=False)
    clock.now += 60
    assert triggers.due(7, writing=False), "it is still there: tried again after a minute"
    assert triggers.stop


def test_a_file_is_obeyed_by_the_checkpoint_it_asked_for(tmp_path: Path, clock: Clock) -> None:
    """Two are under way: what becomes of the older is nothing to who asked for the newer."""
    triggers = Triggers(Interval(steps=2), tmp_path, 1.0)
    files = tmp_path / SAVE_NOW, tmp_path / STOP_AFTER_SAVE
    for end in ("saved", "failed"):
        assert triggers.due(2, writing=False)
        triggers.taken(2)
        for file in files:
            file.touch()
        clock.now += 100
        assert triggers.due(3, writing=True)
        triggers.taken(3)
        if end == "saved":
            triggers.saved(2, 0.1, 0.1)
        else:
            triggers.failed(2)
        assert all(file.exists() for file in files)
        clock.now += 100
        assert not triggers.due(5, writing=True), "they are being obeyed"
        triggers.saved(3, 0.1, 0.1)
        assert not any(file.exists() for file in files)


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_a_sick_folder_asks_for_nothing(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def stat(*_: object, **__: object) -> os.stat_result:
        raise OSError(code, os.strerror(code))

    triggers = Triggers(Interval(), tmp_path, 1.0)
    monkeypatch.setattr(os, "stat", stat)
    assert not triggers.due(1, writing=False)


def test_a_worker_survives_what_it_does(capfd: pytest.CaptureFixture[str]) -> None:
    done: list[int] = []
    worker = Worker("test")
    worker.submit(lambda: done.append(1 // 0))
    worker.submit(lambda: done.append(1))
    worker.close(30.0)
    assert done == [1]
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_worker_does_what_is_first_first_and_ends_when_all_is_done() -> None:
    done: list[int] = []
    worker = Worker("test")
    for number in range(3):
        worker.submit(lambda number=number: done.append(number))  # type: ignore[misc]
    worker.close(30.0)
    assert done == [0, 1, 2]
