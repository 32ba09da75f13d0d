"""Messages between two ranks, timed and checked.

Both send at once, in chunks, and each notes when chunks have arrived. A rate counts from the first
quarter on: what an idle link lets pass faster than it can go on, and the start of the connection,
are over by then. After the clock is stopped every byte is compared with what must have come.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CollectiveTimeout

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm, Request

_GREET, _LOAD, _TOOK, _PING, _STOP = 721, 722, 723, 724, 725
_ASK_S = 0.1  # of silence, after which a rank looks whether the other one has given up
_CHUNKS = 32  # of a transfer
_AHEAD = 4  # chunks that are being sent; more would let one direction starve the other
_FIRST, _GROWTH = 1 << 18, 8  # bytes
_LONG_ENOUGH_S = 0.2
_FEWEST, _MOST = 2, 6  # transfers that count
_NEAR = 1.03  # the two best of several, when that is enough
_SLOW_S = 2.0  # where one takes so long, it alone counts
_PINGS = 30
_WORD = 8

Words = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Fault:
    """A transfer that did not arrive as it was sent, or not at all.

    Attributes:
        words: how many 8-byte words differ.
        first: byte offset of the first of them.
        nbytes: of the transfer.
        stalled_s: nothing came for so many seconds; 0 if it came.
        late: the sender itself stood still, not the link.
    """

    sender: int
    receiver: int
    words: int
    first: int
    nbytes: int
    stalled_s: float = 0.0
    late: bool = False


class Stalled(CollectiveTimeout):
    """The exchange with another rank came to nothing.

    Attributes:
        fault: as it is told.
    """

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        super().__init__(
            f"preflight: nothing has come from rank {fault.sender} to rank {fault.receiver} for "
            f"{fault.stalled_s:.0f} s: its node or the link to it stands still"
        )


@dataclass(frozen=True, slots=True)
class Between:
    """What was found between two ranks.

    Attributes:
        rate: bytes a second each way, while both send.
        latency_s: of a small message.
        faults: transfers to this rank that were wrong.
        transfers: how many there were to this rank.
    """

    rate: float
    latency_s: float
    faults: tuple[Fault, ...]
    transfers: int


class Wire:
    """Exchanges with one other rank at a time.

    Args:
        comm: of all who may exchange, with nothing else on it.
        largest: bytes of the largest transfer.
        timeout_s: without anything arriving, after which the exchange is given up. What was begun
            may still come: keep this object, and use another one from then on.
    """

    def __init__(self, comm: Intracomm, largest: int, timeout_s: float) -> None:
        self._comm, self._timeout_s = comm, timeout_s
        self._rank = comm.Get_rank()
        self._largest = largest
        self._serial = 0
        self._begun: list[Request] = []  # holds their memory
        self._base = np.random.default_rng(721).integers(
            0, 1 << 63, largest // _WORD, dtype=np.uint64
        )
        self._out, self._into = np.empty_like(self._base), np.empty_like(self._base)

    def measure(self, other: int) -> Between:
        """Rate, latency and errors; both ranks call it, each with the other.

        Raises:
            Stalled: the other rank does not answer, or has given up.
        """
        self._begun.clear()
        self._greet(other)
        latency_s = self._ping(other)
        faults: list[Fault] = []
        count = 0

        def transfer(nbytes: int) -> tuple[float, float]:
            nonlocal count
            count += 1
            taken, rate, fault = self._transfer(other, nbytes)
            faults.extend(fault)
            return taken, rate

        nbytes = min(_FIRST, self._largest)
        taken, rate = transfer(nbytes)
        while taken < _LONG_ENOUGH_S and nbytes < self._largest:
            factor = min(_GROWTH, 1.25 * _LONG_ENOUGH_S / taken)
            nbytes = min(max(_rounded(nbytes * factor), 2 * nbytes), self._largest)
            taken, rate = transfer(nbytes)
        if taken < _SLOW_S:
            rates = [rate]
            while wants_more(rates):
                rates.append(transfer(nbytes)[1])
            rate = max(rates)
        return Between(rate, latency_s, tuple(faults), count)

    def _greet(self, other: int) -> None:
        """Wait until the other one is there, too."""
        token, mine = np.zeros(1, np.uint8), np.zeros(1, np.uint8)
        arrived = self._receive(token, other, _GREET)
        sent = self._send(mine, other, _GREET)
        self._until(lambda: arrived.Test() and sent.Test(), other)

    def _ping(self, other: int) -> float:
        """Half of a round trip; the same on both."""
        token = np.zeros(1, np.uint8)
        trips = []
        for _ in range(_PINGS + 1):
            began = time.perf_counter()
            if self._rank < other:
                self._until(self._send(token, other, _PING).Test, other)
                self._until(self._receive(token, other, _PING).Test, other)
            else:
                self._until(self._receive(token, other, _PING).Test, other)
                self._until(self._send(token, other, _PING).Test, other)
            trips.append((time.perf_counter() - began) / 2)
        return self._agreed([median(trips[1:])], other)[0]

    def _transfer(self, other: int, nbytes: int) -> tuple[float, float, list[Fault]]:
        """Seconds and rate as of the slower direction, and what was wrong here."""
        words = nbytes // _WORD
        self._serial += 1
        out, into, base = self._out[:words], self._into[:words], self._base[:words]
        np.bitwise_xor(base, _key(self._rank, self._serial), out=out)
        into.fill(0)
        serial = int(self._theirs([self._serial], other)[0])
        arrivals = self._stream(other, out, into)
        quarter = len(arrivals) // 4
        moved = nbytes * (len(arrivals) - quarter) / len(arrivals)
        spent = max(arrivals[-1] - arrivals[quarter - 1], 1e-9)
        # Where this rank got no core for a while, chunks that had waited come all at once.
        pace = max(spent / moved, arrivals[-1] / nbytes)
        taken, pace = self._agreed([arrivals[-1], pace], other)
        # What was sent has gone; its memory takes what should have come.
        np.bitwise_xor(base, _key(other, serial), out=out)
        differ = np.flatnonzero(out != into)
        if not differ.size:
            return taken, 1 / pace, []
        first = int(differ[0]) * _WORD
        return taken, 1 / pace, [Fault(other, self._rank, int(differ.size), first, nbytes)]

    def _stream(self, other: int, out: Words, into: Words) -> list[float]:
        """Send and receive chunks; seconds from the beginning until each had arrived."""
        size = out.size // _CHUNKS
        cuts = [slice(at * size, (at + 1) * size) for at in range(_CHUNKS)]
        receives = deque(self._receive(into[cut], other, _LOAD) for cut in cuts)
        self._greet(other)
        sends: deque[Request] = deque()
        unsent = deque(cuts)
        arrivals: list[float] = []
        began = last = time.perf_counter()
        while receives or sends or unsent:
            while unsent and len(sends) < _AHEAD:
                sends.append(self._send(out[unsent.popleft()], other, _LOAD))
            moved = False
            while receives and receives[0].Test():
                receives.popleft()
                arrivals.append(time.perf_counter() - began)
                moved = True
            while sends and sends[0].Test():
                sends.popleft()
                moved = True
            last = self._pause(last, moved, other)
        return arrivals

    def _agreed(self, mine: list[float], other: int) -> list[float]:
        """The larger of both ranks' numbers."""
        return [max(pair) for pair in zip(mine, self._theirs(mine, other), strict=True)]

    def _theirs(self, mine: list[float], other: int) -> list[float]:
        """The other rank's numbers, against mine."""
        own, theirs = np.array(mine, np.float64), np.empty(len(mine))
        arrived = self._receive(theirs, other, _TOOK)
        sent = self._send(own, other, _TOOK)
        self._until(lambda: arrived.Test() and sent.Test(), other)
        return [float(value) for value in theirs]

    def _until(self, true: Callable[[], bool], other: int) -> None:
        last = time.perf_counter()
        while not true():
            last = self._pause(last, False, other)

    def _pause(self, last: float, moved: bool, other: int) -> float:
        """Let others run; the time at which something moved last."""
        now = time.perf_counter()
        if moved:
            return now
        silent = now - last
        if silent > self._timeout_s:
            self._send(np.zeros(1, np.uint8), other, _STOP)
            raise Stalled(Fault(other, self._rank, 0, 0, 0, silent))
        if silent > _ASK_S and self._comm.Iprobe(other, _STOP):
            # On a link that stands still both wait alike. Who has not waited was not there.
            late = silent < self._timeout_s / 2
            raise Stalled(Fault(self._rank, other, 0, 0, 0, self._timeout_s, late))
        os.sched_yield()
        return last

    def _send(self, data: NDArray[Any], other: int, tag: int) -> Request:
        self._begun.append(self._comm.Isend(data, other, tag))
        return self._begun[-1]

    def _receive(self, into: NDArray[Any], other: int, tag: int) -> Request:
        self._begun.append(self._comm.Irecv(into, other, tag))
        return self._begun[-1]


def wants_more(rates: Sequence[float]) -> bool:
    """Whether the best rate so far may be short of what can be had: other programs take time from
    a measurement, none gives any. The same on all ranks that know the same rates."""
    if not _FEWEST <= len(rates) < _MOST:
        return len(rates) < _FEWEST
    best, second, *_ = sorted(rates, reverse=True)
    return best > _NEAR * second


def _rounded(nbytes: float) -> int:
    """To whole words in whole chunks."""
    step = _WORD * _CHUNKS
    return max(int(nbytes) // step, 1) * step


def _key(sender: int, serial: int) -> np.uint64:
    """What the words of one transfer differ by from those of all others (splitmix64)."""
    mask = (1 << 64) - 1
    value = (((sender + 1) << 32) + serial) * 0x9E3779B97F4A7C15 & mask
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & mask
    return np.uint64(value ^ (value >> 27))
