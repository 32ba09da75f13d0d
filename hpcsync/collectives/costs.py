"""What a prediction is made from: pure.

What was measured of the machine (Measured), what the model gives to exchange (Load, Profile), and
who exchanges with whom (Layout).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..config import CommConfig
from ..device import dtype_of
from ..topology import Topology
from . import choice

UNCODED = "none"
ITEM = 4  # bytes of float32
_MIB = 1 << 20
_LARGE = 1 << 32


@dataclass(frozen=True, slots=True, order=True)
class Choice:
    """What is chosen: names as ``compress.codec``, ``comm.rail_algorithm`` and ``comm.bucket_mb``
    spell them."""

    codec: str
    rail_algorithm: str
    bucket_mb: float


@dataclass(frozen=True, slots=True)
class LinkCost:
    """A link as each rank sees it while all of them use it.

    Attributes:
        latency_s: of a small message.
        wire_s: time of a byte.
        cpu_s: processor time of a byte, sending and receiving.
        message_cpu_s: processor time of a message.
    """

    latency_s: float
    wire_s: float
    cpu_s: float = 0.0
    message_cpu_s: float = 0.0

    def scaled(self, factor: float) -> LinkCost:
        """The link if it were ``factor`` times as slow."""
        return replace(self, latency_s=self.latency_s * factor, wire_s=self.wire_s * factor)


@dataclass(frozen=True, slots=True)
class CodecCost:
    """A codec on this machine; processor time in seconds an element.

    Attributes:
        nbytes: of a coded element.
        encode_s: with error feedback, if the codec has it.
        decode_s, decode_add_s: of a coded piece.
        combine_s: of the owner's part with one other rank.
        rounds: of a codec whose coded forms an allreduce adds; 0 for the two-pass exchange.
        segment_bytes: of gradient in a piece.
    """

    nbytes: float
    encode_s: float
    decode_s: float
    decode_add_s: float
    combine_s: float
    rounds: int = 0
    segment_bytes: float = float(_MIB)


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured, the same numbers on all ranks.

    Attributes:
        link: between nodes; of one node's ranks where there is only one.
        codecs: by name, without ``none``.
        add_s: processor time to add an element of float32.
        delay: seconds by which a second of communication's processor time puts computing off.
        stretch: seconds that a second of processor time takes while all ranks work.
        source: of the link's numbers, in words; empty for a probe at start.
    """

    link: LinkCost
    codecs: Mapping[str, CodecCost]
    add_s: float = 0.0
    delay: float = 1.0
    stretch: float = 1.0
    source: str = ""


@dataclass(frozen=True, slots=True)
class Load:
    """A bucket: elements that a codec may code, and bytes of what goes uncoded in any case."""

    coded: int
    plain_bytes: int = 0
    itemsize: int = 4

    @property
    def nbytes(self) -> int:
        return self.coded * self.itemsize + self.plain_bytes


@dataclass(frozen=True, slots=True)
class Profile:
    """The backward pass without communication.

    Attributes:
        backward_s: its length.
        leads: (share of the gradients' bytes that are complete, seconds before the end), in
            order; evenly before the first of them, or over the pass if there are none.
    """

    backward_s: float
    leads: tuple[tuple[float, float], ...] = ()

    def ready_s(self, share: float) -> float:
        """When ``share`` of the bytes are complete."""
        if not self.leads:
            return self.backward_s * share
        points = [(0.0, self.backward_s), *self.leads, (math.inf, self.leads[-1][1])]
        after = next(at for at, each in enumerate(points) if each[0] > share)
        (low, early), (high, late) = points[after - 1 : after + 1]
        lead = early + (late - early) * (share - low) / (high - low)
        return max(0.0, self.backward_s - lead)


@dataclass(frozen=True, slots=True)
class Layout:
    """Who exchanges with whom.

    Attributes:
        local: ranks of a node.
        rails: of them that exchange with other nodes.
        everywhere: coding is between all ranks, not only along the rails.
        flat: uncoded sums see all ranks alike.
        segment_bytes: of the pieces in which uncoded gradients go.
    """

    nodes: int
    local: int = 1
    rails: int = 1
    everywhere: bool = False
    flat: bool = False
    segment_bytes: float = float(_MIB)

    @classmethod
    def of(cls, topology: Topology, comm: CommConfig, where: str = "rail") -> Layout:
        """From the deck's ``comm`` section and ``compress.where``."""
        return cls(
            nodes=topology.node_count,
            local=max(len(ranks) for ranks in topology.nodes),
            rails=topology.rails,
            everywhere=where == "all",
            flat=not choice.by_levels(comm, topology, dtype_of("float32")),
            segment_bytes=_LARGE / choice.segments(comm, topology, _LARGE),
        )

    def group(self, coded: bool) -> Group:
        """Those among whom a bucket goes over a wire."""
        if self.nodes == 1:
            return Group(self.local if coded and self.everywhere else 1, 1.0, 1.0)
        if self.flat or (coded and self.everywhere):
            size = self.nodes * self.local
            return Group(size, 1.0, (size - self.local) / (size - 1))
        return Group(self.nodes, 1.0 / self.rails, 1.0)


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks, the share of a bucket that each of them exchanges, the share of its bytes that go
    over the link."""

    ranks: int
    share: float
    far: float
