"""Signals: remembered, told at once, and the end of patience."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time

import pytest

from hpcsync.stopping import StoppedError, StopSignals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_remembered_and_told(number: signal.Signals) -> None:
    told: list[str] = []
    heard = threading.Event()

    def on_signal(name: str) -> None:
        told.append(name)
        heard.set()

    before = signal.getsignal(number)
    with StopSignals(on_signal, lambda status: None) as stop:
        assert stop.received == 0
        os.kill(os.getpid(), number)
        assert heard.wait(10)
        assert stop.received == number
    assert told == [number.name]
    assert signal.getsignal(number) is before


def test_it_gives_up_on_a_step_that_does_not_end() -> None:
    gave_up: list[int] = []
    done = threading.Event()

    def give_up(status: int) -> None:
        gave_up.append(status)
        done.set()

    with StopSignals(lambda name: None, give_up, grace_s=0.05):
        os.kill(os.getpid(), signal.SIGTERM)
        assert done.wait(10)
    assert gave_up == [143]


def test_a_stop_in_time_is_not_given_up_on() -> None:
    gave_up: list[int] = []
    with StopSignals(lambda name: None, gave_up.append, grace_s=60) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        while not stop.received:
            time.sleep(0.01)
    assert gave_up == []


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("changed size")])
def test_a_failing_note_does_not_keep_the_job_alive(error: Exception) -> None:
    done = threading.Event()

    def on_signal(name: str) -> None:
        raise error

    with StopSignals(on_signal, lambda status: done.set(), grace_s=0.01):
        os.kill(os.getpid(), signal.SIGTERM)
        assert done.wait(10)


def test_nothing_is_left_of_a_quiet_run() -> None:
    threads = threading.active_count()
    with StopSignals(lambda name: None, lambda status: None):
        pass
    assert threading.active_count() == threads


def test_sigusr1_asks_to_save_and_stops_nothing() -> None:
    asked: list[int] = []
    with StopSignals(lambda name: None, lambda status: None) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        stop.asks_to_save(lambda: asked.append(1))
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.received == 0
    assert asked == [1, 1], "what came before there was anybody to ask is remembered"


def test_more_time_may_be_had_once_the_boundary_is_reached() -> None:
    gave_up = threading.Event()
    with StopSignals(lambda name: None, lambda status: gave_up.set(), grace_s=0.5) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        stop.allow(60.0)
        assert not gave_up.wait(1.5)


def test_a_signal_that_comes_during_the_save_gives_it_that_time_too() -> None:
    gave_up = threading.Event()
    with StopSignals(lambda name: None, lambda status: gave_up.set(), grace_s=0.01) as stop:
        stop.allow(60.0)
        stop._until = 0.0  # a long save
        os.kill(os.getpid(), signal.SIGTERM)
        assert not gave_up.wait(1.0)


def test_sigusr2_asks_to_save_and_leave_and_is_not_in_a_hurry() -> None:
    gave_up = threading.Event()
    with StopSignals(lambda name: None, lambda status: gave_up.set(), grace_s=0.01) as stop:
        assert not stop.leave
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.leave
        assert stop.received == 0
        assert not gave_up.wait(0.5)
    told = StoppedError(signal.SIGUSR2)
    assert str(told) == "stopped by SIGUSR2, to be resumed"
    assert told.status == 75
    assert pickle.loads(pickle.dumps(told)).status == 75
