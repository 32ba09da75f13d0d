"""hang: what a stuck job waited for, from the dumps of its ranks."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from hpcsync.errors import UserError
from hpcsync.trace import hang
from hpcsync.trace.analysis import stuck
from hpcsync.trace.events import NAMES
from hpcsync.wording import ranges
from tools import reporting
from tools.reporting import Column, Report, Table

from . import output

NAME = "hang"
HELP = "what a stuck job waited for: the collective, the missing ranks, where each stands"

_EVENTS = 20


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    output.add_run(parser)
    parser.add_argument("--rank", type=int, help="all of one rank: stacks, collectives, last spans")
    reporting.add_form(parser)


def run(options: argparse.Namespace) -> int:
    """Print the report.

    Raises:
        UserError: there are no dumps, or none of ``--rank``.
    """
    dumps, problems = hang.load(options.run)
    for problem in problems:
        output.warn(problem)
    if options.rank is not None:
        reporting.show(_one(dumps, options.rank), options)
        return 0
    found = stuck.report(dumps, max(dump.ranks for dump in dumps))
    whole = options.csv or options.json
    reporting.show(_all(found) if whole else Report(before=stuck.render(found)), options)
    return 0


def _all(found: stuck.Report) -> Report:
    columns = [
        Column(name, name) for name in ("ranks", "count", "at", "waits_for", "last", "stack")
    ]
    rows = [
        (
            ranges(place.ranks),
            len(place.ranks),
            place.at,
            ranges(place.waits_for),
            place.last,
            _stack(place.stack),
        )
        for place in found.places
    ]
    values = {
        name: getattr(found, name)
        for name in ("ranks", "reasons", "steps", "stuck", "sequence", "inside", "missing")
    }
    more = {name: getattr(found, name) for name in ("holding", "ring", "absent", "also")}
    return Report(
        tables=[Table("places", "", columns, rows)],
        values={**values, **more},
    )


def _one(dumps: Sequence[hang.Dump], rank: int) -> Report:
    dump = next((each for each in dumps if each.rank == rank), None)
    if dump is None:
        there = ranges([each.rank for each in dumps])
        raise UserError(f"--rank: no dump of rank {rank}; there are {there}")
    last = dump.events[-_EVENTS:]
    spans = [
        (
            NAMES[int(event["name"])][0],
            int(event["step"]),
            int(event["bucket"]),
            (int(event["end"]) - int(event["start"])) / 1e9,
            (dump.clock_ns - int(event["end"])) / 1e9 if dump.clock_ns else math.nan,
        )
        for event in last
    ]
    return Report(
        before=[
            f"rank {rank} of {dump.ranks}, node {dump.node}, {dump.host}, process {dump.pid}: "
            f"{dump.reason} at step {dump.step}"
        ],
        tables=[
            Table(
                "collectives",
                "collectives under way",
                [
                    Column(name, name)
                    for name in ("collective", "run", "segment", "level", "waits_for", "words")
                ],
                [
                    (e.collective, e.sequence, e.segment, e.level, ranges(e.peers), e.waits)
                    for e in dump.active
                ],
            ),
            Table(
                "stacks",
                "stacks, innermost last",
                [Column("thread", "thread"), Column("frame", "frame")],
                [
                    (each.thread, f"{frame.file}:{frame.line} {frame.function}")
                    for each in dump.stacks
                    for frame in each.frames
                ],
            ),
            Table(
                "spans",
                f"last {len(spans)} spans",
                [
                    Column("span", "span"),
                    Column("step", "step"),
                    Column("bucket", "bucket"),
                    Column("s", "ms", reporting.fixed(3, 1e3)),
                    Column("ended_s", "s before the dump", reporting.fixed(3)),
                ],
                spans,
            ),
        ],
        values={"rank": rank, "host": dump.host, "pid": dump.pid, "reason": dump.reason},
    )


def _stack(frames: Sequence[hang.Frame]) -> str:
    return " < ".join(f"{each.file}:{each.line} {each.function}" for each in reversed(frames))
