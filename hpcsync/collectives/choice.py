"""Which algorithm serves, and in how many pieces: pure, from the deck and the topology.

The run and the dry run ask here, so that what was told is what runs.
"""

from __future__ import annotations

import math

from .. import schedules
from ..config import CommConfig
from ..device import DType
from ..topology import Topology

_MIB = 1 << 20
# One node has no network whose time the pieces could fill, and fewer of them cost less.
_ONE_NODE_SEGMENTS = 16
# What the choice takes a network between nodes to be: 10 Gbit/s, 30 us a message.
_LINK = schedules.Link(alpha_s=30e-6, beta_s_per_byte=8e-10, gamma_s_per_byte=1e-10)


def resolve(comm: CommConfig, topology: Topology, dtype: DType, algorithm: str = "") -> str:
    """The algorithm over all ranks that ``algorithm`` (``comm.algorithm`` if empty) stands for.

    ``comm.reproducible`` asks for sums in global rank order, which one owner an element makes.
    MPI would add low precision in low precision, if at all, so native serves full precision only.
    """
    name = algorithm or comm.algorithm
    if comm.reproducible:
        return "direct"
    if name == "native" and not _exact(dtype):
        name = "auto"
    if name in ("auto", "hierarchical"):
        return "direct" if topology.node_count == 1 else "hierarchical"
    return name


def rail_algorithm(comm: CommConfig, nodes: int, shard_nbytes: int, dtype: DType) -> str:
    """The algorithm along a rail of ``nodes`` ranks for one segment's shard."""
    name = comm.rail_algorithm
    if name == "auto" or (name == "native" and not _exact(dtype)):
        return schedules.choose(shard_nbytes, nodes, _LINK)
    return name


def segments(comm: CommConfig, topology: Topology, nbytes: int) -> int:
    """Pieces that a buffer is cut into: the memory work of one hides another's network time."""
    size = comm.segment_mb * _MIB
    if topology.node_count == 1:
        size *= _ONE_NODE_SEGMENTS
    return max(1, math.ceil(nbytes / size))


def by_levels(comm: CommConfig, topology: Topology, dtype: DType) -> bool:
    """Whether ranks of a node exchange among themselves first, through their shared memory."""
    return topology.node_count == 1 or resolve(comm, topology, dtype) == "hierarchical"


def _exact(dtype: DType) -> bool:
    return dtype.storage == dtype.accumulate
