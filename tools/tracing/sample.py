"""What a span takes in a trace file: of a small file, written with spans as a run has them."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpcsync.trace.events import EVENT, LANE, MEMORY, NAMES, Events
from hpcsync.trace.writer import Head, NodeFile

_LEAST_SPANS = 30_000  # in the larger of the files
_MOST_SPANS = 200_000


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes, compressed: of a span; of what else a step adds to a rank; of a rank and of a file
    before the first step."""

    span_bytes: float
    step_bytes: float
    rank_bytes: float
    file_bytes: float


def measure(spans: int) -> Cost:
    """What a file takes whose steps have so many spans on each rank."""
    steps = min(max(_LEAST_SPANS // spans, 2), 2000)
    spans = min(spans, _MOST_SPANS // steps)
    with tempfile.TemporaryDirectory(prefix="hpcsync-estimate-") as folder:
        empty, two = (_size(Path(folder) / f"ranks{count}", count) for count in (1, 2))
        full = _size(Path(folder) / "full", 1, _spans(spans, steps))
        more = _size(Path(folder) / "memory", 1, memory=steps)
    return Cost(
        span_bytes=(full - empty) / (spans * steps),
        step_bytes=max(more - empty, 0) / steps,
        rank_bytes=two - empty,
        file_bytes=2 * empty - two,
    )


def _size(folder: Path, ranks: int, events: Events | None = None, memory: int = 0) -> int:
    head = Head(
        run_id="estimate",
        node=0,
        nodes=1,
        ranks=ranks,
        every=1,
        ring=0,
        hpcsync="",
        run={"config": "", "topology": "[]", "codec": "none", "buckets": "[]"},
    )
    about = {"host": "node0", "local_rank": 0, "pid": 1}
    file = NodeFile(folder, head, dict.fromkeys(range(ranks), about))
    if events is not None:
        file.add(0, events)
    if memory:
        rows = np.zeros(memory, MEMORY)
        rows["step"] = np.arange(memory)
        rows["resident"] = rows["peak"] = np.random.default_rng(2).integers(
            1 << 28, 1 << 29, memory
        )
        file.add_memory(0, rows)
    file.flush(complete=True)
    return file.path.stat().st_size


def _spans(spans: int, steps: int) -> Events:
    """Steps of transfers and coding of several buckets at a time, whose times differ as measured
    ones do, in no strict order of buckets and numbers."""
    random = np.random.default_rng(1)
    made = np.zeros((steps, spans), EVENT)
    number = np.arange(steps * spans).reshape(steps, spans)
    ends = 1e14 + np.cumsum(random.exponential(3e5, made.size)).reshape(made.shape)
    made["end"] = ends
    made["start"] = ends - np.exp(random.normal(13.5, 1.2, made.shape))  # about 0.7 ms
    made["id"] = number + random.integers(1, 12, made.shape)
    made["step"] = np.arange(1, steps + 1)[:, None]
    near = np.arange(spans) * 8 // spans + random.integers(0, 3, made.shape)
    made["bucket"], made["parent"] = near, number[:, :1] + near
    made["name"] = random.integers(len(NAMES) // 2, len(NAMES), made.shape)
    made["lane"] = np.array([LANE[lane] for _, lane in NAMES])[made["name"]]
    made["bytes"] = (1 << 19) - 64 * (near % 4)
    made["thread"] = 1
    return made.ravel()
