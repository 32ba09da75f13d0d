"""What a rank's clock differs by from rank 0's.

    rank 0 <-> the first rank of each node <-> the other ranks of the node

A rank sends a message and gets back the other's time. The answer was written at some moment between
sending and receiving, and taken for the middle it is wrong by half the round trip at most; of
several round trips the shortest counts (Cristian, Probabilistic clock synchronization, Distributed
Computing 3, 1989). Offsets and uncertainties add up along the way.

Clocks drift by some 10 us a second and more: the comparison is repeated, and readers interpolate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..runtime import Runtime
from .events import CLOCK
from .recorder import now

ROUND_TRIPS = 12
_TURN, _PING, _PONG = 701, 702, 703


class Clocks:
    """Compares the clocks of all ranks; making one and ``compare`` are collective.

    Args:
        runtime: the job.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._comm = runtime.comm.Dup()
        nodes = runtime.topology.nodes
        self._node: Sequence[int] = runtime.topology.node(runtime.rank)
        self._leaders = [ranks[0] for ranks in nodes]
        self._message = np.zeros(1, np.int64)
        self._passed = 0, 0  # of the rank that we ask: its own offset and uncertainty

    def compare(self) -> NDArray[np.void]:
        """One row of dtype ``events.CLOCK``: this rank's clock against rank 0's."""
        rank, leader = self._runtime.rank, self._node[0]
        offset = uncertainty = 0
        if rank == 0:
            for other in self._leaders[1:]:
                self._serve(other)
        elif rank == leader:
            offset, uncertainty = self._ask(0)
        if rank == leader:
            # The others of the node get our own offset with the turn.
            for other in self._node[1:]:
                self._serve(other, offset, uncertainty)
        else:
            own, own_uncertainty = self._ask(leader)
            offset, uncertainty = self._passed[0] + own, self._passed[1] + own_uncertainty
        return np.array([(now(), offset, uncertainty)], CLOCK)

    def close(self) -> None:
        """Free the communicator; collective."""
        self._comm.Free()

    def _serve(self, other: int, offset: int = 0, uncertainty: int = 0) -> None:
        self._comm.Send(np.array([offset, uncertainty], np.int64), other, _TURN)
        for trip in range(ROUND_TRIPS):
            if trip == 0:  # it may be late
                self._runtime.wait(self._comm.Irecv(self._message, other, _PING))
            else:
                self._comm.Recv(self._message, other, _PING)
            self._message[0] = now()
            self._comm.Send(self._message, other, _PONG)

    def _ask(self, other: int) -> tuple[int, int]:
        """(what to add to our times, by how much that may be wrong) in ns."""
        passed = np.zeros(2, np.int64)
        # It may have many others to serve first.
        self._runtime.wait(self._comm.Irecv(passed, other, _TURN))
        self._passed = int(passed[0]), int(passed[1])
        best, offset = 1 << 62, 0
        for _ in range(ROUND_TRIPS):
            began = now()
            self._comm.Send(self._message, other, _PING)
            self._comm.Recv(self._message, other, _PONG)
            ended = now()
            if ended - began < best:
                best, offset = ended - began, int(self._message[0]) - (began + ended) // 2
        return offset, best // 2 + 1
