"""diff: what got slower from one run to another, by lane and bucket, with confidence intervals.

The exit status is 1 when the step got slower beyond the threshold, so that a pipeline can stop.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hpcsync.trace.analysis.compare import (
    Change,
    Comparison,
    check_comparable,
    compare,
    same_buckets,
)
from hpcsync.trace.analysis.tables import Tables, collect
from hpcsync.trace.file import RunFacts
from tools import reporting
from tools.reporting import Column, Report, Table, fixed, ms

from . import output

NAME = "diff"
HELP = "what got slower in the second run, with confidence intervals; exit status for CI"

_signed = fixed(1, 100.0, "%")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    output.add_run(parser, "a", "b")
    output.add_choice(parser)
    reporting.add_form(parser)
    parser.add_argument(
        "--threshold",
        type=_share,
        default=0.05,
        metavar="PERCENT",
        help="change that counts as slower, in percent (default 5)",
    )
    parser.add_argument(
        "--level", type=_share, default=0.95, metavar="PERCENT", help="of confidence (default 95)"
    )
    parser.add_argument(
        "--anyway", action="store_true", help="compare runs of other ranks, models or batches, too"
    )


def _share(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / 100
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write percent, from 0 up to 100")
    return value


def run(options: argparse.Namespace) -> int:
    """Print the changes; 1 if the step got slower beyond the threshold, else 0."""
    a, one = _read(options.a, options)
    b, other = _read(options.b, options)
    if not options.anyway:
        check_comparable(one, other)
    found = compare(a, b, (one, other), options.threshold, options.level)
    if not same_buckets(a, b):
        output.warn("the runs cut their gradients into other buckets; those are not compared")
    reporting.show(report(found, (a, b), (one, other), options), options)
    return int(found.slower)


def _read(run: Path, options: argparse.Namespace) -> tuple[Tables, RunFacts]:
    with output.opened(run) as trace:
        ranks = output.chosen_ranks(trace, options)
        asked = options.steps is not None
        choose = (lambda there: output.chosen_steps(trace, options, there)) if asked else None
        return collect(trace, ranks, choose), trace.facts


def report(
    found: Comparison,
    tables: tuple[Tables, Tables],
    facts: tuple[RunFacts, RunFacts],
    options: argparse.Namespace,
) -> Report:
    """What the comparison shows."""
    whole = found.lanes[0]
    counts = [each.steps.shape[0] for each in tables]
    made = Report(
        before=[
            f"a: {facts[0].run_id}, {counts[0]} steps; b: {facts[1].run_id}, {counts[1]} steps",
            *(f"{key}: {first} -> {second}" for key, first, second in found.settings),
            "",
            _words(whole, options.threshold, options.level),
        ],
        values={
            "a": facts[0].run_id,
            "b": facts[1].run_id,
            "threshold": options.threshold,
            "level": options.level,
            "slower": found.slower,
            "settings": [list(each) for each in found.settings],
        },
    )
    made.tables = [
        _table("lanes", "lane", "by lane, ms a step and rank", found.lanes),
        _table("buckets", "bucket", "by bucket, ms of transfer", found.buckets),
    ]
    return made


def _words(whole: Change, threshold: float, level: float) -> str:
    sure = f"{level:.0%} interval {whole.low:+.1%} to {whole.high:+.1%}"
    text = f"the step takes {whole.b_ms:.2f} ms instead of {whole.a_ms:.2f}: {whole.change:+.1%}"
    text += f" ({sure})"
    if whole.verdict == "same":
        return f"{text}; not beyond {threshold:.0%} for sure"
    return f"{text}; {whole.verdict} beyond {threshold:.0%}"


def _table(name: str, head: str, title: str, changes: Sequence[Change]) -> Table:
    columns = (
        Column(head, head),
        Column("a_ms", "a ms", ms),
        Column("b_ms", "b ms", ms),
        Column("change", "change", _signed),
        Column("low", "from", _signed),
        Column("high", "to", _signed),
        Column("of_step", "of the step", _signed),
        Column("verdict", ""),
    )
    rows = [
        (
            *("step" if each.name == "whole" else each.name, each.a_ms, each.b_ms),
            *(each.change, each.low, each.high, each.of_step),
            "" if each.verdict == "same" else each.verdict,
        )
        for each in changes
    ]
    return Table(name, title, columns, rows)
