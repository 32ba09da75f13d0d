"""Segments whose contents are coded: along the rails, or between all ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from .. import schedules
from ..codecs import Codec, SumCodec
from ..transports.base import Region
from ..transports.mpi_host import MpiHost
from . import choice
from .binding import RAIL, Binding
from .coding import Coding, Held
from .collective import Stage
from .summed import Summed
from .two_pass import TwoPass


@dataclass(frozen=True)
class CodedSegment:
    """A segment's levels, and what codecs remember of it on this rank."""

    nbytes: int
    stages: list[Stage]
    held: list[Held]


def coded_segments(binding: Binding, whole: Region, coding: Coding) -> Iterator[CodedSegment]:
    """The segments of ``whole``, all of which is coded."""
    for start, stop in _pieces(binding, whole, coding):
        region = whole.part(start, stop)
        held: list[Held] = []

        def along(shard: Region, at: int, tag: int, start: int = start) -> Stage:
            divisor = binding.divisor // binding.early(shard)
            return _stage(binding, "rail", shard, coding, start + at, tag, divisor, held)  # noqa: B023

        if coding.where == "all":
            tag = binding.next_tag() + RAIL
            divisor = binding.divisor
            stages = [_stage(binding, "world", region, coding, start, tag, divisor, held)]
        else:
            stages = binding.across(region, _cuts(binding, region, coding, start), along)
        yield CodedSegment(region.nbytes, stages, held)


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


def _cuts(binding: Binding, region: Region, coding: Coding, start: int) -> list[int]:
    """Where the node's ranks share a segment: at blocks, or between tensors."""
    rails = binding.ways.topology.rails
    if not _is_whole(coding.codec):
        return schedules.chunk_bounds(region.count, rails, coding.codec.block)
    starts = [each.start - start for each in coding.matrices]
    return choice.balanced([at for at in starts if 0 <= at < region.count], region.count, rails)


def _stage(
    binding: Binding,
    level: str,
    region: Region,
    coding: Coding,
    start: int,
    tag: int,
    divisor: int,
    held: list[Held],
) -> Stage:
    ways = binding.ways
    transport: MpiHost = ways.rail if level == "rail" else ways.world
    program: Summed | TwoPass
    if isinstance(coding.codec, SumCodec):
        program = Summed(binding.config, transport, region, coding, start, tag, divisor)
    else:
        program = TwoPass(transport, region, coding, start, tag, divisor)
    held += program.held
    far = sum(sent for peer, sent in program.sent_bytes.items() if ways.leaves(transport, peer))
    return Stage(level, program, round(far))


def _is_whole(codec: Codec) -> bool:
    return isinstance(codec, SumCodec) and codec.whole
