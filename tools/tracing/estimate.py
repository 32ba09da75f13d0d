"""trace.py estimate: how large the trace of a run will be.

Spans a step and rank are counted as the exchange would record them, or taken from a run that has
been traced. Bytes a span are those of a small file that is written for the purpose, or of that
run's files.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpcsync import codecs
from hpcsync import config as configs
from hpcsync.codecs import SumCodec
from hpcsync.collectives import choice
from hpcsync.collectives.coding import settings_of
from hpcsync.config import Config
from hpcsync.device import dtype_of
from hpcsync.errors import UserError
from hpcsync.topology import Topology
from hpcsync.trace.events import EVENT
from hpcsync.trace.writer import PART_BYTES
from tools import reporting
from tools.benchmark import MIB
from tools.reporting import Column, Report, Table

from . import output
from .deck import Deck, even
from .sample import Cost, measure

NAME = "estimate"
HELP = "how large a trace will be, before the run"
_FEWEST, _FEWEST_CODED = 8, 4  # buckets, as of gradients.plan
_USUAL_NODE = 8  # ranks


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides the size.

    Attributes:
        spans: of a step and rank.
        steps: of the run; each ``every``-th is written.
    """

    ranks: int
    nodes: int
    steps: int
    every: int
    ring: int
    spans: float

    @property
    def written(self) -> int:
        return self.steps // self.every


class Bytes(float):
    """A number of bytes, which tables show with a unit."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add = parser.add_argument
    add("of", nargs="?", metavar="DECK|RUN", help="a deck, or a run that was traced (the defaults)")
    add("settings", nargs="*", metavar="KEY=VALUE", help="as for hpcsync.train")
    add("--ranks", type=int, metavar="N", help="of the job (1, or as traced)")
    add("--nodes", type=int, metavar="N", help="of the job (nodes of 8 ranks, or as traced)")
    add("--steps", type=int, metavar="N", help="train.steps")
    add("--every", type=int, metavar="N", help="trace.every")
    add("--ring", type=int, metavar="SPANS", help="trace.ring")
    add("--buckets", type=int, metavar="N", help="of the model, else from the deck's model")
    add("--segments", type=int, metavar="N", help="of a bucket")
    reporting.add_form(parser)


def run(options: argparse.Namespace) -> int:
    """Print the estimate."""
    for name in ("ranks", "nodes", "steps", "every", "ring", "buckets", "segments"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name}: must be at least 1")
    given = Path(options.of) if options.of else None
    if given is not None and "=" in given.name and not given.exists():
        options.settings, given = [options.of, *options.settings], None
    if given is not None and given.is_dir():
        shape, cost, source = _as_traced(given, options)
    else:
        shape = _as_told(configs.load(options.of if given else None, options.settings), options)
        cost, source = measure(max(round(shape.spans), 1)), "a small file written now"
    reporting.show(report(shape, cost, source), options)
    return 0


def report(shape: Shape, cost: Cost, source: str) -> Report:
    """The estimate as a table.

    Args:
        source: of the bytes a span, in words.
    """
    per_node = -(-shape.ranks // shape.nodes)
    rank = cost.rank_bytes + shape.written * (shape.spans * cost.span_bytes + cost.step_bytes)
    node = cost.file_bytes + per_node * rank
    whole = shape.nodes * cost.file_bytes + shape.ranks * rank
    held = shape.ring / max(shape.spans, 1)
    rows = [
        ("spans", "spans a step and rank", round(shape.spans)),
        ("span_bytes", "bytes a span, compressed", cost.span_bytes),
        ("steps_written", "steps written", shape.written),
        ("rank_bytes", "trace of a rank", Bytes(rank)),
        ("node_bytes", f"trace of a node of {per_node}", Bytes(node)),
        ("files", "files a node", math.ceil(node / PART_BYTES)),
        ("total_bytes", "whole trace", Bytes(whole)),
        ("ring_bytes", "memory of a rank's ring", Bytes(shape.ring * EVENT.itemsize)),
        ("ring_steps", "steps that the ring holds", held),
    ]
    columns = [Column("what", "what"), Column("value", "size", _shown)]
    table = Table("estimate", "", columns, [(what, value) for _, what, value in rows])
    values: dict[str, Any] = {key: value for key, _, value in rows}
    after = [f"bytes a span are those of {source}"]
    if held < 2:
        after.append(
            f"trace.ring={shape.ring} holds {held:.1f} steps: spans may be lost; set it to "
            f"{_ring(shape.spans)} or more"
        )
    every = "each" if shape.every == 1 else f"one in {shape.every}"
    before = [
        f"ranks {shape.ranks}, nodes {shape.nodes}, steps {shape.steps}, {every} of them written"
    ]
    return Report(tables=[table], before=before, after=after, values=values)


def _shown(value: Any) -> str:
    if isinstance(value, Bytes):
        return reporting.size(value)
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def _ring(spans: float) -> int:
    """A power of two that holds four steps."""
    return 1 << max(6, math.ceil(math.log2(max(4 * spans, 1))))


# -- from a deck ---------------------------------------------------------------------------


def _as_told(config: Config, options: argparse.Namespace) -> Shape:
    ranks = options.ranks or 1
    nodes = options.nodes or max(1, -(-ranks // (config.topology.ranks_per_node or _USUAL_NODE)))
    if nodes > ranks:
        raise UserError(f"--nodes: {nodes} nodes for {ranks} ranks leaves some empty")
    topology = even(ranks, nodes)
    sizes = [MIB] * options.buckets if options.buckets else _buckets(config)
    return Shape(
        ranks=ranks,
        nodes=nodes,
        steps=options.steps or config.train.steps,
        every=options.every or config.trace.every,
        ring=options.ring or config.trace.ring,
        spans=spans(config, topology, sizes, options.segments),
    )


def spans(
    config: Config, topology: Topology, buckets: Sequence[int], segments: int | None = None
) -> int:
    """Spans that a rank records in a step.

    Args:
        buckets: bytes of each.
        segments: of a bucket; None to count them.
    """
    # The step, its batch, optimizer and two waits, and its passes; a bucket's own spans.
    total = 5 + 2 * config.train.accumulate + 3 * len(buckets)
    if topology.size == 1:
        return total
    comm, compress = config.comm, config.compress
    coded = compress.codec not in ("none", "auto") and choice.codes(compress.where, topology)
    codec = codecs.build(compress.codec, settings_of(compress, 0)) if coded else None
    everywhere = coded and compress.where == "all"
    levels = 1
    if choice.by_levels(comm, topology, dtype_of("float32")) and not everywhere:
        inside = max(len(ranks) for ranks in topology.nodes) > 1
        levels = (2 * inside + 1) if topology.node_count > 1 else 1
    coding = 0
    if codec is not None:
        group = topology.size if everywhere else topology.node_count
        rounds = isinstance(codec, SumCodec)
        coding = len(codec.forms(1 << 16, [], group)) + 1 if rounds else 2 * group - 1
    for nbytes in buckets:
        if segments is not None:
            pieces = segments
        elif codec is not None:
            pieces = -(-nbytes // choice.coded_segment(comm, codec))
        else:
            pieces = choice.segments(comm, topology, nbytes)
        total += pieces * (levels + coding)
    return total


def _buckets(config: Config) -> list[int]:
    """Bytes of the buckets of the deck's model, which is built without memory."""
    from hpcsync import data, dryrun  # late: torch takes seconds

    sizes = dryrun.measure(config, data.build(config), 1)
    return [plan.nbytes for plan in dryrun.plan(config, sizes)]


# -- from a run ----------------------------------------------------------------------------


def _as_traced(run: Path, options: argparse.Namespace) -> tuple[Shape, Cost, str]:
    if options.settings or options.buckets or options.segments:
        raise UserError(
            "estimate: settings, --buckets and --segments go with a deck; a traced run has its own"
        )
    with output.opened(run) as trace:
        counts: list[int] = []
        steps: set[int] = set()
        for rank in trace.ranks:
            found, each = np.unique(trace.events(rank)["step"], return_counts=True)
            steps.update(int(step) for step in found)
            counts += each.tolist()
        if not counts:
            raise UserError(f"{run}: its trace holds no events; name another run, or a deck")
        folder = run / "trace" if (run / "trace").is_dir() else run
        files = sum(path.stat().st_size for path in folder.glob("node*.h5"))
        facts, every = trace.facts, options.every or trace.facts.every
    cost = measure(max(round(float(np.median(counts))), 1))
    ranks = options.ranks or facts.ranks
    per_node = -(-facts.ranks // facts.nodes)
    fixed = cost.file_bytes * facts.nodes + len(steps) * cost.step_bytes * facts.ranks
    fixed += cost.rank_bytes * facts.ranks
    measured = Cost(
        span_bytes=max(files - fixed, 0.2 * files) / sum(counts),
        step_bytes=cost.step_bytes,
        rank_bytes=cost.rank_bytes,
        file_bytes=cost.file_bytes,
    )
    shape = Shape(
        ranks=ranks,
        nodes=min(options.nodes or -(-ranks // per_node), ranks),
        steps=options.steps or max(steps),
        every=every,
        ring=options.ring or Deck.of(facts.config).trace.ring,
        spans=float(np.median(counts)),
    )
    return shape, measured, f"{run}"
