"""How fast the nodes' links are, so that a slow one can be told by its node.

The first ranks of the nodes exchange messages in pairs, each with several partners in turn:

    turn 0   0 alone, 1 <-> 2        of three nodes; a node's rate is the best of its pairs, so a
    turn 1   0 <-> 1, 2 alone        slow one makes no other look slow, and neither does a moment
    turn 2   0 <-> 2, 1 alone        in which a rank did not get a core

Of two nodes the rate is that of the one link between them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..runtime import Runtime
from .recorder import now

# A link that was idle may let some hundred KiB pass faster than it goes on.
_FIRST, _LARGEST, _GROWTH = 1 << 21, 1 << 23, 4  # bytes
_SHORT_S = 1e-3  # an exchange that is shorter tells too little
_TIMES, _SLOW_S = 2, 0.2  # exchanges that count; where one takes so long, it alone does
_TURNS = 4
_GREET, _TOOK, _LOAD = 711, 712, 713

Bytes = NDArray[np.uint8]


def partner(node: int, nodes: int, turn: int) -> int | None:
    """With whom a node exchanges; None if with nobody. Pairs differ from turn to turn."""
    # Of an even number, odd sums leave nobody out.
    other = ((turn if nodes % 2 else 2 * turn + 1) - node) % nodes
    return None if other == node else other


def turns(nodes: int) -> int:
    """How many turns there are."""
    return min(_TURNS, nodes if nodes % 2 else nodes // 2)


class Links:
    """Measures the links of all nodes; making one and ``measure`` are collective.

    Args:
        runtime: the job.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._comm = runtime.comm.Dup()
        topology = runtime.topology
        self._leaders = [ranks[0] for ranks in topology.nodes]
        self._node = topology.node_of(runtime.rank)
        self._leads = len(self._leaders) > 1 and runtime.rank == self._leaders[self._node]

    def measure(self) -> float:
        """Bytes a second each way on this rank's node; 0 on ranks that do not measure."""
        if not self._leads:
            return 0.0
        nodes, best = len(self._leaders), 0.0
        out, into = np.ones(_LARGEST, np.uint8), np.ones(_LARGEST, np.uint8)
        for turn in range(turns(nodes)):
            other = partner(self._node, nodes, turn)
            if other is not None:
                best = max(best, self._rate(self._leaders[other], out, into))
        return best

    def close(self) -> None:
        """Free the communicator; collective."""
        self._comm.Free()

    def _rate(self, other: int, out: Bytes, into: Bytes) -> float:
        self._greet(other)
        nbytes = _FIRST
        while (taken := self._exchange(other, out[:nbytes], into[:nbytes])) < _SHORT_S:
            if nbytes == _LARGEST:
                break
            nbytes *= _GROWTH
        if taken > _SLOW_S:
            return nbytes / taken
        rest = [self._exchange(other, out[:nbytes], into[:nbytes]) for _ in range(_TIMES)]
        return nbytes / min(rest)

    def _greet(self, other: int) -> None:
        """Wait for the other one, which may have partners before us."""
        token = np.zeros(1, np.uint8)
        sent = self._comm.Isend(np.zeros(1, np.uint8), other, _GREET)
        self._runtime.wait(self._comm.Irecv(token, other, _GREET))
        self._runtime.wait(sent)

    def _exchange(self, other: int, out: Bytes, into: Bytes) -> float:
        """Seconds, the same on both: they must agree on what comes next."""
        began = now()
        self._comm.Sendrecv(out, other, _LOAD, into, other, _LOAD)
        mine = np.array([max(now() - began, 1) / 1e9])
        theirs = np.empty(1)
        self._comm.Sendrecv(mine, other, _TOOK, theirs, other, _TOOK)
        return float(max(mine[0], theirs[0]))
