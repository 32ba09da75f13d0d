"""Segments whose contents are coded: along the rails, or between all ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from .. import schedules
from ..codecs import Codec, SumCodec
from ..transports.base import Region, Transport
from . import choice
from .binding import RAIL, Binding
from .coding import Coding, Held
from .collective import Stage
from .summed import Summed
from .two_pass import TwoPass


@dataclass(frozen=True)
class CodedSegment:
    """A segment's levels, and what codecs remember of it on this rank."""

    region: Region
    stages: list[Stage]
    held: list[Held]


def coded_segments(binding: Binding, whole: Region, coding: Coding) -> Iterator[CodedSegment]:
    """The segments of ``whole``; what lies behind ``coding.count`` goes uncoded with the last."""
    for start, stop in _pieces(binding, whole.part(0, coding.count), coding):
        last = stop == coding.count
        tail = whole.count - stop if last else 0
        region = binding.ways.placed(whole.part(start, stop + tail))
        segment = _Segment(binding, coding, start, tail, region)
        yield CodedSegment(region, segment.stages(), segment.held)


class _Segment:
    """One segment on its way to its stages."""

    def __init__(
        self, binding: Binding, coding: Coding, start: int, tail: int, region: Region
    ) -> None:
        self._binding, self._coding, self._start, self._tail = binding, coding, start, tail
        self.region = region
        self.held: list[Held] = []

    def stages(self) -> list[Stage]:
        binding = self._binding
        if self._coding.where == "rail":
            return binding.across(self.region, self._cuts(), self._along)
        tag = binding.next_tag() + RAIL
        return [self._stage("world", binding.ways.world, self.region, 0, tag, binding.divisor)]

    def _along(self, shard: Region, at: int, tag: int) -> Stage:
        binding = self._binding
        divisor = binding.divisor // binding.early(shard)
        return self._stage("rail", binding.ways.rail, shard, at, tag, divisor)

    def _cuts(self) -> list[int]:
        """Where the node's ranks share the segment: at blocks, or between tensors."""
        rails = self._binding.ways.topology.rails
        count = self.region.count - self._tail
        if _is_whole(self._coding.codec):
            starts = [each.start - self._start for each in self._coding.matrices]
            cuts = choice.balanced([at for at in starts if 0 <= at < count], count, rails)
        else:
            cuts = schedules.chunk_bounds(count, rails, self._coding.codec.block)
        return [*cuts[:-1], self.region.count]

    def _stage(
        self, level: str, transport: Transport, part: Region, at: int, tag: int, divisor: int
    ) -> Stage:
        coding, start, ways = self._coding, self._start + at, self._binding.ways
        program: Summed | TwoPass
        if isinstance(coding.codec, SumCodec):
            config = self._binding.config
            program = Summed(config, transport, part, coding, start, tag, divisor)
        else:
            tail = self._tail if at + part.count == self.region.count else 0
            program = TwoPass(transport, part, coding, start, tag, divisor, tail)
        self.held += program.held
        sent = {who: n for who, n in program.sent_bytes.items() if ways.leaves(transport, who)}
        # Uncoded, each part would go to its owner and its mean come back.
        plain = 2 * part.nbytes * len(sent) // transport.size
        return Stage(level, program, round(sum(sent.values())), plain)


def _pieces(binding: Binding, whole: Region, coding: Coding) -> Iterator[tuple[int, int]]:
    """The segments' first and last elements."""
    size = choice.coded_segment(binding.config, coding.codec) // whole.dtype.itemsize
    if _is_whole(coding.codec):
        yield from choice.runs([*(each.start for each in coding.matrices), whole.count], size)
        return
    pieces = max(1, -(-whole.count // size))
    for start, stop in itertools.pairwise(
        schedules.chunk_bounds(whole.count, pieces, coding.codec.block)
    ):
        if start < stop:
            yield start, stop


def _is_whole(codec: Codec) -> bool:
    return isinstance(codec, SumCodec) and codec.whole
