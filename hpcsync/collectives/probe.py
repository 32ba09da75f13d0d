"""What links, processors and codecs cost here: measured at start, in well under a second.

Everything is measured by all ranks at once, since that is how it will be used: ranks that share a
network card see their share of it, ranks that share cores or memory see theirs. The results are
put together over the ranks, slowest first, so that all ranks hold the same numbers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..codecs import Codec
from ..launch import Runtime
from .codec_costs import PIECE, PIECES, adding_s, codec_cost
from .context import Collectives
from .costs import UNCODED, CodecCost, Layout, Measured
from .link_probe import probe_link
from .saved_costs import SavedCosts

_CROWD_S = 0.03
_MOST_CROWD = 8.0  # more is a neighbour's doing, who will not stay


def probe(
    collectives: Collectives,
    codecs: Mapping[str, Codec],
    layout: Layout,
    shapes: Sequence[Sequence[int]] = (),
    threads: int = 1,
    saved: SavedCosts | None = None,
) -> Measured:
    """Measure; collective over the job, while nothing is exchanged.

    Args:
        codecs: by name.
        shapes: of the parameters that are coded, for codecs of whole tensors.
        threads: with which each rank computes.
        saved: costs of links that need not be measured; the same on all ranks.
    """
    runtime, comm = collectives.runtime, collectives.config
    delay, stretch = _crowding(runtime, threads)
    source = np.random.default_rng(runtime.rank).standard_normal(PIECE * PIECES, np.float32)
    source *= np.float32(1e-3)
    ranks = layout.group(coded=True).ranks
    stream = collectives.device.stream() if collectives.device.queued else None
    runtime.barrier()
    add_s = adding_s(source, stream)
    costs = {
        name: codec_cost(codec, comm, source, ranks, shapes, stream)
        for name, codec in codecs.items()
        if name != UNCODED
    }
    numbers = [add_s]
    for cost in costs.values():
        numbers += [cost.encode_s, cost.decode_s, cost.decode_add_s, cost.combine_s]
    add_s, *rest = runtime.allreduce_scalar(numbers, "max")
    together = runtime.allreduce_scalar([delay, stretch], "sum")
    delay, stretch = (each / runtime.size for each in together)
    agreed: dict[str, CodecCost] = {}
    for at, (name, cost) in enumerate(costs.items()):
        encode_s, decode_s, decode_add_s, combine_s = rest[4 * at : 4 * at + 4]
        agreed[name] = replace(
            cost,
            encode_s=encode_s,
            decode_s=decode_s,
            decode_add_s=decode_add_s,
            combine_s=combine_s,
        )
    if saved is not None:
        link_cost = saved.link(layout.nodes)
        return Measured(link_cost, agreed, add_s, delay, stretch, saved.describe())
    link = collectives.rail if layout.nodes > 1 else collectives.world
    found = probe_link(runtime, collectives.progress, link)
    return Measured(found, agreed, add_s, delay, stretch)


def _crowding(runtime: Runtime, threads: int) -> tuple[float, float]:
    """(delay, stretch) as of ``Measured``: threads of pure arithmetic on all ranks at once.

    How many ranks a core there are does not tell: a container, a neighbour or the second thread
    of a core may take some of it.
    """
    runtime.barrier()
    one, one_cpu = _spin(1)[0]
    alone = one
    if threads > 1:
        runtime.barrier()
        alone = sum(rate for rate, _ in _spin(threads)) / threads
    runtime.barrier()
    *computing, (moved, _) = _spin(threads + 1)
    kept = sum(rate for rate, _ in computing) / threads
    taken = max(moved * one_cpu, 1e-3)
    delay = max(0.0, 1 - kept / alone) / taken
    return min(delay, _MOST_CROWD), min(max(1.0, 1 / max(one * one_cpu, 1e-3)), _MOST_CROWD)


def _spin(threads: int) -> list[tuple[float, float]]:
    """For each of so many threads at once: rounds of work a second, processor seconds a round."""
    found: list[tuple[float, float]] = []

    def work() -> None:
        values = np.ones(PIECE // 4, np.float32)
        began, cpu, rounds = time.perf_counter(), time.thread_time(), 0
        while time.perf_counter() - began < _CROWD_S or not rounds:
            for _ in range(8):
                np.sqrt(values, out=values)
            rounds += 1
        cpu_s = time.thread_time() - cpu
        found.append((rounds / (time.perf_counter() - began), cpu_s / rounds))

    workers = [threading.Thread(target=work, name="hpcsync-probe") for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return found
