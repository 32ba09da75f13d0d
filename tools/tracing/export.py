"""trace.py export: a window of the trace as JSON for ui.perfetto.dev and chrome://tracing.

The Trace Event Format (Google, 2016). A rank is a process, a lane a thread; spans of a lane that
overlap go to further threads of its name, since slices of a thread must nest. Times are those of
rank 0's clock. Arrows lead from a bucket's fill over its exchange to the transfer that ended last.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from hpcsync.errors import UserError
from hpcsync.trace.events import LANE, LANES, WIRES, Events
from hpcsync.trace.file import Trace
from hpcsync.wording import ranges

from . import output, window
from .lanes import slots
from .window import Window

NAME = "export"
HELP = "a window as JSON for ui.perfetto.dev (the last 2 steps, unless --steps)"
_STEPS = 2
_THREADS = 10_000  # of a rank, at most: numbers of threads are unique in the file
_EVENT_BITS = 40  # of a flow's number; with those of the rank, whole in a float
_MOVING = tuple(LANE[name] for name in WIRES)
_QUEUE, _BUCKET = LANE["queue"], LANE["bucket"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    output.add_run(parser)
    output.add_choice(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="where to write (RUN/perfetto.json); compressed if it ends in .gz",
    )


def run(options: argparse.Namespace) -> int:
    """Write the file and say what is in it."""
    with output.opened(options.run) as trace:
        chosen = window.choose(trace, options, _STEPS)
        path: Path = options.output or trace.folder / "perfetto.json"
        try:
            spans = save(trace, chosen, path)
        except OSError as error:
            raise UserError(f"--output: {path}: {error.strerror}; name another file") from None
        print(
            f"{path}: {spans} spans of {len(chosen.ranks)} ranks, steps "
            f"{ranges(chosen.steps)}; {window.clock_note(trace, chosen.ranks)}"
        )
    return 0


def save(trace: Trace, chosen: Window, path: Path) -> int:
    """Write a window to a file, which is there only when it is whole; the number of spans."""
    aside = path.with_name(f".{path.name}.part")
    try:
        with _opened(aside, compressed=path.suffix == ".gz") as file:
            spans = write(trace, chosen, file)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return spans


def write(trace: Trace, chosen: Window, file: IO[str]) -> int:
    """Write a window, rank by rank; the number of spans."""
    about = {
        "run": trace.facts.run_id,
        "codec": trace.facts.codec,
        "algorithm": trace.facts.algorithm,
        "clocks": window.clock_note(trace, chosen.ranks),
    }
    file.write(f'{{"displayTimeUnit":"ms","otherData":{json.dumps(about)},"traceEvents":[\n')
    spans, between = 0, ""
    for rank, events in chosen.tables(trace):
        names, parts = _threads(trace, rank, events)
        lines = [*names, *_slices(trace, events, parts)]
        arrows = _arrows(events, parts, rank)
        file.write(between + ",\n".join([*lines, *arrows]))
        between = ",\n"
        spans += events.shape[0]
    file.write("\n]}\n")
    return spans


def _opened(path: Path, *, compressed: bool) -> IO[str]:
    if compressed:
        return cast("IO[str]", gzip.open(path, "wt", compresslevel=1, encoding="utf-8"))
    return path.open("w", encoding="utf-8")


def _threads(trace: Trace, rank: int, events: Events) -> tuple[list[str], list[int]]:
    """What names a rank and its threads, and the thread of each event."""
    # Number 0 is the idle process to readers.
    process = rank + 1
    error = trace.uncertainty(rank)
    clock = f"clock within {error / 1e3:.1f} us" if np.isfinite(error) else "clock not compared"
    lines = [
        _naming("process_name", process, 0, name=f"rank {rank} node{trace.node_of(rank)}"),
        _naming("process_labels", process, 0, labels=clock),
        _naming("process_sort_index", process, 0, sort_index=rank),
    ]
    threads = np.zeros(events.shape[0], np.int64)
    number = 0
    for lane, name in enumerate(LANES):
        at = np.flatnonzero(events["lane"] == lane)
        if not at.size:
            continue
        places = slots(events["start"][at], events["end"][at])
        first = process * _THREADS + number + 1
        threads[at] = first + places
        for place in range(int(places.max()) + 1):
            label = f"{name} {place + 1}" if place else name
            number += 1
            lines.append(_naming("thread_name", process, first + place, name=label))
            lines.append(_naming("thread_sort_index", process, first + place, sort_index=number))
    return lines, threads.tolist()


def _naming(what: str, process: int, thread: int, **values: Any) -> str:
    event = {"ph": "M", "name": what, "pid": process, "tid": thread, "args": values}
    return json.dumps(event, separators=(",", ":"))


def _slices(trace: Trace, events: Events, threads: list[int]) -> Iterator[str]:
    """Complete events, one a span."""
    names = [json.dumps(name) for name in trace.names]
    columns = (events[key].tolist() for key in _COLUMNS)
    for thread, number, parent, start, end, nbytes, step, bucket, name, lane in zip(
        threads, *columns, strict=True
    ):
        bucketed = f',"bucket":{bucket}' if bucket >= 0 else ""
        moved = f',"bytes":{nbytes}' if nbytes else ""
        yield (
            f'{{"ph":"X","name":{names[name]},"cat":"{LANES[lane]}","pid":{thread // _THREADS},'
            f'"tid":{thread},"ts":{_micro(start)},"dur":{_micro(max(end - start, 0))},'
            f'"args":{{"step":{step}{bucketed}{moved},"id":{number},"parent":{parent}}}}}'
        )


_COLUMNS = ("id", "parent", "start", "end", "bytes", "step", "bucket", "name", "lane")


def _arrows(events: Events, threads: list[int], rank: int) -> Iterator[str]:
    """Flow events of each bucket: its fill, its exchange, its last transfer."""
    fills = _of(events, events["lane"] == _QUEUE, "start")
    lasts = _of(events, np.isin(events["lane"], _MOVING), "end")
    for index in np.flatnonzero(events["lane"] == _BUCKET).tolist():
        key = (int(events["step"][index]), int(events["bucket"][index]))
        way = [each for each in (fills.get(key), index, lasts.get(key)) if each is not None]
        if len(way) < 2:
            continue
        number = (rank << _EVENT_BITS) + int(events["id"][index])
        for place, each in enumerate(way):
            kind = '"s"' if not place else '"t"' if each != way[-1] else '"f","bp":"e"'
            yield (
                f'{{"ph":{kind},"name":"bucket","cat":"bucket","id":{number},'
                f'"pid":{rank + 1},"tid":{threads[each]},'
                f'"ts":{_micro(int(events["start"][each]))}}}'
            )


def _of(events: Events, mask: Any, order: str) -> dict[tuple[int, int], int]:
    """(step, bucket) -> index: of queue spans the first to start, of transfers the last to end."""
    at = np.flatnonzero(mask)
    at = at[np.argsort(events[order][at], kind="stable")]
    keys = zip(events["step"][at].tolist(), events["bucket"][at].tolist(), strict=True)
    found: dict[tuple[int, int], int] = {}
    for key, index in zip(keys, at.tolist(), strict=True):
        if order == "end":
            found[key] = index
        else:
            found.setdefault(key, index)
    return found


def _micro(time: int) -> str:
    """ns as microseconds, to the last ns: a float of them would lose some."""
    return f"{time // 1000}.{time % 1000:03d}" if time >= 0 else "-" + _micro(-time)
