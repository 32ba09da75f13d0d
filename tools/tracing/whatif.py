"""trace.py whatif: the step predicted with other links, ranks, codec or sizes of buckets.

The traced step is taken apart, the cost model that chooses codecs (``collectives.predict``) is
fitted to it, and one thing or several are changed. What the fitted model misses of the traced step
is added to the predicted one. Everything that the trace does not tell is assumed, and said.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from hpcsync.collectives.costs import UNCODED
from hpcsync.collectives.predict import Prediction
from hpcsync.errors import UserError
from hpcsync.topology import Topology
from hpcsync.trace.analysis.whatif import Seen, observe
from hpcsync.trace.events import Events
from hpcsync.trace.file import Trace
from tools import reporting
from tools.benchmark import BenchmarkError, parse_rate
from tools.reporting import Column, Report, Table

from . import changes, output
from .deck import Deck, even, topology_of
from .known import Known
from .model import Case, traced, users

NAME = "whatif"
HELP = "the step with other links, ranks, codec or buckets"
_MOST_RANKS = 64  # that are read; more tell nothing new of a median


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    output.add_run(parser)
    add = parser.add_argument
    add(
        "--bandwidth",
        metavar="RATE",
        help="of a node's link: 400mbit, 10gbit, or 2x of what it was",
    )
    add("--was", metavar="RATE", help="of the traced link; what it fell short is then latency")
    add("--codec", metavar="NAME", help="none, bf16, int8, ...")
    add("--ranks", type=int, metavar="N", help="of the job")
    add("--nodes", type=int, metavar="N", help="of the job (as many ranks a node as traced)")
    add("--bucket-mb", type=float, metavar="MIB", help="comm.bucket_mb")
    add(
        "--batch",
        choices=("total", "rank"),
        default="total",
        help="with other ranks: what stays, the samples of a step or of a rank (%(default)s)",
    )
    add("--costs", metavar="PATH", help="of links, saved by preflight ('' for none; comm.costs)")
    add("--cores", type=float, metavar="N", help="of a node, if ranks may have to share them")
    reporting.add_form(parser)


def run(options: argparse.Namespace) -> int:
    """Print the traced step beside the predicted one."""
    with output.opened(options.run) as trace:
        deck = Deck.of(trace.facts.config)
        seen = observe(_tables(trace), trace.names)
        old = topology_of(trace.facts)
        most = max(len(ranks) for ranks in old.nodes)
        crowding = most / options.cores if options.cores else None
        known = Known.of(trace.facts, deck.comm.costs if options.costs is None else options.costs)
        bits = _bits(options.was or "", "--was")
        case = traced(seen, known.told(bits), deck, crowding, bits)
        case = case.noting(*known.lines(bits))
        other = changed(case, seen, deck, old, options, known)
        reporting.show(_report(seen, case, other, options), options)
    return 0


def changed(
    case: Case,
    seen: Seen,
    deck: Deck,
    old: Topology,
    options: argparse.Namespace,
    known: Known,
) -> Case:
    """The traced case with what the options change.

    Raises:
        UserError: an option that cannot be.
    """
    new = _topology(old, options)
    if new != old:
        case = changes.with_ranks(case, seen, deck, old, new, whole_batch=options.batch == "total")
    if new.node_count > 1 and old.node_count == 1 and not _bits(options.bandwidth or ""):
        saved = known.between_nodes(new)
        if saved is None:
            raise UserError(
                "--nodes: the traced run had one node, so nothing is known of links; give "
                "--bandwidth with a rate, say 1gbit, or run `python -m hpcsync.preflight` on such "
                "nodes" + (f" ({known.why})" if known.why else "")
            )
        case = replace(case, measured=replace(case.measured, link=saved.link(new.node_count)))
        case = case.noting(f"the link costs what is known by {saved.describe()}")
    if options.bucket_mb is not None:
        if options.bucket_mb <= 0:
            raise UserError("--bucket-mb: must be above 0")
        case = changes.with_buckets(case, options.bucket_mb, deck)
    if options.codec:
        case = changes.with_codec(case, options.codec, deck)
    if options.bandwidth:
        times = re.fullmatch(r"([\d.]+)x", options.bandwidth)
        factor = float(times[1]) if times else None
        if factor is not None and factor <= 0:
            raise UserError("--bandwidth: must be above 0")
        bits = _bits(options.bandwidth) if factor is None else 0.0
        if factor is None and not bits:
            raise UserError(f"--bandwidth: {options.bandwidth!r} is no rate; write 400mbit or 2x")
        case = changes.with_bandwidth(case, factor, bits)
    return case


def _topology(old: Topology, options: argparse.Namespace) -> Topology:
    """The nodes that the options ask for."""
    ranks, nodes = options.ranks, options.nodes
    if ranks is None and nodes is None:
        return old
    per_node = max(len(each) for each in old.nodes)
    if ranks is None:
        ranks = nodes * per_node
    if nodes is None:
        nodes = max(1, -(-ranks // per_node))
    if not 1 <= nodes <= ranks:
        raise UserError(f"--nodes: {ranks} ranks cannot be on {nodes} nodes")
    return even(ranks, nodes)


def _bits(text: str, option: str = "") -> float:
    """Bits a second; 0 if there is no rate, which is an error of ``option`` if that is named."""
    if not text:
        return 0.0
    try:
        return parse_rate(text)
    except (BenchmarkError, ValueError):
        if option:
            raise UserError(f"{option}: {text!r} is no rate; write 400mbit or 1gbit") from None
        return 0.0


def _tables(trace: Trace) -> Iterator[Events]:
    ranks = trace.ranks
    if len(ranks) > _MOST_RANKS:
        output.warn(f"whatif reads {_MOST_RANKS} of {len(ranks)} ranks, evenly chosen")
        places = np.linspace(0, len(ranks) - 1, _MOST_RANKS).round().astype(int)
        ranks = tuple(ranks[place] for place in places)
    for rank in ranks:
        yield trace.events(rank)


# -- showing -----------------------------------------------------------------------------


def _report(seen: Seen, case: Case, other: Case, options: argparse.Namespace) -> Report:
    model, found = case.predict(), other.predict()
    step_s = other.step_s(found)
    columns = [
        Column("what", ""),
        *(Column(name, name, reporting.ms) for name in ("traced", "model", "predicted")),
    ]
    exposed_s = max(found.exposed_s + other.correction_s, 0.0)
    rows = [
        ("step", seen.step_s, case.step_s(model) - case.correction_s, step_s),
        ("exposed", seen.exposed_s, model.exposed_s, exposed_s),
        (
            "backward",
            seen.backward_s,
            model.span_s - model.exposed_s,
            found.span_s - found.exposed_s,
        ),
        ("before it", seen.before_s, case.before_s, other.before_s),
        ("the rest", seen.rest_s, case.rest_s, other.rest_s),
        ("wire busy", seen.wire_s, model.wire_s, found.wire_s),
        ("processor of communication", None, model.cpu_s, found.cpu_s),
    ]
    told = [(name, *(each and each * 1e3 for each in values)) for name, *values in rows]
    words = dominates(other, found, step_s, exposed_s)
    report = Report(
        before=[
            f"traced: {describe(case)}; medians of {seen.steps} steps, {seen.ranks} ranks",
            f"predicted: {describe(other)}",
        ],
        tables=[Table("whatif", "ms", columns, told)],
        after=[
            f"{step_s / seen.step_s:.2f} of the traced step; {words}",
            *(f"assumed: {line}" for line in dict.fromkeys(other.assumed)),
        ],
        values={
            "step_ms": step_s * 1e3,
            "exposed_ms": exposed_s * 1e3,
            "traced_step_ms": seen.step_s * 1e3,
            "dominates": words,
            "assumed": list(dict.fromkeys(other.assumed)),
        },
    )
    miss = abs(case.correction_s) / seen.step_s
    if miss > 0.05:
        report.after.append(
            f"the model misses {miss * 100:.0f}% of the traced step, which was added to the "
            "prediction: take it with care"
        )
    return report


def describe(case: Case) -> str:
    """A case in words."""
    layout, link = case.layout, case.measured.link
    ranks = "rank" if layout.local == 1 else "ranks"
    nodes = "node" if layout.nodes == 1 else "nodes"
    rate = 8e-9 / link.wire_s * users(layout) if link.wire_s else float("inf")
    wire = f", {rate:.3g} Gbit/s a node" if layout.nodes > 1 else ""
    return (
        f"{layout.nodes} {nodes} of {layout.local} {ranks}, codec {case.choice.codec}, "
        f"{len(case.loads)} buckets{wire}"
    )


def dominates(case: Case, found: Prediction, step_s: float, exposed_s: float) -> str:
    """What makes the step as long as it is, in words."""
    share = exposed_s / step_s if step_s else 0.0
    told = f"{share * 100:.0f}% of the step is exposed exchange"
    if share < 0.1:
        return f"computation dominates: {told}"
    busy = found.cpu_s * case.measured.stretch
    if found.wire_s >= busy and case.layout.nodes > 1:
        cause = "the link between nodes"
    elif case.choice.codec != UNCODED:
        cause = f"processor time of coding with {case.choice.codec} and of messages"
    else:
        cause = "processor time of sums and messages"
    return f"{cause} dominates: {told}"
