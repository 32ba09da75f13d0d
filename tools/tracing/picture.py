"""A timeline as a PNG or an SVG, by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from hpcsync.errors import UserError
from hpcsync.trace.events import LANES

from .lanes import COLOURS, ON_TOP, Row

MOST_RANKS = 256  # more would be lines of a pixel
_WIDTH, _DOTS = 16.0, 120  # inches, dots an inch
_LANE, _BAND = 0.19, 0.15  # inches a row
_FRAME = 1.75  # inches above and below
_LEAST = 0.6  # dots that a span is wide, at least
_TALLEST = 45.0


def draw(
    path: Path, rows: Sequence[Row], steps: Sequence[tuple[int, int]], about: Sequence[str]
) -> None:
    """Draw rows of spans.

    Args:
        path: ends in .svg for an SVG, whose texts stay texts; anything else is a PNG.
        steps: (ns at which it began first, number) of each.
        about: lines of the title.

    Raises:
        UserError: matplotlib is missing, or there are too many ranks.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "timeline: pictures need matplotlib; pip install matplotlib, or take --html alone"
        ) from None
    ranks = len({row.rank for row in rows})
    if ranks > MOST_RANKS:
        raise UserError(
            f"timeline: {ranks} ranks do not fit on a picture; name at most {MOST_RANKS} by --ranks"
        )
    compact = any(row.label == "compute" for row in rows)
    height = min(_FRAME + len(rows) * (_BAND if compact else _LANE), _TALLEST)
    figure = Figure(figsize=(_WIDTH, height), dpi=_DOTS)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.115, 0.62 / height, 0.875, 1 - _FRAME / height))
    begin, end = extent(rows)
    axes.set_xlim(0, max(end - begin, 1) / 1e6)
    axes.set_ylim(len(rows), 0)
    _spans(axes, rows, begin, (end - begin) / (_WIDTH * _DOTS * 0.875) * _LEAST)
    _numbers(axes, rows, begin, end - begin)
    _ranks(axes, rows, compact)
    for start, step in steps:
        at = (start - begin) / 1e6
        axes.axvline(at, color="#1F2328", linewidth=0.8, linestyle=(0, (4, 3)), zorder=4)
        axes.annotate(
            f"step {step}",
            (at, 1),
            xycoords=("data", "axes fraction"),
            xytext=(2, 3),
            textcoords="offset points",
            fontsize=8,
            color="#1F2328",
        )
    axes.set_xlabel(f"ms; 0 is {begin / 1e9:.6f} s of rank 0's clock", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#D0D7DE", linewidth=0.5, zorder=0)
    axes.set_axisbelow(True)
    _head(figure, rows, height, about)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import rc_context

    form = "svg" if path.suffix == ".svg" else "png"
    # The same trace gives the same bytes: no date, and names of clips that are not drawn by lot.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "hpcsync"}
    try:
        with rc_context(settings):
            figure.savefig(path, format=form, metadata={"Date": None} if form == "svg" else None)
    except OSError as error:
        raise UserError(f"--{form}: {path}: {error.strerror}; name another file") from None


def extent(rows: Sequence[Row]) -> tuple[int, int]:
    """Where the first span begins and the last one ends, ns."""
    held = [row.events for row in rows if row.events.shape[0]]
    if not held:
        return 0, 1
    return (
        min(int(events["start"].min()) for events in held),
        max(int(events["end"].max()) for events in held),
    )


def _spans(axes: Any, rows: Sequence[Row], begin: int, least: float) -> None:
    """One collection a lane; ``least`` ns wide each, so that none is lost."""
    from matplotlib.collections import PolyCollection

    for lane, name in enumerate(LANES):
        boxes = []
        for at, row in enumerate(rows):
            mine = row.events["lane"] == lane
            if not mine.any():
                continue
            low = (row.events["start"][mine] - begin) / 1e6
            wide = np.maximum(row.events["end"][mine] - row.events["start"][mine], least) / 1e6
            inset = 0.28 if name in ON_TOP and row.label == "exchange" else 0.08
            thick = (1 - 2 * inset) / row.depth
            top = at + inset + row.slots[mine] * thick
            corners = np.stack([low, top, low + wide, top + thick], axis=1)
            boxes.append(corners[:, [0, 1, 0, 3, 2, 3, 2, 1]].reshape(-1, 4, 2))
        if boxes:
            axes.add_collection(
                PolyCollection(
                    np.concatenate(boxes),
                    facecolors=COLOURS[name],
                    edgecolors="white",
                    linewidths=0.15,
                    zorder=3 if name in ON_TOP else 2,
                )
            )


def _numbers(axes: Any, rows: Sequence[Row], begin: int, length: int) -> None:
    """The bucket's number on its spans, where there is room."""
    for at, row in enumerate(rows):
        if row.label != "bucket":
            continue
        for event, slot in zip(row.events, row.slots, strict=True):
            wide = int(event["end"]) - int(event["start"])
            if wide > 0.012 * length and row.depth < 3:
                axes.text(
                    (int(event["start"]) + wide / 2 - begin) / 1e6,
                    at + 0.5 if row.depth == 1 else at + 0.08 + 0.84 * (slot + 0.5) / row.depth,
                    f"{event['bucket']}",
                    fontsize=6.5 if row.depth == 1 else 4.5,
                    color="white",
                    ha="center",
                    va="center",
                    zorder=5,
                )


def _ranks(axes: Any, rows: Sequence[Row], compact: bool) -> None:
    """Names of ranks and lanes, shades to tell ranks apart, a line between nodes."""
    ticks, labels, node = [], [], None
    step = 1 + len(rows) // 300
    for count, (rank, group) in enumerate(groupby(enumerate(rows), key=lambda each: each[1].rank)):
        members = list(group)
        low, high = members[0][0], members[-1][0] + 1
        if count % 2:
            axes.axhspan(low, high, color="#EEF1F4", zorder=0, linewidth=0)
        if node is not None and members[0][1].node != node:
            axes.axhline(low, color="#1F2328", linewidth=1.0, zorder=4)
        title = f"rank {rank}  node{members[0][1].node}"
        node = members[0][1].node
        if compact:
            if count % step == 0:
                ticks.append((low + high) / 2)
                labels.append(title)
            continue
        ticks += [at + 0.5 for at, _ in members]
        labels += [row.label for _, row in members]
        axes.annotate(
            title,
            (0, (low + high) / 2),
            xycoords=("axes fraction", "data"),
            xytext=(-92, 0),
            textcoords="offset points",
            rotation=90,
            ha="center",
            va="center",
            fontsize=8.5 if len(members) > 5 else 7,
            weight="bold",
        )
    axes.set_yticks(ticks, labels, fontsize=7.5)
    axes.tick_params(axis="y", length=0)


def _head(figure: Any, rows: Sequence[Row], height: float, about: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    used = {int(lane) for row in rows for lane in np.unique(row.events["lane"])}
    figure.text(0.01, 1 - 0.12 / height, about[0], fontsize=12, weight="bold", va="top")
    figure.text(0.01, 1 - 0.36 / height, "; ".join(about[1:]), fontsize=9, va="top")
    figure.legend(
        handles=[Patch(color=COLOURS[LANES[lane]], label=LANES[lane]) for lane in sorted(used)],
        loc="upper left",
        bbox_to_anchor=(0.005, 1 - 0.52 / height),
        ncols=len(LANES),
        frameon=False,
        fontsize=9,
        handlelength=1.2,
        columnspacing=1.4,
    )
