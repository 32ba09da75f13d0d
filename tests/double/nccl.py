"""NCCL between the devices of the test double, with every liberty that NCCL has.

A group of messages is one piece of a stream's work, and waits for its peers there. What is sent is
read when that comes to it or later, when the peer does, in two parts; where it arrives anything may
stand until then. It insists on one order: ranks that start operations in different ones meet each
other's messages.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from hpcsync.transports import nccl
from hpcsync.transports.nccl_library import Message
from tests.double.device import Machine
from tests.double.memory import halves
from tests.double.streams import LIMIT_S, DoubleStream, Mark

Bytes = NDArray[np.uint8]


@dataclass
class _Sent:
    """A message that its receiver takes; ``taken`` is reached once it has."""

    data: Bytes
    taken: Mark = field(default_factory=Mark)


@dataclass
class Fabric:
    """What the communicators of a machine's devices share.

    Attributes:
        damaged: messages arrive changed.
    """

    machine: Machine
    damaged: bool = False
    _mail: dict[tuple[str, int, int], queue.SimpleQueue[_Sent]] = field(default_factory=dict)
    _names: Iterator[int] = field(default_factory=itertools.count)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def empty(self) -> bool:
        """Whether all that was sent has been received."""
        return all(box.empty() for box in self._mail.values())

    def name(self) -> str:
        return f"communicator {next(self._names)}"

    def box(self, name: str, source: int, target: int) -> queue.SimpleQueue[_Sent]:
        with self._lock:
            return self._mail.setdefault((name, source, target), queue.SimpleQueue())


class DoubleNccl:
    """NCCL of one rank, as ``nccl_library.Library`` has it.

    Args:
        problem: why no communicator can be made.
    """

    def __init__(self, fabric: Fabric, problem: str = "") -> None:
        self._fabric, self._problem = fabric, problem

    def identifier(self) -> str:
        return self._fabric.name()

    def join(self, size: int, identifier: str, rank: int) -> _Communicator:
        if self._problem:
            raise RuntimeError(self._problem)
        return _Communicator(self._fabric, identifier, rank)


class _Communicator:
    def __init__(self, fabric: Fabric, name: str, rank: int) -> None:
        self._fabric, self._name, self._rank = fabric, name, rank

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        stream = _current(self._fabric.machine)
        given = [(peer, _bytes(stream, memory)) for peer, memory in sends]
        taken = [(peer, _bytes(stream, memory)) for peer, memory in receives]
        stream.give(lambda: self._exchange(stream, given, taken))

    def _exchange(
        self,
        stream: DoubleStream,
        given: Sequence[tuple[int, Bytes]],
        taken: Sequence[tuple[int, Bytes]],
    ) -> None:
        machine, chance = self._fabric.machine, stream.chance
        for _, memory in taken:
            memory[:] = 0xEE
        sent: list[_Sent] = []
        for peer, memory in given:
            data = memory
            if chance.below(2):  # it is read at once; else when its receiver comes
                data = np.empty_like(memory)
                _copied(data, memory, stream)
            sent.append(_Sent(data))
            self._fabric.box(self._name, self._rank, peer).put(sent[-1])
        for peer, memory in taken:
            came = _next(machine, self._fabric.box(self._name, peer, self._rank))
            if came is None:
                return
            assert came.data.shape == memory.shape, "messages of another run, or step"
            _copied(memory, came.data, stream)
            if self._fabric.damaged:
                memory[0] ^= 1
            came.taken.reach()
        for each in sent:
            each.taken.wait(machine)


def _current(machine: Machine) -> DoubleStream:
    """The stream that the calling thread is ``with``; a thread serves one rank."""
    (stream,) = [device.stack[-1] for device in machine.devices if device.stack]
    return stream


def _bytes(stream: DoubleStream, memory: Any) -> Bytes:
    return stream.bare(memory)[0].view(np.uint8)


def _copied(out: Bytes, source: Bytes, stream: DoubleStream) -> None:
    for part in halves(out.shape[0], stream.chance.cut(out.shape[0])):
        out[part] = source[part]
        stream.chance.sleep()


def _next(machine: Machine, box: queue.SimpleQueue[_Sent]) -> _Sent | None:
    """The next message; None if the job has ended."""
    limit = time.monotonic() + LIMIT_S
    while True:
        with contextlib.suppress(queue.Empty):
            return box.get(timeout=0.2)
        if machine.closed or machine.error is not None:
            return None
        assert time.monotonic() < limit, "a message has not come"


@contextlib.contextmanager
def installed(
    machine: Machine, library: Callable[[Fabric], DoubleNccl] = DoubleNccl
) -> Iterator[Fabric]:
    """While it lasts transports find this module's in place of CuPy's."""
    fabric = Fabric(machine)
    with mock.patch.object(nccl, "Cupy", functools.partial(library, fabric)):
        yield fabric
