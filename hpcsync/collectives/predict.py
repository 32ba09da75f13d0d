"""What a step would take with a codec, an algorithm and a size of buckets: pure.

The wire and the processor are priced by what was measured at start (``probe``), messages and bytes
by the algorithm (``schedules.cost``) or by the two-pass exchange of coded pieces:

    encode for the other owners -> wire -> combine own part -> wire -> decode the others' parts

and ``pipeline`` says what of it the backward pass hides. Absolute times are rough: ``tuner``
compares predictions with each other, fits them to the first steps, and then measures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .. import schedules
from ..config import CommConfig
from ..device import dtype_of
from . import choice
from .costs import ITEM, UNCODED, Choice, CodecCost, Group, Layout, Load, Measured, Profile
from .pipeline import Arrival, Stage, simulate

_MOST_SEGMENTS = 96  # of a step; more would only take time to simulate
_MOST_FITS = 20  # halvings when a link's factor is sought
_SLOWEST = 1e4  # that a link is taken to be, in what was measured
_LEAST_WIRE_S = 1e-12  # what marks a stage as one of the wire


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a choice would cost.

    Attributes:
        span_s: from the beginning of the backward pass to the end of the exchange.
        exposed_s: of it after the backward pass.
        wire_s: in which the wire is busy.
        cpu_s: processor time of communication.
    """

    choice: Choice
    span_s: float
    exposed_s: float
    wire_s: float
    cpu_s: float


def predict(
    candidate: Choice,
    measured: Measured,
    loads: Sequence[Load],
    profile: Profile,
    layout: Layout,
) -> Prediction:
    """Price one choice.

    Args:
        loads: the buckets that ``candidate.bucket_mb`` gives, first ready first.
    """
    whole = sum(load.nbytes for load in loads)
    arrivals: list[Arrival] = []
    complete = 0
    for load in loads:
        complete += load.nbytes
        at_s = profile.ready_s(complete / max(whole, 1))
        plain, elements = load.plain_bytes, load.coded
        if candidate.codec == UNCODED:
            plain, elements = load.nbytes, 0
        if elements:
            codec = measured.codecs[candidate.codec]
            pieces = _pieces(elements * load.itemsize, codec.segment_bytes, whole)
            stages = _coded(candidate.rail_algorithm, codec, measured, elements / pieces, layout)
            arrivals.append(Arrival(at_s, stages, pieces))
        if plain:
            pieces = _pieces(plain, layout.segment_bytes, whole)
            stages = _plain(candidate.rail_algorithm, measured, plain / pieces, layout)
            arrivals.append(Arrival(at_s, stages, pieces))
    outcome = simulate(arrivals, profile.backward_s, measured.delay, measured.stretch)
    return Prediction(
        candidate,
        span_s=outcome.end_s,
        exposed_s=outcome.end_s - outcome.backward_s,
        wire_s=outcome.wire_s,
        cpu_s=outcome.cpu_s,
    )


def fit_link(
    candidate: Choice,
    measured: Measured,
    loads: Sequence[Load],
    profile: Profile,
    layout: Layout,
    exposed_s: float,
) -> Measured:
    """The measurements with the link as slow as it must be for ``candidate`` to expose what it
    did expose; links shared with strangers, and crowded cores, are slower than a probe sees."""
    fast, slow = 1 / _SLOWEST, _SLOWEST

    def scaled(factor: float) -> Measured:
        return replace(measured, link=measured.link.scaled(factor))

    for _ in range(_MOST_FITS):
        middle = math.sqrt(fast * slow)
        seen = predict(candidate, scaled(middle), loads, profile, layout).exposed_s
        if seen > exposed_s:
            slow = middle
        else:
            fast = middle
    return scaled(math.sqrt(fast * slow))


def algorithm_terms(name: str, nbytes: float, ranks: int) -> tuple[float, float, float]:
    """(messages, share of the buffer that a rank sends, share that it adds) of an allreduce."""
    if ranks == 1:
        return 0.0, 0.0, 0.0
    if name in ("auto", "native"):
        # MPI does not tell what it does; nor is it known to be better than ours.
        name = choice.rail_algorithm(CommConfig(), ranks, int(nbytes), dtype_of("float32"))
    units = (schedules.Link(1, 0, 0), schedules.Link(0, 1, 0), schedules.Link(0, 0, 1))
    messages, moved, added = (schedules.cost(name, 1, ranks, unit) for unit in units)
    return messages, moved, added


def _pieces(nbytes: float, segment: float, whole: float) -> int:
    return max(1, math.ceil(nbytes / max(segment, whole / _MOST_SEGMENTS)))


def _plain(algorithm: str, measured: Measured, nbytes: float, layout: Layout) -> tuple[Stage, ...]:
    """One uncoded segment of ``nbytes``."""
    group = layout.group(coded=False)
    name = "direct" if layout.flat else algorithm
    stages = _allreduce(name, measured, nbytes * group.share, group)
    return tuple(stages) if layout.flat else _in_node(stages, measured, nbytes, layout)


def _coded(
    algorithm: str, codec: CodecCost, measured: Measured, elements: float, layout: Layout
) -> tuple[Stage, ...]:
    """One coded segment of ``elements``."""
    group = layout.group(coded=True)
    shard = elements * group.share
    stages: list[Stage] = []
    if group.ranks > 1 and codec.rounds:
        one = _allreduce(algorithm, measured, shard * codec.nbytes / codec.rounds, group)
        begin, end = Stage(shard * codec.encode_s), Stage(shard * codec.decode_s)
        stages = [begin, *one * codec.rounds, end]
    elif group.ranks > 1:
        stages = _two_passes(codec, measured, shard, group)
    if layout.flat or layout.everywhere:
        return tuple(stages)
    return _in_node(stages, measured, elements * ITEM, layout)


def _in_node(
    stages: list[Stage], measured: Measured, nbytes: float, layout: Layout
) -> tuple[Stage, ...]:
    """The node's sum before, and its gather after."""
    if layout.local == 1:
        return tuple(stages)
    memory = Stage(nbytes / ITEM * measured.add_s)
    return (memory, *stages, memory)


def _wire(measured: Measured, nbytes: float, messages: float, rounds: float, group: Group) -> Stage:
    link = measured.link
    far = nbytes * group.far
    # What stays in the node is copied in and out.
    near_s = (nbytes - far) / ITEM * 2 * measured.add_s
    return Stage(
        cpu_s=far * link.cpu_s + messages * link.message_cpu_s + near_s,
        wire_s=max(far * link.wire_s, _LEAST_WIRE_S),
        latency_s=rounds * link.latency_s,
    )


def _allreduce(name: str, measured: Measured, nbytes: float, group: Group) -> list[Stage]:
    if group.ranks == 1:
        return []
    messages, moved, added = algorithm_terms(name, nbytes, group.ranks)
    # All messages of a direct exchange's two steps are on their way at once.
    rounds = 2.0 if name == "direct" else messages
    half = _wire(measured, nbytes * moved / 2, messages / 2, rounds / 2, group)
    return [half, Stage(nbytes / ITEM * added * measured.add_s), half]


def _two_passes(codec: CodecCost, measured: Measured, elements: float, group: Group) -> list[Stage]:
    own = elements / group.ranks
    others = elements - own
    combine_s = codec.combine_s + (group.ranks - 2) * codec.decode_add_s
    wire = _wire(measured, others * codec.nbytes, group.ranks - 1, 1, group)
    begin, middle, end = others * codec.encode_s, own * combine_s, others * codec.decode_s
    return [Stage(begin), wire, Stage(middle), wire, Stage(end)]
