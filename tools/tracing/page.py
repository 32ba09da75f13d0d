"""A timeline as one HTML page: the template beside this module, and the spans inside it as JSON.

Times are whole 0.1 us from the first span on, in columns a row: a page of 50,000 spans is 2 MB.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcsync.trace.events import LANES

from .lanes import COLOURS, ON_TOP, Row
from .picture import extent

_TEMPLATE = Path(__file__).with_name("page.html")
_UNIT = 100  # ns


def page(
    rows: Sequence[Row],
    steps: Sequence[tuple[int, int]],
    about: Sequence[str],
    names: Sequence[str],
) -> str:
    """The page's text; arguments as for ``picture.draw``, and what ``name`` of events means."""
    begin, end = extent(rows)
    data = {
        "length": (end - begin) // _UNIT + 1,
        "begin": begin,
        "lanes": [{"name": lane, "colour": COLOURS[lane], "top": lane in ON_TOP} for lane in LANES],
        "names": list(names),
        "steps": [[(start - begin) // _UNIT, step] for start, step in steps],
        "rows": [_row(row, begin) for row in rows],
    }
    # An angle bracket could end the script that holds the data.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return (
        _TEMPLATE.read_text(encoding="utf-8")
        .replace("@TITLE@", html.escape(about[0]))
        .replace("@ABOUT@", html.escape("; ".join(about[1:])))
        .replace("@DATA@", text)
    )


def _row(row: Row, begin: int) -> dict[str, Any]:
    order = np.argsort(row.events["start"], kind="stable")
    events, slots = row.events[order], row.slots[order]

    def units(times: NDArray[np.int64]) -> list[int]:
        return ((times - begin) // _UNIT).tolist()  # type: ignore[no-any-return]

    return {
        "rank": row.rank,
        "node": row.node,
        "label": row.label,
        "depth": row.depth,
        "start": units(events["start"]),
        "end": units(np.maximum(events["end"], events["start"])),
        "lane": events["lane"].tolist(),
        "name": events["name"].tolist(),
        "step": events["step"].tolist(),
        "bucket": events["bucket"].tolist(),
        "bytes": events["bytes"].tolist(),
        "slot": slots.tolist(),
    }
