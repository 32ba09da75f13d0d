"""What a link costs: latency and bandwidth as each rank sees them while all ranks use it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median
from typing import Protocol

import numpy as np

from ..device.base import Array
from ..launch import Runtime
from ..transports.base import Mail, Parcel, Transport, Wait
from .costs import LinkCost
from .jobs import Job, Place
from .progress import Progress

_TAG = 0  # which no collective has
_MESSAGE = 1 << 19  # bytes, as a segment's share has
_SMALLEST, _LARGEST, _GROWTH = 1 << 16, 1 << 24, 4  # bytes
_LONG_ENOUGH_S = 0.05  # for an exchange to tell the bandwidth, past what the link's queues hold
_PINGS = 12


class Check(Protocol):
    """Who fills messages, and looks at what has come; outside of what is timed."""

    def fill(self, sent: Array) -> None: ...

    def look(self, came: Array, sender: int) -> None:
        """``sender`` is a rank of the job."""


def probe_link(
    runtime: Runtime, progress: Progress, transport: Transport, check: Check | None = None
) -> LinkCost:
    """Latency and bandwidth of messages to the next rank while all ranks send and receive.

    They are driven by the thread that drives all exchanges, since how long it sleeps counts, too.
    Collective over the job; a rank alone in its group only takes part in the agreement.
    """
    line = _Line(progress, transport, check)

    def exchange(nbytes: int) -> tuple[float, float]:
        if check is not None:  # looking takes time, more on one rank than on another
            runtime.barrier()
        return line.exchange(nbytes)

    runtime.barrier()
    exchange(1)
    pings, cpu = zip(*(exchange(1) for _ in range(_PINGS)), strict=True)
    latency_s, message_cpu_s = runtime.allreduce_scalar([median(pings), sum(cpu) / _PINGS], "max")
    nbytes = _SMALLEST
    while True:
        # The first of two may have begun unevenly, or have used up what the link lets pass at once.
        taken = [] if nbytes * _GROWTH <= _LARGEST else [exchange(nbytes)[0]]
        last_s, cpu_s = exchange(nbytes)
        wire_s, cpu_s = runtime.allreduce_scalar([min([*taken, last_s]), cpu_s], "max")
        if wire_s > _LONG_ENOUGH_S or nbytes * _GROWTH > _LARGEST:
            break
        nbytes *= _GROWTH
    line.close()
    return LinkCost(
        latency_s=latency_s,
        wire_s=max(wire_s - latency_s, 0.0) / nbytes,
        cpu_s=cpu_s / nbytes,
        message_cpu_s=message_cpu_s,
    )


class _Line:
    """Messages to the next rank of a group and from the one before.

    Each is a job of its own, as in exchanges of gradients. Were all sends posted at once, links
    would carry one direction after the other.
    """

    def __init__(self, progress: Progress, transport: Transport, check: Check | None) -> None:
        self._progress, self._check = progress, check
        self._mails: list[Mail] = []
        if transport.size < 2:
            return
        after, before = transport.rank + 1, transport.rank - 1
        self._sender = transport.ranks[before % transport.size]
        self._sent, self._came = np.ones(_LARGEST, np.uint8), np.ones(_LARGEST, np.uint8)
        if check is not None:
            check.fill(self._sent)
        for at in range(0, _LARGEST, _MESSAGE):
            cut = slice(at, at + _MESSAGE)
            out = Parcel(after % transport.size, self._sent[cut])
            into = Parcel(before % transport.size, self._came[cut])
            self._mails.append(transport.mail([out], [into], _TAG))

    def exchange(self, nbytes: int) -> tuple[float, float]:
        """Seconds, and processor time, to send and to receive so many bytes."""
        if not self._mails:
            return 0.0, 0.0
        used = self._mails[: -(-nbytes // _MESSAGE)]
        jobs = [_Message(mail, min(nbytes, _MESSAGE)) for mail in used]
        if self._check is not None:
            self._came[:nbytes] = 0
        began, cpu = time.perf_counter(), time.process_time()
        self._progress.submit(list(jobs))
        self._progress.wait_until(lambda: all(job.done for job in jobs))
        taken = time.perf_counter() - began, time.process_time() - cpu
        if self._check is not None:
            self._check.look(self._came[:nbytes], self._sender)
        return taken

    def close(self) -> None:
        for mail in self._mails:
            mail.close()


class _Message(Job):
    """One message each way."""

    def __init__(self, mail: Mail, nbytes: int) -> None:
        self.priority, self.nbytes, self.done = 0, nbytes, False
        self._mail = mail

    def run(self) -> Iterator[Wait]:
        arrived = self._mail.expect([0])
        sent = self._mail.send(0, self.nbytes)
        yield arrived
        yield sent

    def finished(self) -> None:
        self.done = True

    def describe(self) -> str:
        return "the probe of the link"

    def place(self) -> Place:
        return Place("the probe of the link", 0, 0, "")
