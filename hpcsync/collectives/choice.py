"""Which algorithm serves, and in how many pieces: pure, from the deck and the topology.

The run and the dry run ask here, so that what was told is what runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from .. import schedules
from ..codecs import Codec, PieceCodec
from ..config import CommConfig
from ..device import DType
from ..topology import Topology

_MIB = 1 << 20
# One node has no network whose time the pieces could fill, and fewer of them cost less.
_ONE_NODE_SEGMENTS = 16
# A coded piece is coded, sent and decoded one after the other: larger ones would overlap less.
_MOST_LARGER = 4.0
_LONGEST_TAIL = 1 << 14  # elements
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


def codes(where: str, topology: Topology) -> bool:
    """Whether coding ``where`` codes anything on this topology; the same on all ranks."""
    return topology.size > 1 if where == "all" else topology.node_count > 1


def coded_segment(comm: CommConfig, codec: Codec) -> int:
    """Bytes of gradient in a piece that is coded: a piece keeps its size on the wire, up to
    ``_MOST_LARGER`` times as much gradient."""
    ratio = 1.0
    if isinstance(codec, PieceCodec):
        probe = 1 << 16
        ratio = 4 * probe / max(codec.expected(probe), 1.0)
    return int(comm.segment_mb * _MIB * min(max(ratio, 1.0), _MOST_LARGER))


def tail(codec: Codec, count: int) -> int:
    """Of ``count`` elements behind the coded ones, those that travel in the same message."""
    return count if isinstance(codec, PieceCodec) and count <= _LONGEST_TAIL else 0


def runs(bounds: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """Consecutive tensors put together until they have ``size`` elements: (first, last)."""
    start = bounds[0] if bounds else 0
    for end in bounds[1:]:
        if end - start >= size or (end == bounds[-1] and end > start):
            yield start, end
            start = end


def balanced(starts: Sequence[int], count: int, parts: int) -> list[int]:
    """Cuts of ``count`` elements into ``parts`` at some of ``starts``, as even as they allow."""
    cuts = [0]
    for part in range(1, parts):
        wanted = count * part // parts
        near = min((*starts, count), key=lambda at: abs(at - wanted))
        cuts.append(max(near, cuts[-1]))
    return [*cuts, count]


def by_levels(comm: CommConfig, topology: Topology, dtype: DType) -> bool:
    """Whether ranks of a node exchange among themselves first, through their shared memory."""
    return topology.node_count == 1 or resolve(comm, topology, dtype) == "hierarchical"


def _exact(dtype: DType) -> bool:
    """Whether MPI would make the same sum."""
    return dtype.storage == dtype.accumulate and not dtype.maximum
