"""``--dry-run``: what a run would be, told on a login node without MPI.

The model is built from fake tensors, which have shapes and no memory, and run forward once to
see what it keeps for the backward pass; so a model of any size is described by any laptop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from . import banner, codecs, data, models, weights
from . import config as configs
from .collectives import choice
from .collectives.coding import settings_of
from .config import Config
from .data import Source
from .device import dtype_of
from .errors import DataError, LaunchError, ModelError
from .exchange import Traffic, Way, exchanges, scratch, traffic
from .gradients.compression import check, codable
from .gradients.plan import BucketPlan, Parameter, arena_bytes, plan_buckets
from .topology import Topology

_MIB = 1 << 20
# More ranks than this are not taken to be on one node, but on nodes of so many.
_ONE_NODE, _USUAL_NODE = 64, 8


@dataclass(frozen=True, slots=True)
class AssumedSource:
    """Shapes of data that is not to be had here."""

    vocab: int
    classes: int
    sample_shape: tuple[int, ...]
    unit: str
    tokens_per_sample: int
    train_size: int = 0
    val_size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a model weighs.

    Attributes:
        counts: elements, and bytes of weights and buffers.
        parameters: those that take gradients, in order of registration.
        activations: bytes kept for the backward pass of one micro-batch; None if the model
            could not be run on fake tensors.
    """

    counts: models.ParameterCounts
    parameters: tuple[Parameter, ...]
    activations: int | None


def report(config: Config, ranks: int, nodes: int = 0) -> str:
    """The whole text.

    Args:
        ranks: to assume.
        nodes: to spread them over, evenly; 0 to go by ``topology.ranks_per_node``, and without
            that to take up to 64 ranks to be on one node, and more on nodes of 8.

    Raises:
        UserError: the batch does not divide over the ranks, the nodes are more than the ranks,
            or the model cannot be built.
    """
    micro = configs.micro_batch(config, ranks)
    topology = assume_topology(config, ranks, nodes)
    assumed = "" if nodes or config.topology.ranks_per_node else _assumed(topology)
    source, told = find_data(config)
    sizes = measure(config, source, micro)
    plans = plan(config, sizes)
    where = config.compress.where
    parts = exchanges(config.comm, topology, plans, _ratios(config, sizes, topology, plans), where)
    rows = [
        ("dry run", "nothing is trained, and nothing but text is written"),
        ("ranks", topology.describe() + assumed),
        ("nodes", banner.nodes(topology)),
        ("devices", "cpu: this version computes on CPUs only"),
        ("exchange", _names(parts)),
        ("codec", banner.codec(config, topology)),
        ("buckets", _buckets(plans)),
        ("model", _model(config, sizes)),
        ("data", told),
        banner.batch_row(config, ranks, source.tokens_per_sample, source.unit),
        banner.training_row(config),
        ("memory", _memory(config, sizes, topology, micro, scratch(config.comm, topology, parts))),
        ("bytes", _bytes(traffic(topology, parts), topology)),
    ]
    return banner.render(rows)


def assume_topology(config: Config, ranks: int, nodes: int) -> Topology:
    """Ranks on nodes as a launcher would place them, block by block."""
    per_node = config.topology.ranks_per_node
    if not nodes and not per_node and ranks > _ONE_NODE:
        nodes = -(-ranks // _USUAL_NODE)
    if nodes > ranks:
        raise LaunchError(f"--nodes: {nodes} nodes for {ranks} ranks leaves some empty")
    if nodes:
        hosts = [f"node{rank * nodes // ranks}" for rank in range(ranks)]
    elif per_node:
        return Topology.group([f"node{rank // per_node}" for rank in range(ranks)])
    else:
        hosts = ["node0"] * ranks
    return Topology.group(hosts, per_node)


def _assumed(topology: Topology) -> str:
    if topology.node_count == 1:
        return ""
    most = max(len(ranks) for ranks in topology.nodes)
    return (
        f"\n{topology.size:,} ranks assumed on {topology.node_count:,} nodes of {most}; give "
        "--nodes to say otherwise"
    )


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


def _ratios(
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


def _names(parts: Counter[Way]) -> str:
    """What does the most first."""
    names = [
        (f"{name} ({rail} along the rails)" if rail else name) + (", coded" if ratio != 1 else "")
        for (name, rail, ratio), _ in parts.most_common()
    ]
    return " and ".join(dict.fromkeys(names))


def measure(config: Config, source: Source, micro: int) -> Sizes:
    """Build the model without memory and see what it holds.

    Raises:
        ModelError: it cannot be built, or the weights of ``model.init_from`` are not its.
    """
    with FakeTensorMode():
        model = models.build(config.model, source)
        if config.train.activation_checkpointing:
            models.checkpoint_activations(model)
        parameters = tuple(
            Parameter(
                name,
                p.numel(),
                str(p.dtype).removeprefix("torch."),
                p.itemsize,
                tuple(p.shape),
            )
            for name, p in model.named_parameters()
            if p.requires_grad
        )
        sizes = Sizes(
            counts=models.parameter_counts(model),
            parameters=parameters,
            activations=_activations(model, config, source, micro),
        )
    if given := config.model.init_from:
        weights.fits(model, given, strict=config.model.init_strict)
    return sizes


def _activations(model: nn.Module, config: Config, source: Source, micro: int) -> int | None:
    """Bytes of what autograd saves in a forward pass, each piece of memory once.

    With activation checkpointing: the inputs of the blocks and what lies outside them; the one
    block that is computed again at a time comes on top.
    """
    inputs, targets = _sample(source, micro)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    if config.train.activation_checkpointing:
        for block in model.blocks():  # type: ignore[operator]
            block.register_forward_pre_hook(
                lambda _, given: [keep(each) for each in given] and None
            )
    half = config.train.precision == "bf16"
    try:
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
        ):
            model(inputs, targets)
    except Exception:  # a user's model may look at values, which fake tensors have not
        return None
    return sum(int(storage.nbytes()) for storage in kept.values())


def _sample(source: Source, micro: int) -> tuple[Tensor, Tensor]:
    shape = (micro, *source.sample_shape)
    if source.vocab:
        return torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    return torch.zeros(shape), torch.zeros(micro, dtype=torch.int64)


def find_data(config: Config) -> tuple[Source, str]:
    """The data, or its shapes where it is not to be had on this machine."""
    try:
        source = data.build(config)
    except DataError as error:
        assumed: Any
        if config.data.name == "digits":
            assumed = AssumedSource(0, 10, (1, 8, 8), "sample", 1)
        else:
            context = config.model.context
            assumed = AssumedSource(256, 256, (context,), "byte", context)
        return assumed, f"NOT FOUND HERE, its shapes are assumed\n{error}"
    return source, data.describe(source)


def _buckets(plans: Sequence[BucketPlan]) -> str:
    if not plans:
        raise ModelError("model: no parameter takes a gradient, so there is nothing to train")
    sizes = [plan.nbytes for plan in plans]
    lines = [
        f"{banner.count(len(plans), 'bucket')}, {banner.size(sum(sizes))} in all, "
        f"{banner.size(min(sizes))} to {banner.size(max(sizes))}"
    ]
    if len(plans) <= 8:
        lines += [
            f"{plan.index}: {banner.size(plan.nbytes)} {plan.dtype}, "
            f"{banner.count(len(plan.params), 'parameter')}"
            for plan in plans
        ]
    return "\n".join(lines)


def _model(config: Config, sizes: Sizes) -> str:
    total, trained = sizes.counts.total, sizes.counts.trainable
    part = f", {banner.parameters(trained)} of them trained" if trained != total else ""
    return f"{config.model.name}, {banner.parameters(total)} parameters{part}"


def _memory(config: Config, sizes: Sizes, topology: Topology, micro: int, received: float) -> str:
    """A rank's memory, part by part."""
    gradients = arena_bytes(sizes.parameters)
    largest = max((p.numel * p.itemsize for p in sizes.parameters), default=0)
    # Two moments of the parameter's own type, and a float32 step count each.
    optimizer = sum(2 * p.numel * p.itemsize + 4 for p in sizes.parameters)
    parts: list[tuple[str, float, str]] = [
        ("weights", sizes.counts.nbytes, "with buffers"),
        ("gradients", gradients, "the buckets themselves"),
        ("fresh", largest, "the largest gradient before it is in its bucket"),
        ("optimizer", optimizer, "AdamW's two moments"),
        ("messages", received, "where gradients of other ranks come in"),
    ]
    if sizes.activations is not None:
        parts.append(
            ("activations", sizes.activations, f"of {banner.count(micro, 'sample')}, an estimate")
        )
    total = sum(nbytes for _, nbytes, _ in parts)
    lines = [
        f"{name:<11}  {banner.size(nbytes):>10}  {note}" for name, nbytes, note in parts if nbytes
    ]
    if sizes.activations is None:
        lines.append("activations  not counted: the model does not run without values")
    lines.append(f"{'a rank':<11}  {banner.size(total):>10}  and Python, torch, MPI and data")
    most = max(len(ranks) for ranks in topology.nodes)
    if most > 1:
        shared = f"{banner.size(gradients * most)} of it in /dev/shm"
        by_levels = any(
            choice.by_levels(config.comm, topology, dtype_of(p.dtype)) for p in sizes.parameters
        )
        note = shared if by_levels and config.comm.node_transport != "mpi_host" else ""
        lines.append(f"{'a node':<11}  {banner.size(total * most):>10}  {note}".rstrip())
    return "\n".join(lines)


def _bytes(moved: Traffic, topology: Topology) -> str:
    """Bytes a step by level."""
    if topology.size == 1:
        return "none: one rank has nobody to exchange with"
    lines = []
    if len(topology.nodes[0]) > 1:
        lines.append(f"in a node      {banner.size(moved.rank_near):>10} sent a rank and step")
    if topology.node_count > 1:
        lines.append(f"between nodes  {banner.size(moved.rank_far):>10} sent a rank and step")
        lines.append(f"{'':<13}  {banner.size(moved.node_far):>10} over a node's link each way")
    return "\n".join(lines)
