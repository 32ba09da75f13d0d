"""The recorder's ring: what it keeps, who may write, what a reader sees."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from hpcsync.trace import recorder as recording
from hpcsync.trace.events import EVENT, LANES, NAMES
from hpcsync.trace.later import Earliest, Latest
from hpcsync.trace.recorder import BUCKET, FORWARD, STEP, WIRE, Recorder, Ring, now, room


def test_a_span_is_kept_as_it_was_told() -> None:
    recorder = Recorder(8)
    recorder.begin_step(3)
    step = recorder.parent
    recorder.add(FORWARD, 10, 20)
    number = recorder.number()
    recorder.add(WIRE["rail"], 30, 50, 1000, 2, number)
    recorder.add(BUCKET, 25, 60, 4000, 2, number=number)
    recorder.end_step(5)
    forward, wire, bucket, whole = recorder.last()
    assert (forward["start"], forward["end"], forward["step"]) == (10, 20, 3)
    assert (forward["bucket"], forward["bytes"], forward["parent"]) == (-1, 0, step)
    assert LANES[wire["lane"]] == "wire.rail"
    assert NAMES[wire["name"]] == ("transfer", "wire.rail")
    assert (wire["bytes"], wire["bucket"], wire["parent"]) == (1000, 2, bucket["id"])
    assert (bucket["parent"], whole["id"], whole["parent"], whole["start"]) == (step, step, 0, 5)
    ids = [int(each["id"]) for each in recorder.last()]
    assert len(set(ids)) == 4
    assert ids[2:] == [number, step]


def test_a_block_is_a_span() -> None:
    recorder = Recorder(8)
    with pytest.raises(ValueError, match="inside"), recorder.span(FORWARD, 7, 1) as number:
        raise ValueError("inside")
    (found,) = recorder.last()
    assert (found["id"], found["bytes"], found["bucket"]) == (number, 7, 1)
    assert found["end"] >= found["start"] > 0


@pytest.mark.parametrize("stored", [0, 1, 6, 7, 8, 9, 30])
def test_the_last_spans_are_kept(stored: int) -> None:
    recorder = Recorder(8)
    for index in range(stored):
        recorder.add(STEP, index, index + 1)
    kept = [int(each["start"]) for each in recorder.last()]
    assert kept == list(range(max(0, stored - 7), stored))  # one slot may be half written


def test_a_reader_gets_each_span_once_and_knows_what_it_missed() -> None:
    memory = np.zeros(room(16), np.uint8)
    recorder, ring = Recorder(memory=memory), Ring(memory)
    assert recorder.events == 16
    seen: list[int] = []
    for burst in (3, 0, 15, 40, 1):
        for _ in range(burst):
            recorder.add(STEP, len(seen), now())
        seen += [int(each["id"]) for each in ring.take()]
    assert seen == sorted(set(seen))
    assert len(seen) + ring.lost == 59
    assert ring.lost == 25


def test_a_step_is_over_when_it_is_said_to_be() -> None:
    memory = np.zeros(room(4), np.uint8)
    recorder, ring = Recorder(memory=memory), Ring(memory)
    recorder.begin_step(1)
    assert ring.finished == 0
    recorder.end_step(now())
    assert ring.finished == 1


def test_threads_lose_nothing() -> None:
    recorder, each = Recorder(20_000), 2000

    def store(thread: int) -> None:
        for index in range(each):
            recorder.add(STEP, thread, index)

    threads = [threading.Thread(target=store, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = recorder.last()
    assert found.shape[0] == 4 * each
    assert np.unique(found["id"]).shape[0] == 4 * each
    assert (found["thread"] == 1).all()
    for thread in range(4):
        ends = found["end"][found["start"] == thread]
        np.testing.assert_array_equal(ends, np.arange(each))


def test_steps_are_counted_where_no_loop_begins_them() -> None:
    recorder = Recorder(4)
    recorder.count_step()
    recorder.count_step()
    assert recorder.step == 2
    recorder.begin_step(7)
    recorder.count_step()  # the loop's own step goes on
    assert recorder.step == 7


def test_it_may_move_to_other_memory() -> None:
    recorder = Recorder(4)
    recorder.add(STEP, 1, 2)
    recorder.move(np.zeros(room(6), np.uint8))
    assert recorder.events == 6
    assert recorder.last().shape[0] == 0
    recorder.add(STEP, 3, 4)
    assert recorder.last()["start"].tolist() == [3]


def test_every_name_has_a_span() -> None:
    spans = [value for value in vars(recording).values() if isinstance(value, recording.Span)]
    spans += WIRE.values()
    assert sorted(span.name for span in spans) == list(range(len(NAMES)))
    for span in spans:
        assert NAMES[span.name][1] == LANES[span.lane]
    assert EVENT.itemsize == 56


class Reached:
    """An event that a test lets happen."""

    def __init__(self, at: int) -> None:
        self.at, self.done = at, False

    def ready(self) -> bool:
        return self.done

    def reached_ns(self) -> int:
        assert self.done
        return self.at


def test_a_devices_spans_are_stored_when_their_times_are_known() -> None:
    recorder = Recorder(16)
    events = [Reached(at) for at in (10, 20, 30, 40)]
    first, second, third, fourth = events
    step = recorder.begin_step(4)
    number = recorder.number()
    recorder.later.add(WIRE["rail"], first, second, 99, 3, number)
    recorder.later.add(BUCKET, first, third, 99, 3, number=number)
    recorder.end_step_later(first, fourth)
    recorder.begin_step(5)
    recorder.later.settle()
    assert not recorder.last().shape[0]
    second.done = first.done = True
    recorder.later.settle()
    (wire,) = recorder.last()
    assert (wire["start"], wire["end"], wire["step"], wire["parent"]) == (10, 20, 4, number)
    assert (wire["bytes"], wire["bucket"]) == (99, 3)
    third.done = fourth.done = True
    recorder.later.settle()
    recorder.later.settle()
    _, bucket, whole = recorder.last()
    assert (bucket["end"], bucket["parent"], bucket["id"]) == (30, step, number)
    assert (whole["id"], whole["parent"], whole["step"]) == (step, 0, 4)
    assert Ring(recorder._memory).finished == 4


def test_of_several_events() -> None:
    events = [Reached(20), Reached(10)]
    events[0].done = True
    assert not Latest(events).ready()
    events[1].done = True
    assert Earliest(events).ready()
    assert (Earliest(events).reached_ns(), Latest(events).reached_ns()) == (10, 20)
