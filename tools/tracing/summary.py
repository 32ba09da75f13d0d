"""summary: where the time of a step goes, who is slow, what the run is bound by, what to try."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from hpcsync.trace.analysis.summary import Summary, summarise
from hpcsync.trace.file import RunFacts, Trace
from hpcsync.wording import ranges
from tools import reporting
from tools.reporting import Column, Report, Table, fixed, ms, percent, plain, ratio, size

from . import output

NAME = "summary"
HELP = "time a step by part, overlap, bandwidths, slow ranks, and a verdict in words"

_MOST = 8  # rows of ranks that a table for people shows


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    output.add_run(parser)
    output.add_choice(parser)
    reporting.add_form(parser)
    parser.add_argument("--all-ranks", action="store_true", help="show every rank, not the slowest")


def run(options: argparse.Namespace) -> int:
    """Print the summary; the status is 0 whatever was found."""
    with output.opened(options.run) as trace:
        ranks = output.chosen_ranks(trace, options)
        asked = options.steps is not None
        choose = (lambda there: output.chosen_steps(trace, options, there)) if asked else None
        found = summarise(trace, ranks, choose)
        whole = options.all_ranks or options.csv or options.json
        reporting.show(report(trace, found, None if whole else _MOST), options)
    return 0


def report(trace: Trace, found: Summary, most: int | None) -> Report:
    """What the summary shows.

    Args:
        most: ranks in a table; None for all.
    """
    facts = trace.facts
    made = Report(
        before=[*_head(facts, found), "", *_verdict(found)],
        after=_after(trace, found, most),
        values=_values(facts, found),
    )
    made.tables = [
        _parts(found, most is None),
        _stages(found),
        _collectives(found),
        _slowest(found, most),
        _memory(found, most),
        _findings(found),
    ]
    # People read the findings above the tables.
    if most is not None:
        made.tables.pop()
    return made


def _head(facts: RunFacts, found: Summary) -> list[str]:
    tables = found.tables
    steps = [int(step) for step in tables.steps]
    shown = ranges(steps) if len(steps) < 2 or facts.every == 1 else f"{steps[0]} to {steps[-1]}"
    return [
        f"run {facts.run_id}: {facts.ranks} ranks, {facts.nodes} nodes, codec {facts.codec}"
        + (f", algorithm {facts.algorithm}" if facts.algorithm else ""),
        f"{len(tables.ranks)} ranks, {len(steps)} steps ({shown}"
        + (f"; every {facts.every}. one is written" if facts.every > 1 else "")
        + f"): {found.step_ms:.2f} ms a step",
    ]


def _verdict(found: Summary) -> list[str]:
    lines = [f"verdict: {found.verdict.text}", f"next:    {found.verdict.advice}"]
    told = (found.verdict.text.removeprefix("straggler: "), found.verdict.advice)
    for each in found.findings:
        if each.text.removeprefix("straggler: ") == told[0]:
            continue
        lines.append(
            f"{'found' if each.fault else 'note'}:{'' if each.fault else ' '}   {each.text}"
        )
        if each.advice and each.advice != told[1]:
            lines.append(f"         {each.advice}")
    if not any(each.fault for each in found.findings):
        lines.append("no fault found")
    return lines


def _after(trace: Trace, found: Summary, most: int | None) -> list[str]:
    lines = []
    if found.comm_ms > 0:
        lines.append(
            f"communication is under way for {found.comm_ms:.2f} ms of a step and would take "
            f"{found.alone_ms:.2f} ms by itself; overlap: {found.overlap:.1%} of that is hidden "
            f"behind compute; of the wait for it {found.waiting:.0%} is for late ranks"
        )
    lines.append(f"imbalance of the ranks' own work (largest over mean): {found.balance:.3f}")
    came = found.arrival
    if len(found.tables.ranks) > 1:
        lines.append(
            f"ranks come to the end of a step {came.spread_ms:.3f} ms apart"
            + (
                f" (clocks are good to {came.uncertainty_ms:.3f} ms)"
                if came.told
                else f", less than their clocks can tell ({came.uncertainty_ms:.3f} ms)"
            )
        )
    left = len(found.tables.ranks) - (most or 0)
    if most is not None and left > 0:
        lines.append(f"{left} faster ranks are not shown; --all-ranks shows them")
    cost = trace.facts.event_cost_ns
    if cost:
        lines.append(f"recording one event took {cost / 1e3:.1f} us")
    return lines


def _values(facts: RunFacts, found: Summary) -> dict[str, Any]:
    return {
        "run_id": facts.run_id,
        "ranks": list(found.tables.ranks),
        "steps": found.tables.steps,
        "nodes": facts.nodes,
        "codec": facts.codec,
        "algorithm": facts.algorithm,
        "step_ms": found.step_ms,
        "comm_ms": found.comm_ms,
        "alone_ms": found.alone_ms,
        "overlap": found.overlap,
        "waiting_share": found.waiting,
        "imbalance": found.balance,
        "arrival": dataclasses.asdict(found.arrival),
        "verdict": dataclasses.asdict(found.verdict),
    }


def _parts(found: Summary, empty: bool) -> Table:
    columns = (
        Column("part", "part"),
        Column("ms", "ms", ms),
        Column("share", "share", percent),
        Column("least_ms", "least rank", ms),
        Column("most_ms", "most", ms),
        Column("imbalance", "max/mean", ratio),
    )
    rows = [dataclasses.astuple(each) for each in found.parts if each.ms > 0 or empty]
    title = "time of a step (forward, backward and checkpoint are parts of compute and other)"
    return Table("parts", title, columns, rows)


def _stages(found: Summary) -> Table:
    columns = (
        Column("stage", "stage"),
        Column("ms", "busy ms", ms),
        Column("share", "of comm.", percent),
        Column("bytes", "sent to other nodes", size),
    )
    rows = [dataclasses.astuple(each) for each in found.stages]
    title = "stages of the exchange, a step and rank (side by side; a wire's includes its coding)"
    return Table("stages", title, columns, rows)


def _collectives(found: Summary) -> Table:
    columns = (
        Column("bucket", "bucket"),
        Column("bytes", "size", size),
        Column("fill_ms", "fill ms", ms),
        Column("queue_ms", "queue ms", ms),
        Column("transfer_ms", "transfer ms", ms),
        Column("wait_ms", "wait ms", ms),
        Column("algbw_gb_s", "algbw GB/s", fixed(3)),
        Column("busbw_gb_s", "busbw GB/s", fixed(3)),
        Column("last_rank", "last rank"),
        Column("last_share", "in steps", fixed(0, 100.0, "%")),
    )
    rows = [dataclasses.astuple(each) for each in found.collectives]
    return Table("collectives", "collectives (transfer: the least of all ranks)", columns, rows)


def _slowest(found: Summary, most: int | None) -> Table:
    columns = (
        Column("rank", "rank"),
        Column("node", "node"),
        Column("work_ms", "work ms", ms),
        Column("best", "/ best rank", ratio),
        Column("past", "/ own past", ratio),
        Column("forward_ms", "forward", ms),
        Column("backward_ms", "backward", ms),
        Column("data_ms", "data", ms),
        Column("waited_ms", "waited", ms),
    )
    rows = [dataclasses.astuple(each) for each in found.slowest[:most]]
    return Table("slowest", "slowest ranks, by their own work in a step", columns, rows)


def _memory(found: Summary, most: int | None) -> Table:
    columns = (
        Column("rank", "rank"),
        Column("resident", "resident", size),
        Column("peak", "peak", size),
        Column("growth", "growth", size),
    )
    largest = sorted(found.memory, key=lambda each: -each.peak)
    rows = [dataclasses.astuple(each) for each in largest[: most and 3]]
    return Table("memory", "memory, the largest ranks" if most else "memory", columns, rows)


def _findings(found: Summary) -> Table:
    keys = (
        "kind",
        "fault",
        "ranks",
        "node",
        "bucket",
        "lane",
        "lost_ms",
        "since",
        "text",
        "advice",
    )
    columns = [Column(key, key) for key in keys]
    rows = [[_cell(getattr(each, key)) for key in keys] for each in found.findings]
    return Table("findings", "findings", columns, rows)


def _cell(value: Any) -> Any:
    """Ranks as text: a cell of CSV holds no list."""
    return " ".join(map(plain, value)) if isinstance(value, tuple) else value
