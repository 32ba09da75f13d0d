"""trace.py timeline: what ranks did in some steps, as a picture and as a page with zoom."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from hpcsync.errors import UserError
from hpcsync.trace.events import LANE, Events
from hpcsync.trace.file import Trace
from hpcsync.wording import ranges

from . import lanes, output, page, picture, window
from .window import Window

NAME = "timeline"
HELP = "a picture and a page with zoom (the last 2 steps, unless --steps)"
_STEPS = 2


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    output.add_run(parser)
    output.add_choice(parser)
    add = parser.add_argument
    add("--png", type=Path, metavar="FILE", help="the picture (RUN/timeline.png)")
    add("--svg", type=Path, metavar="FILE", help="the picture as SVG, for a page of text")
    add("--html", type=Path, metavar="FILE", help="the page (RUN/timeline.html)")
    add(
        "--detail",
        choices=("auto", "lanes", "compact"),
        default="auto",
        help=f"a row a lane, or two a rank; auto: lanes for up to {lanes.FEW_RANKS} ranks",
    )


def run(options: argparse.Namespace) -> int:
    """Write PNG and page, or what was named, and say where they are."""
    with output.opened(options.run) as trace:
        chosen = window.choose(trace, options, _STEPS)
        neither = options.png is None and options.html is None and options.svg is None
        png = options.png or (trace.folder / "timeline.png" if neither else None)
        html = options.html or (trace.folder / "timeline.html" if neither else None)
        if neither and len(chosen.ranks) > picture.MOST_RANKS:
            output.warn(f"more than {picture.MOST_RANKS} ranks: no picture, only the page")
            png = None
        steps: dict[int, int] = {}
        tables = _tables(trace, chosen, steps)
        rows = lanes.rows(tables, lanes.detail_of(options.detail, len(chosen.ranks)))
        marks = sorted((start, step) for step, start in steps.items())
        about = _about(trace, chosen)
        if html is not None:
            try:
                html.write_text(page.page(rows, marks, about, trace.names), encoding="utf-8")
            except OSError as error:
                raise UserError(f"--html: {html}: {error.strerror}; name another file") from None
            print(html)
        for path in filter(None, (png, _svg(options.svg))):
            picture.draw(path, rows, marks, about)
            print(path)
    return 0


def _svg(path: Path | None) -> Path | None:
    """The file of --svg, whose name tells what it is."""
    if path is not None and path.suffix != ".svg":
        raise UserError(f"--svg: {path}: its name must end in .svg")
    return path


def _tables(
    trace: Trace, chosen: Window, steps: dict[int, int]
) -> Iterator[tuple[int, int, Events]]:
    """(rank, node, events); notes in ``steps`` when each began first."""
    for rank, events in chosen.tables(trace):
        for event in events[events["lane"] == LANE["step"]]:
            step, start = int(event["step"]), int(event["start"])
            steps[step] = min(start, steps.get(step, start))
        yield rank, trace.node_of(rank), events


def _about(trace: Trace, chosen: Window) -> list[str]:
    facts = trace.facts
    nodes = "node" if facts.nodes == 1 else "nodes"
    return [
        f"{trace.folder.resolve().name}: steps {ranges(chosen.steps)}, "
        f"ranks {ranges(chosen.ranks)} of {facts.ranks} on {facts.nodes} {nodes}",
        f"run {facts.run_id}",
        f"codec {facts.codec}",
        f"algorithm {facts.algorithm or 'unknown'}",
        window.clock_note(trace, chosen.ranks),
    ]
