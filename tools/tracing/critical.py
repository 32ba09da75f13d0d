"""critical: the path across ranks that the length of a step follows, by lane and by rank."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from hpcsync.trace.analysis.account import names_of
from hpcsync.trace.analysis.critical import Hop, Path, Share, critical_path, shares
from hpcsync.trace.analysis.exchange import exchange
from hpcsync.trace.analysis.tables import collect
from hpcsync.trace.events import Events
from hpcsync.trace.file import Trace
from tools import reporting
from tools.reporting import Column, Report, Table, fixed, ms, percent

from . import output

NAME = "critical"
HELP = "the critical path of steps across ranks, with the share of each lane and rank"

_RANKS = 10  # in the table for people
_KEPT = 8  # ranks whose events are kept while paths are walked


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    output.add_run(parser)
    output.add_choice(parser)
    reporting.add_form(parser)
    parser.add_argument(
        "--path", action="store_true", help="show the path itself, of the last step"
    )


def run(options: argparse.Namespace) -> int:
    """Print the shares; the status is 0."""
    with output.opened(options.run) as trace:
        ranks = output.chosen_ranks(trace, options)
        asked = options.steps is not None
        choose = (lambda there: output.chosen_steps(trace, options, there)) if asked else None
        tables = collect(trace, ranks, choose)
        found, names, fetch = exchange(tables), names_of(trace.names), _Events(trace)
        paths = [critical_path(tables, found, names, fetch, step) for step in tables.steps.tolist()]
        reporting.show(
            report(paths, options.path, people=not (options.csv or options.json)), options
        )
    return 0


class _Events:
    """A rank's events in a step; those of the ranks asked for last stay in memory."""

    def __init__(self, trace: Trace) -> None:
        self._whole = lru_cache(_KEPT)(trace.events)

    def __call__(self, rank: int, step: int) -> Events:
        events = self._whole(rank)
        return np.asarray(events[events["step"] == step])


def report(paths: Sequence[Path], shown: bool, *, people: bool = True) -> Report:
    """Shares of the paths.

    Args:
        shown: the last path itself, too.
        people: shorten long tables.
    """
    ranks = shares(paths, lambda hop: str(hop.rank))
    made = Report(values={"steps": [each.step for each in paths]})
    mean = sum(each.ms for each in paths) / len(paths)
    made.before = [
        f"critical path of {len(paths)} steps, {mean:.2f} ms on average; hops: "
        f"{sum(len(each.hops) for each in paths) / len(paths):.0f} a step"
    ]
    made.tables = [
        _shares("lanes", "lane", shares(paths, lambda hop: hop.lane)),
        _shares("ranks", "rank", ranks[: _RANKS if people else None]),
        _shares("where", "rank and lane", shares(paths, _where)[: _RANKS if people else None]),
        _last(paths),
    ]
    if shown:
        made.tables.append(_path(paths[-1]))
    if len(ranks) > _RANKS and people:
        made.after.append(f"{len(ranks) - _RANKS} more ranks have smaller shares; --csv shows all")
    hands = [each for path in paths for each in path.handovers]
    close = sum(not each.told for each in hands)
    if close:
        made.after.append(
            f"{close} of {len(hands)} times the rank that came last did so by less than clocks can "
            "tell: any of the ranks might stand there"
        )
    return made


def _where(hop: Hop) -> str:
    return f"{hop.rank} {hop.lane}"


def _shares(name: str, head: str, rows: Sequence[Share]) -> Table:
    columns = (
        Column(head.replace(" ", "_"), head),
        Column("ms", "ms a step", ms),
        Column("share", "share", percent),
    )
    return Table(name, f"by {head}", columns, [(each.name, each.ms, each.share) for each in rows])


def _last(paths: Sequence[Path]) -> Table:
    """Who came last, over all steps."""
    counts: dict[int, list[float]] = {}
    for path in paths:
        for each in path.handovers:
            counts.setdefault(each.rank, []).append(each.margin_ms)
    whole = sum(map(len, counts.values())) or 1
    rows = [
        (rank, len(margins) / whole, float(np.median(margins)))
        for rank, margins in sorted(counts.items(), key=lambda item: -len(item[1]))[:_RANKS]
    ]
    columns = (
        Column("rank", "rank"),
        Column("share", "came last", percent),
        Column("margin_ms", "by ms (median)", fixed(3)),
    )
    return Table("last", "who others waited for", columns, rows)


def _path(path: Path) -> Table:
    columns = (
        Column("rank", "rank"),
        Column("lane", "lane"),
        Column("bucket", "bucket"),
        Column("ms", "ms", fixed(3)),
    )
    rows = [
        (hop.rank, hop.lane, hop.bucket if hop.bucket >= 0 else None, hop.ms) for hop in path.hops
    ]
    return Table("path", f"the path of step {path.step}", columns, rows)
