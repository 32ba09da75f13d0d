"""What ranks compute and what goes between them, measured over the job; every call is collective.

All ranks end with the same numbers. Phases that measure nodes in turns stop when the time that was
given is over; what was left out is told.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..collectives import Collectives
from ..collectives.costs import LinkCost
from ..collectives.link_probe import probe_link
from ..config import CommConfig
from ..device.base import Array
from ..runtime import Runtime
from . import turns
from .compute import Bench, Rates, device_of
from .wire import Between, Fault, Stalled, Wire, wants_more

_IN_NODE, _BETWEEN_NODES = 16 << 20, 64 << 20  # bytes of the largest transfer
_SILENT = 0.5  # of the job's limit: time for a rank to come back before the others give it up
_PATTERN = 251  # a prime, so that a message that went elsewhere does not look right


@dataclass(frozen=True, slots=True)
class PairFound:
    """What two ranks found together; ``low`` is the lower rank."""

    low: int
    high: int
    rate: float
    latency_s: float


@dataclass(slots=True)
class Level:
    """What was found in nodes, or between them.

    Attributes:
        pairs: of ranks that exchanged one by one.
        together: all ranks of the level at once; None if nothing was exchanged.
        faults: transfers that were wrong, or came to nothing.
        transfers: how many were compared.
        left_out: waves of pairs for which there was no time.
    """

    pairs: list[PairFound] = field(default_factory=list)
    together: LinkCost | None = None
    faults: list[Fault] = field(default_factory=list)
    transfers: int = 0
    left_out: int = 0

    @property
    def tried(self) -> bool:
        """Whether there is anything to tell."""
        return bool(self.pairs or self.faults)

    def look_again(self, other: Level) -> None:
        """Take what was better in a second measurement, and what was wrong in either."""
        before = {(pair.low, pair.high): pair for pair in self.pairs}
        for pair in other.pairs:
            then = before.get((pair.low, pair.high), pair)
            before[pair.low, pair.high] = PairFound(
                pair.low,
                pair.high,
                max(pair.rate, then.rate),
                min(pair.latency_s, then.latency_s),
            )
        self.pairs = list(before.values())
        both = [each for each in (self.together, other.together) if each is not None]
        self.together = min(both, key=lambda cost: cost.wire_s, default=None)
        self.faults += other.faults
        self.transfers += other.transfers


class Budget:
    """Seconds that may be spent; rank 0's clock counts."""

    def __init__(self, runtime: Runtime, seconds: float) -> None:
        self._runtime = runtime
        self._until = time.monotonic() + seconds

    def spent(self) -> bool:
        return bool(self._runtime.bcast(time.monotonic() > self._until))


class Survey:
    """Measures a job.

    Args:
        machines: what tells each node's machine from others, by node.
    """

    def __init__(self, runtime: Runtime, machines: Sequence[str], budget: Budget) -> None:
        self._runtime, self._machines, self._budget = runtime, list(machines), budget
        self._comm = runtime.comm.Dup()
        self._node_comm = runtime.group(runtime.topology.node(runtime.rank))
        self._node = runtime.topology.node_of(runtime.rank)
        self._stalled: set[turns.Pair] = set()  # the same on all ranks
        self._given_up: list[Wire] = []

    def close(self) -> None:
        """Free the communicators."""
        if not self._stalled:  # else messages are on their way in it
            self._comm.Free()
        self._node_comm.Free()

    def compute(self) -> list[Rates]:
        """Of every rank; the ranks of a node at once."""
        runtime = self._runtime
        shift = turns.shifts(self._machines)
        bench = Bench(device_of(runtime.local_rank))
        mine: Rates | None = None
        for turn in range(max(shift) + 1):
            runtime.barrier()
            if turn == shift[self._node]:
                runtime.wait(self._node_comm.Ibarrier())
                mine = bench.measure(agree=self._anybody)
        found: list[Rates] = runtime.allgather_object(mine)
        return found

    def _anybody(self, wants: bool) -> bool:
        """Whether a rank of this node wants something."""
        wanted = np.array([wants], np.int64)
        total = np.empty_like(wanted)
        self._runtime.wait(self._node_comm.Iallreduce(wanted, total))
        return bool(total[0])

    def in_nodes(self) -> Level:
        """Ranks of a node, in pairs and together."""
        waves = turns.in_nodes(self._runtime.topology, self._machines)
        return self._level(waves, _IN_NODE, "node") if waves else Level()

    def between_nodes(self) -> Level:
        """The nodes' first ranks in pairs, and all rails together."""
        waves = turns.between_nodes(self._runtime.topology, self._machines)
        return self._level(waves, _BETWEEN_NODES, "rail") if waves else Level()

    def _level(self, waves: Sequence[Sequence[turns.Pair]], largest: int, name: str) -> Level:
        level = Level()
        self._in_pairs(level, waves, largest)
        if not self._stalled and not self._budget.spent():
            level.together = self._together(level, name)
        return level

    def _in_pairs(self, level: Level, waves: Sequence[Sequence[turns.Pair]], largest: int) -> None:
        runtime = self._runtime
        waiting = {rank for wave in waves for pair in wave for rank in pair}
        wire = self._wire(largest) if runtime.rank in waiting else None
        mine: list[tuple[int, Between | Fault]] = []
        for at, wave in enumerate(waves):
            # Everybody has a turn before the time counts.
            if not waiting and self._budget.spent():
                level.left_out = len(waves) - at
                break
            waiting -= {rank for pair in wave for rank in pair}
            runtime.barrier()
            for low, high in wave:
                if wire is None or runtime.rank not in (low, high) or (low, high) in self._stalled:
                    continue
                other = high if runtime.rank == low else low
                try:
                    mine.append((other, wire.measure(other)))
                except Stalled as stall:
                    self._tell(stall)
                    mine.append((other, stall.fault))
                    # What is still on its way ends in the old one's memory.
                    self._given_up.append(wire)
                    wire = self._wire(largest)
        for rank, told in enumerate(runtime.allgather_object(mine)):
            for other, found in told:
                self._take(level, rank, other, found)

    def _wire(self, largest: int) -> Wire:
        return Wire(self._comm, largest, self._runtime.timeout_s * _SILENT)

    def _take(self, level: Level, rank: int, other: int, found: Between | Fault) -> None:
        """What ``rank`` found with another one."""
        if isinstance(found, Fault):
            level.faults.append(found)
            self._stalled.add((min(rank, other), max(rank, other)))
            return
        level.faults += found.faults
        level.transfers += found.transfers
        if rank < other:
            level.pairs.append(PairFound(rank, other, found.rate, found.latency_s))

    def _tell(self, stall: Stalled) -> None:
        """At once: if the other rank never comes back, nothing else names it."""
        topology, fault = self._runtime.topology, stall.fault
        where = ", ".join(
            f"rank {rank} is on {topology.names[topology.node_of(rank)]}"
            for rank in (fault.sender, fault.receiver)
        )
        print(f"hpcsync: {stall} ({where})", file=sys.stderr, flush=True)

    def _together(self, level: Level, name: str) -> LinkCost:
        """The best look, by time of a byte, once another one is near it."""
        runtime = self._runtime
        # Messages of MPI in the node as well: they are what is compared.
        collectives = Collectives(runtime, CommConfig(node_transport="mpi_host"))
        transport = collectives.node if name == "node" else collectives.rail
        costs: list[LinkCost] = []
        while wants_more([1 / max(cost.wire_s, 1e-15) for cost in costs]):
            check = _Filled(runtime.rank)
            costs.append(probe_link(runtime, collectives.progress, transport, check))
            for faults, looks in runtime.allgather_object((check.faults, check.looks)):
                level.faults += faults
                level.transfers += looks
        latency_s = sorted(cost.latency_s for cost in costs)[len(costs) // 2]
        return replace(min(costs, key=lambda cost: cost.wire_s), latency_s=latency_s)


class _Filled:
    """Fills messages with a pattern of the sender's own, and looks whether that came."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self.faults: list[Fault] = []
        self.looks = 0

    def fill(self, sent: Array) -> None:
        sent[:] = _pattern(sent.size, self._rank)

    def look(self, came: Array, sender: int) -> None:
        self.looks += 1
        differ = np.flatnonzero(came != _pattern(came.size, sender))
        if differ.size:
            words = len(np.unique(differ // 8))
            fault = Fault(sender, self._rank, words, int(differ[0]), came.size)
            self.faults.append(fault)


def _pattern(nbytes: int, rank: int) -> Array:
    """Bytes from 1 on, since messages are cleared before they come."""
    return np.resize(np.roll(np.arange(1, _PATTERN + 1, dtype=np.uint8), rank * 97), nbytes)
