"""Whether a run's device memory was what ``--dry-run`` says."""

from __future__ import annotations

import sys

from . import banner, footprint, forecast
from . import config as configs
from .assembly import Parts
from .config import Config
from .data import Source
from .launch import Runtime
from .topology import Topology

_OFF = 0.25  # by which a prediction may be wrong, of the larger one


def predicted(config: Config, topology: Topology, source: Source) -> float | None:
    """Most bytes of device memory that a rank takes; None if that cannot be told."""
    try:
        micro = configs.micro_batch(config, topology.size)
        sizes = footprint.measure(config, source, micro)
        if sizes.activations is None:
            return None
        ways = forecast.ways(config, sizes, topology, forecast.plan(config, sizes))
        parts = forecast.memory_parts(config, sizes, topology, micro, ways, device=True)
    except Exception:  # a user's model may do anything, and a prediction is not worth the run
        return None
    return sum(nbytes for _, nbytes, _ in parts)


def told(peak: float, expected: float, who: str) -> str:
    """A warning, if the two differ by much.

    Args:
        who: the rank that took the most, and its host.
    """
    if abs(peak - expected) <= _OFF * max(peak, expected):
        return ""
    return (
        f"hpcsync: warning: {who} took up to {banner.size(peak)} of device memory, and --dry-run "
        f"says {banner.size(expected)}: plan larger runs of this model by what was taken"
    )


def check(runtime: Runtime, config: Config, parts: Parts) -> None:
    """At the end of a run: compare, and tell if it is off; collective."""
    if not parts.engine.streams.queued:
        return
    own = float(parts.engine.streams.peak_bytes()), runtime.host
    every: list[tuple[float, str]] = runtime.allgather_object(own)
    rank = max(range(len(every)), key=lambda rank: every[rank][0])
    peak, host = every[rank]
    if runtime.rank != 0 or not peak:
        return
    expected = predicted(config, runtime.topology, parts.source)
    if expected is not None and (text := told(peak, expected, f"rank {rank} on {host}")):
        print(text, file=sys.stderr, flush=True)
