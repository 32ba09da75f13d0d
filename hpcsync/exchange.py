"""Bytes a step: by which algorithms, over which links, and what receives them; pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from . import schedules
from .collectives import choice
from .config import CommConfig
from .device import dtype_of
from .gradients.plan import BucketPlan
from .schedules.base import Action, Kind, Schedule
from .schedules.hierarchical import compose
from .topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes that are sent in a step: by the busiest rank of a node, and over the node's link."""

    rank_near: float
    rank_far: float
    node_far: float


class Way(NamedTuple):
    """How gradients go.

    Attributes:
        algorithm: over all ranks.
        rail: along the rails; empty where there are none.
        ratio: bytes on the coded level, over those of float32; 1 where nothing is coded.
    """

    algorithm: str
    rail: str = ""
    ratio: float = 1.0


def exchanges(
    comm: CommConfig,
    topology: Topology,
    plans: Sequence[BucketPlan],
    ratios: Sequence[float] = (),
    where: str = "rail",
) -> Counter[Way]:
    """Bytes of gradients, by the way they go.

    Args:
        ratios: for each bucket, bytes of its coded part when coded, over those in float32.
        where: of the coding.
    """
    found: Counter[Way] = Counter()
    for index, plan in enumerate(plans):
        dtype = dtype_of(plan.dtype)
        if plan.coded_numel and choice.codes(where, topology):
            ratio = 4 / dtype.itemsize * ratios[index]
            way = (
                Way("direct", "", ratio) if where == "all" else Way("hierarchical", "direct", ratio)
            )
            found[way] += plan.coded_numel * dtype.itemsize
            plan = replace(plan, numel=plan.numel - plan.coded_numel)
        align = max(1, 64 // dtype.itemsize)
        name = choice.resolve(comm, topology, dtype)
        pieces = 1 if name == "native" else choice.segments(comm, topology, plan.nbytes)
        for start, stop in pairwise(schedules.chunk_bounds(plan.numel, pieces, align)):
            rail = ""
            if name == "hierarchical":
                shard = schedules.chunk_bounds(stop - start, topology.rails, align)[1]
                nbytes = shard * dtype.itemsize
                rail = choice.rail_algorithm(comm, topology.node_count, nbytes, dtype)
            found[Way(name, rail)] += (stop - start) * dtype.itemsize
    return found


def traffic(topology: Topology, parts: Mapping[Way, float]) -> Traffic:
    """Bytes a step, from the schedules of the first node's ranks; ``parts`` as of ``exchanges``."""
    ranks = topology.nodes[0]
    near, far = [0.0] * len(ranks), [0.0] * len(ranks)
    for way, nbytes in parts.items():
        for place, rank in enumerate(ranks):
            inside, outside = _sent(topology, rank, way, nbytes)
            near[place] += inside
            far[place] += outside
    return Traffic(rank_near=max(near), rank_far=max(far), node_far=sum(far))


def scratch(
    comm: CommConfig, topology: Topology, parts: Mapping[Way, float], *, device: bool = False
) -> float:
    """Bytes in which a rank receives what it adds: of messages only, since a node's ranks read
    each other's memory.

    Args:
        device: in the memory of a device, which one exchange hands on to the next: no more than
            those on the way at once need, in pieces that are up to twice as large.
    """
    messages = comm.node_transport in ("mpi_host", "mpi_device", "mpi_staged")
    total = share = 0.0
    for way, nbytes in parts.items():
        part = _incoming(topology, way, messages)
        total, share = total + nbytes * part, max(share, part)
    return min(total, 2 * share * comm.credit_mb * (1 << 20)) if device else total


def _incoming(topology: Topology, way: Way, messages: bool) -> float:
    """The share of the bytes that a rank holds in memory for messages.

    Args:
        messages: whether ranks of a node send each other some.
    """
    rank = topology.nodes[0][0]
    if way.algorithm != "hierarchical":
        if not messages and topology.node_count == 1:
            return 0.0
        return _received(schedules.build(way.algorithm, Kind.ALLREDUCE, rank, topology.size))
    native = way.rail == "native"
    share = 0.0
    for level in compose(topology.nodes, rank, rail="direct" if native else way.rail):
        if level.name == "node":
            share += _received(level.schedule) if messages else 0.0
        elif not native:  # whose memory is MPI's own
            share += _received(level.schedule) / topology.rails
    return share


def _received(schedule: Schedule) -> float:
    """The largest share of the buffer that comes in one step to be added."""
    return max(
        (
            sum(move.hi - move.lo for move in step.recvs) / schedule.chunks
            for step in schedule.steps
            if step.action is Action.REDUCE
        ),
        default=0.0,
    )


def _sent(topology: Topology, rank: int, way: Way, nbytes: float) -> tuple[float, float]:
    """Bytes that a rank sends within its node, and to other nodes."""
    if way.algorithm != "hierarchical":
        every = tuple(range(topology.size))
        schedule = schedules.build(way.algorithm, Kind.ALLREDUCE, rank, topology.size)
        return _moved(topology, rank, every, schedule, nbytes * way.ratio)
    near = far = 0.0
    native = way.rail == "native"
    for level in compose(topology.nodes, rank, rail="ring" if native else way.rail):
        size = nbytes if level.name == "node" else nbytes * way.ratio / topology.rails
        inside, outside = _moved(topology, rank, level.group, level.schedule, size)
        near, far = near + inside, far + outside
    return near, far


def _moved(
    topology: Topology, rank: int, group: Sequence[int], schedule: Schedule, nbytes: float
) -> tuple[float, float]:
    if schedule.name == "native":  # MPI does not tell; what a ring would send
        moved = 2 * nbytes * (len(group) - 1) / len(group)
        return (0.0, moved) if topology.node_count > 1 else (moved, 0.0)
    near = far = 0.0
    for step in schedule.steps:
        for move in step.sends:
            part = nbytes * (move.hi - move.lo) / schedule.chunks
            if topology.node_of(group[move.peer]) == topology.node_of(rank):
                near += part
            else:
                far += part
    return near, far
