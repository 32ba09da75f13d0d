"""What a run would send and what its ranks would hold, by its deck and the sizes of its model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from . import banner, codecs
from .codecs.base import SENDER
from .collectives import choice
from .collectives.coding import settings_of
from .config import Config
from .device import dtype_of
from .exchange import Way, exchanges, scratch
from .footprint import Sizes
from .gradients.compression import check, codable
from .gradients.plan import BucketPlan, arena_bytes, plan_buckets
from .topology import Topology
from .transports.cuda_ipc import copies

_MIB = 1 << 20
_PROBE = 1 << 16  # elements of a piece whose sizes stand for all
_WORKSPACE = 32 * _MIB  # that torch gives to cuBLAS on the largest GPUs


def plan(config: Config, sizes: Sizes) -> tuple[BucketPlan, ...]:
    """The buckets of the first step."""
    compress = config.compress
    coded = compress.codec not in ("none", "auto")
    return plan_buckets(
        [replace(each, coded=coded and codable(compress, each)) for each in sizes.parameters],
        range(len(sizes.parameters) - 1, -1, -1),
        int(config.comm.bucket_mb * _MIB),
        int(config.comm.first_bucket_mb * _MIB),
    )


def ways(
    config: Config, sizes: Sizes, topology: Topology, plans: Sequence[BucketPlan]
) -> Counter[Way]:
    """``exchanges`` of these buckets, coded or not."""
    found = ratios(config, sizes, topology, plans)
    return exchanges(config.comm, topology, plans, found, config.compress.where)


def ratios(
    config: Config, sizes: Sizes, topology: Topology, plans: Sequence[BucketPlan]
) -> list[float]:
    """For each bucket, bytes of its coded part over those in float32."""
    if not any(plan.coded_numel for plan in plans):
        return [1.0] * len(plans)
    codec = codecs.build(config.compress.codec, settings_of(config.compress, config.run.seed))
    problem = check(codec, config.compress, sizes.parameters)
    if problem is not None:
        raise problem
    ranks = topology.size if config.compress.where == "all" else topology.node_count
    return [_ratio(codec, plan, sizes, ranks) for plan in plans]


def _ratio(codec: codecs.Codec, plan: BucketPlan, sizes: Sizes, ranks: int) -> float:
    count = plan.coded_numel
    if not count:
        return 1.0
    if isinstance(codec, codecs.PieceCodec):
        return codec.expected(count) / (4 * count)
    assert isinstance(codec, codecs.SumCodec)
    matrices = [
        codecs.Matrix(start, sizes.parameters[index].shape)
        for index, start in zip(plan.params, plan.offsets, strict=True)
        if start < count
    ]
    forms = codec.forms(count, matrices, max(ranks, 2))
    return sum(form.count * dtype_of(form.dtype).itemsize for form in forms) / (4 * count)


def memory_parts(
    config: Config,
    sizes: Sizes,
    topology: Topology,
    micro: int,
    parts: Counter[Way],
    *,
    device: bool,
) -> list[tuple[str, float, str]]:
    """What a rank's memory holds at most: name, bytes and what they are.

    Args:
        parts: as of ``exchanges``.
        device: that of its GPU, not of the host.
    """
    gradients = arena_bytes(sizes.parameters)
    largest = max((p.numel * p.itemsize for p in sizes.parameters), default=0)
    # Two moments of the parameter's own type, and a float32 step count each.
    optimizer = sum(2 * p.numel * p.itemsize + 4 for p in sizes.parameters)
    received = scratch(config.comm, topology, parts, device=device)
    held, pieces = _coding_bytes(config, sizes, topology)
    neighbours = max(len(ranks) for ranks in topology.nodes)
    reads = device and neighbours > 1 and config.comm.node_transport in ("auto", "cuda_ipc")
    found: list[tuple[str, float, str]] = [
        ("weights", sizes.counts.nbytes, "with buffers"),
        ("gradients", gradients, "the buckets themselves"),
        ("fresh", largest, "the largest gradient before it is in its bucket"),
        ("optimizer", optimizer, "AdamW's two moments"),
        ("messages", received, "where gradients of other ranks come in"),
        ("errors", held, "what coding lost, for the next step"),
        ("coded", pieces, "coded parts on their way"),
        ("copies", copies(gradients, neighbours) if reads else 0, "of small gradients, to be read"),
        ("workspace", _WORKSPACE if device else 0, "of cuBLAS, at most"),
    ]
    if sizes.activations is not None:
        found.append(
            ("activations", sizes.activations, f"of {banner.count(micro, 'sample')}, an estimate")
        )
    return found


def _coding_bytes(config: Config, sizes: Sizes, topology: Topology) -> tuple[float, float]:
    """Bytes of a rank's stores, and of the coded parts that it makes and takes, at most."""
    compress = config.compress
    count: float = sum(plan.coded_numel for plan in plan(config, sizes))
    if not count or not choice.codes(compress.where, topology):
        return 0.0, 0.0
    if compress.where == "rail":  # the ranks of a node code a share of its sum each
        count /= min(len(ranks) for ranks in topology.nodes)
    codec = codecs.build(compress.codec, settings_of(compress, config.run.seed))
    if not isinstance(codec, codecs.PieceCodec):
        return 4 * count * compress.error_feedback, 0.0
    store = codec.store(_PROBE, SENDER)
    held = store.nbytes / _PROBE if store else 0.0
    # Given to the owners, given to this one, and means: each as much as the region.
    return held * count, 3 * codec.capacity(_PROBE) / _PROBE * count
