"""Messages of MPI: asking for all in flight at once, and cutting long ones."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..device.base import Array
from .base import Wait

if TYPE_CHECKING:
    from mpi4py.MPI import Comm, Datatype, Request

PIECE_BYTES = 1 << 30  # classic MPI counts have 31 bits
_POLL_S = 20e-6  # within one round of the progress thread MPI is asked once


def pieces(values: Array, width: int, byte: Datatype) -> Iterator[list[Any]]:
    """The bytes of an array as MPI takes them, cut so that each piece's count fits."""
    memory = values.view(np.uint8)
    for start in range(0, memory.shape[0], width):
        yield [memory[start : start + width], byte]


def most_tags(comm: Comm, attribute: int) -> int:
    """Tags that messages may have, from 0 on; ``attribute`` is ``MPI.TAG_UB``."""
    bound = comm.Get_attr(attribute)
    return int(bound) if bound else 32767


class Completions:
    """Asks MPI for all messages in flight at once.

    Each call into MPI looks at every connection, whatever it asks for: one call for everything
    costs a fraction of one for each collective. Only the progress thread uses it.
    """

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._waits: list[Watcher] = []
        self._asked_s = 0.0

    def watch(self, requests: Sequence[Request], wait: Watcher) -> None:
        """Count each of the requests that completes off ``wait.missing``."""
        self._requests.extend(requests)
        self._waits.extend([wait] * len(requests))
        self._asked_s = 0.0

    def poll(self) -> None:
        """Ask, unless that was done a moment ago."""
        now = time.perf_counter()
        if not self._requests or now - self._asked_s < _POLL_S:
            return
        self._asked_s = now
        done = self._requests[0].Testsome(self._requests)
        if not done:
            return
        for index in done:
            self._waits[index].missing -= 1
        over = set(done)
        kept = [index for index in range(len(self._waits)) if index not in over]
        self._requests = [self._requests[index] for index in kept]
        self._waits = [self._waits[index] for index in kept]
        self._asked_s = 0.0


class Watcher(Protocol):
    """Counts messages that are not complete."""

    missing: int


class Watched(Protocol):
    """Whose messages are waited for."""

    completions: Completions

    def describe(self, step: int, requests: Sequence[Request]) -> str: ...


class Arrived(Wait):
    """Until all of a step's messages are complete."""

    __slots__ = ("_completions", "_program", "_requests", "_step", "missing")

    def __init__(self, requests: list[Request], step: int, program: Watched) -> None:
        self.missing = len(requests)
        self._requests = requests
        self._step = step
        self._program = program
        self._completions = program.completions
        self._completions.watch(requests, self)

    def ready(self) -> bool:
        if self.missing:
            self._completions.poll()
        return not self.missing

    def describe(self) -> str:
        return self._program.describe(self._step, self._requests)
