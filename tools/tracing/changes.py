"""Another case from a traced one: other links, codec, ranks, sizes of buckets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hpcsync.collectives.costs import UNCODED, Layout, LinkCost, Load, Measured, Profile
from hpcsync.errors import UserError
from hpcsync.topology import Topology
from hpcsync.trace.analysis.whatif import Seen
from tools.benchmark import MIB

from .coding_cost import measured_codec
from .deck import Deck
from .model import HEADERS, Case, rated, users

_FEWEST, _FEWEST_CODED = 8, 4  # buckets, as of gradients.plan


def with_ranks(
    case: Case, seen: Seen, deck: Deck, old: Topology, new: Topology, *, whole_batch: bool
) -> Case:
    """On other ranks.

    Args:
        whole_batch: the samples of a step stay and are shared by the ranks; else those of a rank.
    """
    layout = Layout.of(new, deck.comm, deck.compress.where)
    crowd = case.crowding * layout.local / case.layout.local
    return _computing(
        replace(case, layout=layout, measured=_sharing(case, layout)),
        seen,
        old.size / new.size if whole_batch else 1.0,
        crowd,
    ).noting(
        "samples a step stay the same and are shared by the ranks (--batch rank: a rank's stay)"
        if whole_batch
        else "samples of each rank stay the same (--batch total: a step's stay)",
        "forward and backward pass take time by samples, everything else of a step stays",
        "all ranks of a node share its link",
    )


def _sharing(case: Case, layout: Layout) -> Measured:
    """The link as each rank sees it, when others of its node use it too."""
    factor = users(layout) / users(case.layout)
    link = case.measured.link
    return replace(case.measured, link=replace(link, wire_s=link.wire_s * factor))


def _computing(case: Case, seen: Seen, work: float, crowd: float) -> Case:
    """With ``work`` times the samples a rank, on cores that so many ranks share."""
    sharing = max(crowd, 1.0)
    slower = sharing / case.sharing
    factor = work * slower
    delay = 1.0 if crowd >= 1 else case.measured.delay
    measured = replace(case.measured, stretch=sharing, delay=delay)
    leads = tuple((share, lead * factor) for share, lead in case.profile.leads)
    return replace(
        case,
        measured=measured,
        profile=Profile(case.profile.backward_s * factor, leads),
        before_s=case.before_s * factor,
        rest_s=case.rest_s + seen.optimizer_s * (slower - 1),
        crowding=crowd,
    )


def with_bandwidth(case: Case, times: float | None, bits: float) -> Case:
    """Over other links.

    Args:
        times: as fast as they were; None to go by ``bits`` a second.

    Raises:
        UserError: the trace holds no link that could be ``times`` as fast.
    """
    link = case.measured.link
    if times is not None:
        if case.layout.nodes == 1:
            raise UserError("--bandwidth: one node has no link; give --nodes and a rate, say 1gbit")
        return _rated(case, link.wire_s / times)
    return _rated(case, rated(bits, case.layout)).noting(
        f"the link gives {HEADERS * 100:.0f}% of its rate, shared by the ranks of a node"
    )


def _rated(case: Case, wire_s: float) -> Case:
    link: LinkCost = replace(case.measured.link, wire_s=wire_s)
    return replace(case, measured=replace(case.measured, link=link))


def with_codec(case: Case, name: str, deck: Deck) -> Case:
    """With another codec, as fast as it is on this machine; buckets as the plan would make them.

    Raises:
        ConfigError: there is no such codec.
    """
    if name == case.choice.codec:
        return case
    coded = name != UNCODED
    loads = [
        Load(
            load.nbytes // load.itemsize if coded and not load.coded else load.coded,
            load.plain_bytes if load.coded else 0,
            load.itemsize,
        )
        for load in case.loads
    ]
    found = replace(case, choice=replace(case.choice, codec=name))
    if coded:
        costs = {**case.measured.codecs, name: measured_codec(name, deck, case.layout)}
        found = replace(found, measured=replace(case.measured, codecs=costs)).noting(
            f"{name} is as fast as on the machine that this runs on",
            "all gradients are coded (biases, norms and small parameters would not be)",
        )
    if coded == (case.choice.codec != UNCODED):
        return replace(found, loads=tuple(loads))
    return _regrouped(replace(found, loads=tuple(loads)), deck)


def with_buckets(case: Case, bucket_mb: float, deck: Deck) -> Case:
    """With buckets of another size."""
    found = replace(case, choice=replace(case.choice, bucket_mb=bucket_mb))
    return _regrouped(found, deck).noting(
        "buckets can be cut anywhere, not only between parameters"
    )


def _regrouped(case: Case, deck: Deck) -> Case:
    coded = case.choice.codec != UNCODED
    size, first = case.choice.bucket_mb, deck.comm.first_bucket_mb
    return replace(case, loads=tuple(regrouped(case.loads, size, first, coded=coded)))


def regrouped(
    loads: Sequence[Load], bucket_mb: float, first_mb: float, *, coded: bool
) -> list[Load]:
    """The same bytes in buckets of another size: cut evenly, and put together again.

    ``gradients.plan`` does so with parameters, which a trace does not know.
    """
    total = sum(load.nbytes for load in loads)
    first = min(first_mb, bucket_mb) * MIB
    fewest = _FEWEST_CODED if coded else _FEWEST
    cap = max(min(bucket_mb * MIB, max(total // fewest, first)), 1.0)
    pieces: list[Load] = []
    for load in loads:
        count = max(1, round(load.nbytes / cap))
        pieces += [Load(load.coded // count, load.plain_bytes // count, load.itemsize)] * count
    made: list[Load] = []
    held: Load | None = None
    for piece in pieces:
        held = piece if held is None else _joined(held, piece)
        if held.nbytes >= 0.75 * (cap if made else min(first, cap)):
            made.append(held)
            held = None
    return made if held is None else [*made, held]


def _joined(one: Load, other: Load) -> Load:
    return Load(one.coded + other.coded, one.plain_bytes + other.plain_bytes, one.itemsize)
