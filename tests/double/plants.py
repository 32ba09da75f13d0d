"""Ordering bugs to plant: what the test double is there to find.

Each is a small change of the right code, made by name: a wait that one function leaves out, an
event that it records on another stream, memory that it gives back early. A change that is never
reached is told, so that the names here follow the code.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from hpcsync.gradients.bucket import Bucket
from hpcsync.transports import base, staging
from hpcsync.transports.cuda_ipc import _OneShot
from hpcsync.transports.ipc_order import Order
from hpcsync.transports.staged_program import _Run
from tests.double.streams import DoubleEvent, DoubleStream

Hit = Callable[[], None]
Change = Callable[[Hit], contextlib.AbstractContextManager[object]]


@dataclass(frozen=True)
class Plant:
    """A bug.

    Attributes:
        scenario: name of the one that must find it.
        change: makes the bug while its context lasts; calls what it is given when it acts.
    """

    name: str
    scenario: str
    change: Change


@contextlib.contextmanager
def planted(plant: Plant) -> Iterator[list[int]]:
    """While it lasts the code has the bug; the list grows each time it acts."""
    hits: list[int] = []
    with plant.change(lambda: hits.append(1)):
        yield hits


def _caller(depth: int) -> str:
    """The name of the function ``depth`` calls up, as in ``Segment.run``."""
    return sys._getframe(depth + 1).f_code.co_qualname


def _without_wait(*callers: str) -> Change:
    """A function's streams do not wait for the events that it gives them."""

    def change(hit: Hit) -> contextlib.AbstractContextManager[object]:
        wait = DoubleStream.wait

        def changed(self: DoubleStream, event: Any) -> None:
            if _caller(1) in callers:
                hit()
            else:
                wait(self, event)

        return mock.patch.object(DoubleStream, "wait", changed)

    return change


def _elsewhere(*callers: str) -> Change:
    """A function's events are recorded on a stream that has nothing to do with it."""

    def change(hit: Hit) -> contextlib.AbstractContextManager[object]:
        record = DoubleStream.record

        def changed(self: DoubleStream, event: Any = None, *, timed: bool = False) -> Any:
            if _caller(1) not in callers:
                return record(self, event, timed=timed)
            hit()
            return record(self.device.idle, event, timed=timed)

        return mock.patch.object(DoubleStream, "record", changed)

    return change


def _ready_at_once(caller: str) -> Change:
    """A function's host does not wait for the device: events look reached."""

    def change(hit: Hit) -> contextlib.AbstractContextManager[object]:
        ready = DoubleEvent.ready

        def changed(self: DoubleEvent) -> bool:
            if _caller(1) != caller:
                return ready(self)
            hit()
            return True

        return mock.patch.object(DoubleEvent, "ready", changed)

    return change


def _before(owner: type, name: str, act: Callable[..., object]) -> Change:
    """Do something first in a method; with its arguments."""

    def change(hit: Hit) -> contextlib.AbstractContextManager[object]:
        method = getattr(owner, name)

        def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
            hit()
            act(self, *args, **kwargs)
            return method(self, *args, **kwargs)

        return mock.patch.object(owner, name, changed)

    return change


def _instead(owner: type, name: str, act: Callable[..., Any]) -> Change:
    """Do something in place of a method."""

    def change(hit: Hit) -> contextlib.AbstractContextManager[object]:
        def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
            hit()
            return act(self, *args, **kwargs)

        return mock.patch.object(owner, name, changed)

    return change


def _given_early(caller: str) -> Change:
    """A function gives memory back as if nothing worked on it any more."""

    def change(hit: Hit) -> contextlib.AbstractContextManager[object]:
        give = staging.Pool.give

        def changed(self: staging.Pool, piece: staging.Piece, event: Any = None) -> None:
            early = _caller(1) == caller
            if early:
                hit()
            give(self, piece, None if early else event)

        return mock.patch.object(staging.Pool, "give", changed)

    return change


def _word_first(order: Any, step: int) -> None:
    """Tell the others of an event that is about to be recorded."""
    signals, stream = order._signals, order.stream
    lane = signals._lane(stream)
    order._counters.enter(step, lane * 8 + signals._turns[lane])
    stream.device.late.sleep()
    signals.record(stream)


def _unentered(caller: str) -> Change:
    """A function goes on without those who have not come."""

    def change(hit: Hit) -> contextlib.AbstractContextManager[object]:
        entered = Order.entered

        def changed(self: Any, peers: Any) -> Iterator[Any]:
            if _caller(1) != caller:
                return entered(self, peers)
            hit()
            return iter(())

        return mock.patch.object(Order, "entered", changed)

    return change


def _nothing(*_: object) -> Iterator[Any]:
    return iter(())


def _at_once(_: object) -> bool:
    return True


def _first_turn(program: Any) -> None:
    program._runs = 0


def _forget(bucket: Any, priority: int) -> None:
    bucket._events = []


def _sent_twice(run: Any) -> bool:
    """Give a cell back when its message has begun, not when it has ended."""
    before = set(map(id, run._sending))
    moved = _SEND(run)
    for message in run._sending:
        if id(message) not in before:
            run._lanes.pinned.give(message.piece)
    return bool(moved)


def _copied_down(run: Any, group: Any) -> bool:
    """Add a group once its own elements are copied down, whatever earlier steps do."""
    return bool(group.after < len(run._downs))


_SEND = _Run._send


PLANTS = (
    Plant("gradients are not waited for", "ipc", _without_wait("Segment._give")),
    Plant("sums are not waited for", "ipc", _without_wait("Collective.join")),
    Plant("a run's end is recorded elsewhere", "ipc", _elsewhere("Segment._give")),
    Plant("peers' events are not waited for", "ipc", _without_wait("Signals.wait")),
    Plant("an event is recorded elsewhere", "ipc", _elsewhere("Signals.record")),
    Plant("the word comes before the event", "ipc", _instead(Order, "enter", _word_first)),
    Plant("sums are written before peers come", "ipc", _unentered("_Direct.run")),
    Plant("owners' ends are not waited for", "ipc", _instead(Order, "left", _nothing)),
    Plant("one copy, not two in turn", "ipc", _before(_OneShot, "run", _first_turn)),
    Plant("a step's peers are not waited for", "ipc by steps", _unentered("_Stepwise.run")),
    Plant("MPI sends what is not made", "device", _instead(base.Done, "ready", _at_once)),
    Plant("scratch of messages is reused early", "device by steps", _given_early("_Messages._add")),
    Plant("NCCL sends what is not made", "nccl", _elsewhere("_Messages._exchange")),
    Plant("what came by NCCL is not waited for", "nccl", _without_wait("_Messages._exchange")),
    Plant("NCCL's scratch is reused early", "nccl and staged", _without_wait("Turns.take")),
    Plant("MPI sends what is not copied down", "staged", _ready_at_once("_Run._send")),
    Plant("a copy down does not wait", "staged", _without_wait("_Run._copy_down")),
    Plant("what came is added before it is up", "staged", _without_wait("_Run._add_group")),
    Plant("a copy up does not wait", "staged", _without_wait("_Run._lift")),
    Plant("a cell is reused before it is up", "staged", _given_early("_Run._lift")),
    Plant(
        "a cell is reused before it is sent",
        "staged",
        _instead(_Run, "_send", _sent_twice),
    ),
    Plant("scratch of cells is reused early", "staged", _given_early("_Run._add_group")),
    Plant("steps are added as they come", "staged by halves", _instead(_Run, "_due", _copied_down)),
    Plant("lengths are read too early", "coded, staged", _instead(base.Done, "ready", _at_once)),
    Plant("codes are sent too early", "coded, staged", _ready_at_once("StagedMail._push")),
    Plant("codes are not waited for", "coded, staged", _without_wait("StagedMail._lift")),
    Plant("readiness is recorded elsewhere", "reducer, ipc", _elsewhere("Bucket.launch")),
    Plant("a change of stream is not noted", "reducer, ipc", _before(Bucket, "launch", _forget)),
    Plant("means are not waited for", "reducer, device", _without_wait("Collective.join")),
    Plant("rank 0's buffers are not waited for", "buffers, ipc", _without_wait("Collective.join")),
    Plant(
        "buffers are sent before they are made",
        "buffers, staged",
        _elsewhere("DeviceBuffers._exchange"),
    ),
    Plant(
        "the buffers' arena is used twice at once",
        "buffers, ipc",
        _without_wait("DeviceBuffers.broadcast"),
    ),
)
