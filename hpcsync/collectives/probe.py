"""What links, processors and codecs cost here: measured at start, in well under a second.

Everything is measured by all ranks at once, since that is how it will be used: ranks that share a
network card see their share of it, ranks that share cores or memory see theirs. The results are
put together over the ranks, slowest first, so that all ranks hold the same numbers.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median

import numpy as np

from ..codecs import Codec, Matrix, Moment, PieceCodec, SumCodec
from ..codecs.base import OWNER, SENDER, Floats
from ..config import CommConfig
from ..device.kernels import empty_bytes
from ..launch import Runtime
from . import choice
from .context import Collectives
from .costs import UNCODED, CodecCost, Layout, Measured
from .link_probe import probe_link
from .saved_costs import SavedCosts

_PIECE = 1 << 16  # elements
_PIECES = 16  # more than a core's cache holds, as gradients are
_WORK_S = 6e-3  # for each function of a codec
_MOST_CALLS = 15
_CROWD_S = 0.03
_MOST_CROWD = 8.0  # more is a neighbour's doing, who will not stay
_WHOLE = 1 << 20  # most elements of the matrix on which codecs of whole tensors are timed


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
    source = np.random.default_rng(runtime.rank).standard_normal(_PIECE * _PIECES, np.float32)
    source *= np.float32(1e-3)
    ranks = layout.group(coded=True).ranks
    runtime.barrier()
    target = np.zeros(_PIECE, np.float32)
    add_s = _seconds(lambda at: np.add(target, _piece(source, at), out=target)) / _PIECE
    costs = {
        name: _codec_cost(codec, comm, source, ranks, shapes)
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
        values = np.ones(_PIECE // 4, np.float32)
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


def _codec_cost(
    codec: Codec,
    comm: CommConfig,
    source: Floats,
    ranks: int,
    shapes: Sequence[Sequence[int]],
) -> CodecCost:
    segment = float(choice.coded_segment(comm, codec))
    with np.errstate(all="ignore"):
        if isinstance(codec, SumCodec):
            return _sum_cost(codec, source, max(ranks, 2), shapes, segment)
        assert isinstance(codec, PieceCodec)
        return _piece_cost(codec, source, segment)


def _piece_cost(codec: PieceCodec, source: Floats, segment: float) -> CodecCost:
    out, total = empty_bytes(codec.capacity(_PIECE)), np.zeros(_PIECE, np.float32)
    sender, owner = codec.store(_PIECE, SENDER), codec.store(_PIECE, OWNER)

    def moment(at: int) -> Moment:
        return Moment(at, at, at)

    encode = _seconds(lambda at: codec.encode(_piece(source, at), out, sender, moment(at)))
    coded = out.copy()
    decode = _seconds(lambda at: codec.decode(coded, total))
    decode_add = _seconds(lambda at: codec.decode_add(coded, total))
    own = source.copy()
    combine = _seconds(
        lambda at: codec.combine(_piece(own, at), 0, [coded], 2, out, owner, moment(at))
    )
    return CodecCost(
        codec.expected(_PIECE) / _PIECE,
        encode / _PIECE,
        decode / _PIECE,
        decode_add / _PIECE,
        combine / _PIECE,
        segment_bytes=segment,
    )


def _sum_cost(
    codec: SumCodec, source: Floats, ranks: int, shapes: Sequence[Sequence[int]], segment: float
) -> CodecCost:
    tensors = [tuple(shape) for shape in shapes] if codec.whole else []
    if not tensors:
        tensors = [(256, _PIECE // 256)]
    nbytes = elements = rounds = 0
    for shape in tensors:
        forms = codec.forms(math.prod(shape), (Matrix(0, shape),), ranks)
        nbytes += sum(np.dtype(form.dtype).itemsize * form.count for form in forms)
        elements += math.prod(shape)
        rounds = max(rounds, len(forms))
    typical = max(tensors, key=math.prod)
    columns = math.prod(typical[1:])
    if math.prod(typical) > _WHOLE and columns <= _WHOLE:
        typical = (_WHOLE // columns, columns)
    count = min(math.prod(typical), _WHOLE)
    matrices = (Matrix(0, typical if math.prod(typical) == count else (count,)),)
    arrays = [np.zeros(form.count, form.dtype) for form in codec.forms(count, matrices, ranks)]
    values = np.resize(source, count)
    store = codec.store(count, matrices)

    def run(at: int) -> None:
        moment = Moment(at, at, at)
        for _ in codec.rounds(values, arrays, matrices, ranks, 1, store, moment):
            pass

    half = _seconds(run) / count / 2
    each = nbytes / max(elements, 1)
    return CodecCost(each, half, half, 0.0, 0.0, max(rounds, 1), segment)


def _piece(source: Floats, at: int) -> Floats:
    start = at % _PIECES * _PIECE
    return source[start : start + _PIECE]


def _seconds(work: Callable[[int], object]) -> float:
    """Processor time of one call, the median of several; the first is not counted."""
    work(0)
    began = time.perf_counter()
    times: list[float] = []
    while len(times) < 2 or (len(times) < _MOST_CALLS and time.perf_counter() - began < _WORK_S):
        before = time.thread_time()
        work(len(times) + 1)
        times.append(time.thread_time() - before)
    return median(times)
