"""Who moves collectives on, and what becomes of their faults; without MPI."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from hpcsync.collectives.jobs import Place
from hpcsync.collectives.progress import Progress
from hpcsync.errors import CollectiveTimeout, HpcsyncError
from hpcsync.transports.base import Wait


class Gate(Wait):
    """Until somebody opens it."""

    def __init__(self) -> None:
        self.open = False
        self.askers: set[int] = set()

    def ready(self) -> bool:
        self.askers.add(threading.get_ident())
        return self.open

    def describe(self) -> str:
        return "waits at the gate"


class Passage:
    """A job that waits at a gate."""

    def __init__(self, gate: Gate, fault: Exception | None = None, priority: int = 0) -> None:
        self.gate, self.fault, self.priority, self.nbytes = gate, fault, priority, 1
        self.done = False
        self.by = 0

    def run(self) -> Iterator[Wait]:
        yield self.gate
        if self.fault:
            raise self.fault

    def finished(self) -> None:
        self.done = True
        self.by = threading.get_ident()

    def describe(self) -> str:
        return "a passage"

    def place(self) -> Place:
        return Place("a passage", 1, 0, "")


def eventually(condition: Callable[[], bool]) -> None:
    """Fail unless the condition comes true within ten seconds."""
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until, "it did not come true"
        time.sleep(1e-3)


@pytest.fixture
def progress() -> Iterator[Progress]:
    made = Progress(1 << 20, timeout_s=30.0)
    yield made
    made.close()


def test_the_thread_goes_on_by_itself(progress: Progress) -> None:
    gate = Gate()
    job = Passage(gate)
    progress.submit([job])
    eventually(lambda: bool(gate.askers))
    gate.open = True
    eventually(lambda: job.done)
    assert job.by != threading.get_ident()


def test_who_waits_moves_jobs_itself(progress: Progress) -> None:
    gates = [Gate(), Gate()]
    jobs = [Passage(gate) for gate in gates]
    progress.submit(list(jobs))
    threading.Timer(0.05, lambda: setattr(gates[0], "open", True)).start()
    threading.Timer(0.1, lambda: setattr(gates[1], "open", True)).start()
    progress.wait_until(lambda: all(job.done for job in jobs))
    assert threading.get_ident() in gates[1].askers


def test_who_computes_may_drive(progress: Progress) -> None:
    gate = Gate()
    job = Passage(gate)
    progress.drive()  # nothing is there
    progress.submit([job])

    def driven() -> bool:
        progress.drive()
        return threading.get_ident() in gate.askers

    eventually(driven)
    gate.open = True

    def over() -> bool:
        progress.drive()
        return job.done

    eventually(over)


def test_the_thread_takes_over_from_who_drove_and_stopped(progress: Progress) -> None:
    gate = Gate()
    job = Passage(gate)
    progress.submit([job])
    progress.drive()
    gate.open = True
    eventually(lambda: job.done)


def test_the_thread_takes_over_though_it_had_rested(progress: Progress) -> None:
    """What is handed over and driven once, before the thread has woken, is not forgotten."""
    for _ in range(5):
        gate = Gate()
        job = Passage(gate)
        progress.submit([job])
        progress.drive()
        time.sleep(0.03)
        gate.open = True
        eventually(lambda job=job: job.done)  # type: ignore[misc]
        time.sleep(0.03)


def test_time_in_which_nobody_looked_counts_for_no_timeout() -> None:
    progress = Progress(1 << 20, timeout_s=0.2)
    gate = Gate()
    progress.submit([Passage(gate)])
    with progress._turn:  # say, a breakpoint that stops all threads
        time.sleep(0.6)
    gate.open = True
    progress.wait_until(lambda: not progress.standing())
    progress.close()


def test_an_interrupt_in_a_round_ends_communication_and_says_so(progress: Progress) -> None:
    class Interrupts(Gate):
        def ready(self) -> bool:
            raise KeyboardInterrupt

    with progress._turn:
        progress.submit([Passage(Interrupts())])
    with pytest.raises((KeyboardInterrupt, HpcsyncError)):
        progress.wait_until(lambda: False)
    with pytest.raises(HpcsyncError, match="KeyboardInterrupt in a collective; none can go on"):
        progress.wait_until(lambda: False)


def test_a_handler_that_waits_within_a_round_is_told(progress: Progress) -> None:
    class Waits(Gate):
        def ready(self) -> bool:
            progress.wait_until(lambda: False)
            return True

    progress.submit([Passage(Waits())])
    with pytest.raises(HpcsyncError, match="a signal handler waits for a collective"):
        progress.wait_until(lambda: False)


@pytest.mark.parametrize("waits", [True, False])
def test_a_fault_reaches_whoever_asks_next(progress: Progress, waits: bool) -> None:
    gate = Gate()
    gate.open = True
    progress.submit([Passage(gate, ValueError("a fault"))])
    if waits:
        with pytest.raises(ValueError, match="a fault"):
            progress.wait_until(lambda: False)
    else:  # the thread met it
        eventually(lambda: bool(gate.askers))
    for _ in range(2):
        with pytest.raises(ValueError, match="a fault"):
            progress.wait_until(lambda: False)
        with pytest.raises(ValueError, match="a fault"):
            progress.submit([Passage(gate)])


def test_what_is_stuck_is_reported_to_who_waits() -> None:
    progress = Progress(1 << 20, timeout_s=0.05)
    progress.submit([Passage(Gate())])
    with pytest.raises(CollectiveTimeout, match=r"a passage: waits at the gate"):
        progress.wait_until(lambda: False)
    progress.close()


def test_time_in_which_nothing_was_to_do_counts_for_no_timeout() -> None:
    progress = Progress(1 << 20, timeout_s=0.2)
    for _ in range(2):
        gate = Gate()
        gate.open = True
        job = Passage(gate)
        progress.submit([job])
        progress.wait_until(lambda job=job: job.done)  # type: ignore[misc]
        time.sleep(0.3)
    progress.close()


def test_closing_tells_who_waits() -> None:
    progress = Progress(1 << 20, timeout_s=30.0)
    progress.submit([Passage(Gate())])
    threading.Timer(0.05, progress.close).start()
    with pytest.raises(HpcsyncError, match="communication is closed"):
        progress.wait_until(lambda: False)
    with pytest.raises(HpcsyncError, match="communication is closed"):
        progress.submit([Passage(Gate())])


def test_many_threads_wait_and_each_job_ends_once(progress: Progress) -> None:
    jobs = [Passage(Gate(), priority=index % 3) for index in range(50)]
    progress.submit(list(jobs))
    ended: list[int] = []

    def wait(index: int) -> None:
        progress.wait_until(lambda: jobs[index].done)
        ended.append(index)

    threads = [threading.Thread(target=wait, args=(index,)) for index in range(0, 50, 7)]
    for thread in threads:
        thread.start()
    for job in jobs:
        job.gate.open = True
    for thread in threads:
        thread.join(timeout=10)
    assert sorted(ended) == list(range(0, 50, 7))
    eventually(lambda: all(job.done for job in jobs))
