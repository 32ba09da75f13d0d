"""What a trace is made of: spans in lanes, clocks, histograms. Pure."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FORMAT = "hpcsync-trace"
VERSION = 1

LANES = (
    "step",
    "data",
    "forward",
    "backward",
    "optimizer",
    "wait",
    "queue",
    "bucket",
    "encode",
    "wire.node",
    "wire.rail",
    "wire.world",
    "decode",
    "checkpoint",
)
LANE = {name: index for index, name in enumerate(LANES)}
WIRES = tuple(name for name in LANES if name.startswith("wire."))

# The names of spans, each with its lane; a file holds the names, so later versions may add some.
NAMES = (
    ("step", "step"),
    ("batch", "data"),
    ("forward", "forward"),
    ("backward", "backward"),
    ("optimizer", "optimizer"),
    ("exposed", "wait"),
    ("driven", "wait"),
    ("agreement", "wait"),
    ("fill", "queue"),
    ("queued", "queue"),
    ("bucket", "bucket"),
    ("encode", "encode"),
    ("combine", "encode"),
    ("transfer", "wire.node"),
    ("transfer", "wire.rail"),
    ("transfer", "wire.world"),
    ("decode", "decode"),
    ("checkpoint", "checkpoint"),
)


class Span(NamedTuple):
    """What a kind of span is called: indices into ``NAMES`` and ``LANES``."""

    name: int
    lane: int


EVENT = np.dtype(
    [
        ("id", "<i8"),
        ("parent", "<i8"),
        ("start", "<i8"),
        ("end", "<i8"),
        ("bytes", "<i8"),
        ("step", "<i4"),
        ("bucket", "<i4"),
        ("name", "<u2"),
        ("lane", "u1"),
        ("thread", "u1"),
        ("spare", "<u4"),
    ]
)
"""A span of one rank. Times in ns of the rank's own clock; ``bucket`` is -1 and ``parent`` 0 where
there is none; ``spare`` is 0."""

CLOCK = np.dtype([("local", "<i8"), ("offset", "<i8"), ("uncertainty", "<i8")])
"""At ``local`` ns of a rank's clock, ``local + offset`` is rank 0's time, give or take
``uncertainty`` ns."""

MEMORY = np.dtype([("step", "<i4"), ("resident", "<i8"), ("peak", "<i8")])
"""Bytes of a rank's memory at the end of a step."""

BINS = 64
"""Of a histogram of durations: bin b counts those in [2^(b/2), 2^((b+1)/2)) microseconds; the first
one also shorter, the last one also longer ones."""

Events = NDArray[np.void]


def bins_of(durations: NDArray[np.int64]) -> NDArray[np.int64]:
    """The histogram bin of each duration in ns."""
    microseconds = np.maximum(durations, 1) / 1e3
    found = np.floor(2 * np.log2(np.maximum(microseconds, 1e-9))).astype(np.int64)
    clipped: NDArray[np.int64] = np.clip(found, 0, BINS - 1)
    return clipped
