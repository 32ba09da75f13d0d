"""From what was traced to what the cost model asks for, and from there to another case.

``hpcsync.collectives.predict`` prices an exchange beside a backward pass. Its numbers come from the
trace where the trace holds them: when buckets were launched, how long coding took an element, what
a byte took on the wire; then the link is fitted so that the model exposes what the trace exposed,
and the backward pass is taken as long as it would be without communication on its core. What no
trace tells is assumed, and ``Case.assumed`` says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hpcsync.collectives.costs import (
    ITEM,
    UNCODED,
    Choice,
    Layout,
    LinkCost,
    Load,
    Measured,
    Profile,
)
from hpcsync.collectives.predict import Prediction, fit_link, predict
from hpcsync.trace.analysis.whatif import Seen
from hpcsync.trace.file import RunFacts

from .coding_cost import traced_codec
from .deck import Deck, topology_of

# Where no probe has told: what TCP through the kernel takes of a core, and the sum in a node.
_CPU_S, _MESSAGE_CPU_S, _ADD_S = 3e-10, 1e-5, 4e-10
_LEAST_LATENCY_S, _MOST_LATENCY_S = 5e-6, 2e-3
_FARTHEST = 3.0  # that a fitted link may be from the busy time of the wires
HEADERS = 0.95  # of a link's bits that are payload of TCP
_ROUNDS = 4  # of fitting the link and the backward pass in turns
_HALVINGS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A step that can be predicted.

    Attributes:
        before_s, rest_s: of the step, around the backward pass and the exchange.
        correction_s: what the traced step took longer than the model says.
        crowding: ranks a core; 0 if that is not known.
        assumed: what no trace told, a line each.
    """

    choice: Choice
    measured: Measured
    loads: tuple[Load, ...]
    profile: Profile
    layout: Layout
    before_s: float
    rest_s: float
    correction_s: float = 0.0
    crowding: float = 0.0
    assumed: tuple[str, ...] = ()

    def predict(self) -> Prediction:
        """The exchange beside the backward pass."""
        return predict(self.choice, self.measured, self.loads, self.profile, self.layout)

    @property
    def sharing(self) -> float:
        """Times as long that computing takes for other ranks on the same core."""
        return max(self.crowding, 1.0)

    def step_s(self, found: Prediction) -> float:
        """The whole step with that exchange."""
        span = max(found.span_s + self.correction_s, self.profile.backward_s)
        return self.before_s + span + self.rest_s

    def noting(self, *lines: str) -> Case:
        """With further assumptions."""
        return replace(self, assumed=(*self.assumed, *lines))


def users(layout: Layout) -> int:
    """Ranks that use a node's link at a time."""
    return layout.local if layout.flat or layout.everywhere else layout.rails


def rated(bits: float, layout: Layout) -> float:
    """Seconds a byte that a rank sees on a link of so many bits a second."""
    return 8 * users(layout) / bits / HEADERS


def traced(
    seen: Seen, facts: RunFacts, deck: Deck, crowding: float | None, bits: float = 0.0
) -> Case:
    """The case that was traced, fitted to what was seen.

    Args:
        crowding: ranks a core; None to take what the trace says.
        bits: a second, of the link; 0 if that is to be found out.
    """
    topology = topology_of(facts)
    layout = Layout.of(topology, deck.comm, deck.compress.where)
    assumed: list[str] = []
    told = facts.links.get("crowding") if crowding is None else crowding
    if told is None:
        assumed.append("every rank has a core of its own (--cores says otherwise)")
    crowd = max(float(told or 0.0), 1.0)
    name = UNCODED
    if seen.coded:
        name = facts.codec if facts.codec != UNCODED else "unknown"
    loads = _loads(seen, facts, coded=name != UNCODED)
    link, more = _link(seen, facts, layout)
    measured = Measured(
        link,
        {},
        add_s=_add_s(seen, layout, loads, crowd),
        # Who computes drives the exchange where no core is free.
        delay=1.0 if seen.driven > 0.5 else 0.0,
        stretch=crowd,
    )
    if name != UNCODED:
        cost = traced_codec(name, seen, deck, layout, loads, crowd)
        measured = replace(measured, codecs={name: cost})
    case = Case(
        choice=Choice(name, deck.comm.rail_algorithm, deck.comm.bucket_mb),
        measured=measured,
        loads=loads,
        profile=Profile(seen.backward_s, seen.leads),
        layout=layout,
        before_s=seen.before_s,
        rest_s=seen.rest_s,
        crowding=float(told or 0.0),
        assumed=(*assumed, *more),
    )
    if bits:
        link = replace(link, wire_s=rated(bits, layout))
        case = replace(case, measured=replace(measured, link=link))
    elif "wire_s" not in _told(facts) and layout.nodes > 1:
        case = case.noting(
            "transfers took as long as they did for want of bandwidth (--was says what the traced "
            "link has; the rest is then taken for latency)"
        )
    return _fitted(case, seen, known=bool(bits))


def _loads(seen: Seen, facts: RunFacts, *, coded: bool) -> tuple[Load, ...]:
    """The buckets, first ready first; those of a coded run coded as far as is known."""
    known = {int(each["bytes"]): each for each in facts.buckets}
    made = []
    for nbytes in seen.buckets:
        about = known.get(nbytes, {})
        item = nbytes // max(int(about.get("elements", nbytes // ITEM)), 1) or ITEM
        elements = int(about.get("coded", 0)) or nbytes // item
        made.append(Load(elements, nbytes - elements * item, item) if coded else Load(0, nbytes))
    return tuple(made)


def _link(seen: Seen, facts: RunFacts, layout: Layout) -> tuple[LinkCost, list[str]]:
    """A first estimate of the link between nodes, by what the wires' spans show."""
    told = _told(facts)
    cpu_s = float(told.get("cpu_s", _CPU_S))
    message_s = float(told.get("message_cpu_s", _MESSAGE_CPU_S))
    if not seen.wire_bytes:
        return LinkCost(30e-6, 1e-9, cpu_s, message_s), []
    coding = seen.encode_s + seen.combine_s + seen.decode_s
    wire_s = max(seen.wire_s - coding, 0.2 * seen.wire_s) / seen.wire_bytes
    latency = (seen.shortest_s - seen.shortest_bytes * wire_s) / 2
    latency = min(max(latency, _LEAST_LATENCY_S), _MOST_LATENCY_S)
    lines = []
    if "cpu_s" not in told:
        lines.append(
            f"sending takes {_CPU_S * 1e9:.1f} ns of a core a byte and "
            f"{_MESSAGE_CPU_S * 1e6:.0f} us a message"
        )
    return LinkCost(
        float(told.get("latency_s", latency)), float(told.get("wire_s", wire_s)), cpu_s, message_s
    ), lines


def _told(facts: RunFacts) -> Mapping[str, Any]:
    """What a probe measured of the link between nodes."""
    for level in ("rail", "world"):
        found = facts.links.get(level)
        if isinstance(found, Mapping):
            return found
    return {}


def _add_s(seen: Seen, layout: Layout, loads: Sequence[Load], crowd: float) -> float:
    """Processor time of an element of the node's sum, which has a pass before and one after."""
    elements = sum(load.nbytes for load in loads) / ITEM
    if layout.local == 1 or not elements or not seen.node_s:
        return _ADD_S
    return min(max(seen.node_s / (2 * elements) / crowd, _ADD_S / 4), 10 * _ADD_S)


# -- fitting -----------------------------------------------------------------------------


def _fitted(case: Case, seen: Seen, *, known: bool) -> Case:
    """The case whose prediction exposes what was exposed, after a backward pass as long as the
    traced one.

    Args:
        known: the bandwidth is right, only the latency is sought.
    """
    first = case.measured.link
    fit = _with_latency if known else _with_link
    for _ in range(_ROUNDS):
        case = _with_backward(case, seen)
        case = fit(case, seen, first)
    found = case.predict()
    return replace(case, correction_s=seen.backward_s + seen.exposed_s - found.span_s)


def _with_backward(case: Case, seen: Seen) -> Case:
    """Communication on the computing core taken out of the backward pass."""
    found = case.predict()
    shift = found.span_s - found.exposed_s - case.profile.backward_s
    alone = max(seen.backward_s - shift, 0.2 * seen.backward_s)
    factor = alone / seen.backward_s if seen.backward_s else 1.0
    leads = tuple((share, lead * factor) for share, lead in seen.leads)
    return replace(case, profile=Profile(alone, leads))


def _with_link(case: Case, seen: Seen, first: LinkCost) -> Case:
    """The link, ``first`` by the spans on the wires, as slow as it must be."""
    if case.layout.group(coded=case.choice.codec != UNCODED).ranks < 2:
        return case
    start = replace(case.measured, link=first)
    fitted = fit_link(case.choice, start, case.loads, case.profile, case.layout, seen.exposed_s)
    # A small exposed part says little of the wire; the spans on it say how busy it was.
    factor = fitted.link.wire_s / first.wire_s if first.wire_s else 1.0
    factor = min(max(factor, 1 / _FARTHEST), _FARTHEST)
    return replace(case, measured=replace(start, link=first.scaled(factor)))


def _with_latency(case: Case, seen: Seen, first: LinkCost) -> Case:
    """The link, whose bandwidth is known, with the latency that it must have."""
    if case.layout.group(coded=case.choice.codec != UNCODED).ranks < 2:
        return case

    def late(latency_s: float) -> Case:
        link = replace(first, latency_s=latency_s)
        return replace(case, measured=replace(case.measured, link=link))

    low, high = 0.0, seen.exposed_s
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if late(middle).predict().exposed_s > seen.exposed_s:
            high = middle
        else:
            low = middle
    return late(low)
