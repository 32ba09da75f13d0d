"""``--dry-run``: what a run would be, told on a login node without MPI.

The model is built from fake tensors, which have shapes and no memory, and run forward once to
see what it keeps for the backward pass; so a model of any size is described by any laptop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from . import banner, data, models, schedules
from . import config as configs
from .config import CommConfig, Config
from .data import Source
from .errors import DataError, LaunchError, ModelError
from .gradients.plan import BucketPlan, Parameter, plan_buckets
from .schedules.base import Kind, Schedule
from .schedules.hierarchical import compose
from .topology import Topology

_MIB = 1 << 20


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes that are sent in a step: by the busiest rank of a node, and over the node's link."""

    rank_near: float
    rank_far: float
    node_far: float


def report(config: Config, ranks: int, nodes: int = 0) -> str:
    """The whole text.

    Args:
        ranks: to assume.
        nodes: to spread them over, evenly; 0 to go by ``topology.ranks_per_node``.

    Raises:
        UserError: the batch does not divide over the ranks, the nodes are more than the ranks,
            or the model cannot be built.
    """
    micro = configs.micro_batch(config, ranks)
    topology = assume_topology(config, ranks, nodes)
    source, told = _source(config)
    sizes = measure(config, source, micro)
    plans = plan_buckets(
        sizes.parameters,
        range(len(sizes.parameters) - 1, -1, -1),
        int(config.comm.bucket_mb * _MIB),
        int(config.comm.first_bucket_mb * _MIB),
    )
    algorithm, rail = algorithms(config.comm, topology)
    name = f"{algorithm} ({rail} along the rails)" if algorithm == "hierarchical" else algorithm
    rows = [
        ("dry run", "nothing is trained, and nothing but text is written"),
        ("ranks", topology.describe()),
        ("nodes", banner.nodes(topology)),
        ("exchange", f"{name}; codec {config.compress.codec}"),
        ("buckets", _buckets(plans)),
        ("model", _model(config, sizes)),
        ("data", told),
        banner.batch_row(config, ranks, source.tokens_per_sample, source.unit),
        banner.training_row(config),
        ("memory", _memory(sizes, plans, topology, micro, config.comm.node_transport)),
        ("bytes", _bytes(traffic(topology, algorithm, rail, _total(plans)), topology)),
    ]
    return banner.render(rows)


def assume_topology(config: Config, ranks: int, nodes: int) -> Topology:
    """Ranks on nodes as a launcher would place them, block by block."""
    per_node = config.topology.ranks_per_node
    if nodes > ranks:
        raise LaunchError(f"--nodes: {nodes} nodes for {ranks} ranks leaves some empty")
    if nodes:
        hosts = [f"node{rank * nodes // ranks}" for rank in range(ranks)]
    elif per_node:
        return Topology.group([f"node{rank // per_node}" for rank in range(ranks)])
    else:
        hosts = ["node0"] * ranks
    return Topology.group(hosts, per_node)


def measure(config: Config, source: Source, micro: int) -> Sizes:
    """Build the model without memory and see what it holds.

    Raises:
        ModelError: it cannot be built.
    """
    with FakeTensorMode():
        model = models.build(config.model, source)
        if config.train.activation_checkpointing:
            models.checkpoint_activations(model)
        parameters = tuple(
            Parameter(name, p.numel(), str(p.dtype).removeprefix("torch."), p.itemsize)
            for name, p in model.named_parameters()
            if p.requires_grad
        )
        return Sizes(
            counts=models.parameter_counts(model),
            parameters=parameters,
            activations=_activations(model, config, source, micro),
        )


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


def _source(config: Config) -> tuple[Source, str]:
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


def algorithms(comm: CommConfig, topology: Topology) -> tuple[str, str]:
    """What ``auto`` stands for, over all and along the rails; as ``Collectives`` chooses."""
    several = topology.node_count > 1
    if comm.reproducible:
        return "direct", "direct"
    name = comm.algorithm
    if name in ("auto", "hierarchical"):
        name = "hierarchical" if several else "direct"
    rail = comm.rail_algorithm
    if rail == "auto":
        rail = "direct" if topology.node_count <= 8 else "halving"
    return name, rail


def traffic(topology: Topology, algorithm: str, rail: str, nbytes: float) -> Traffic:
    """Bytes a step of ``nbytes`` of gradients, from the schedules of the first node's ranks."""
    pairs = [_sent(topology, rank, algorithm, rail, nbytes) for rank in topology.nodes[0]]
    return Traffic(
        rank_near=max(near for near, _ in pairs),
        rank_far=max(far for _, far in pairs),
        node_far=sum(far for _, far in pairs),
    )


def _sent(
    topology: Topology, rank: int, algorithm: str, rail: str, nbytes: float
) -> tuple[float, float]:
    """Bytes that a rank sends within its node, and to other nodes."""
    if algorithm != "hierarchical":
        every = tuple(range(topology.size))
        schedule = schedules.build(algorithm, Kind.ALLREDUCE, rank, topology.size)
        return _moved(topology, rank, every, schedule, nbytes)
    near = far = 0.0
    native = rail == "native"
    for level in compose(topology.nodes, rank, rail="ring" if native else rail):
        size = nbytes if level.name == "node" else nbytes / topology.rails
        inside, outside = _moved(topology, rank, level.group, level.schedule, size)
        near, far = near + inside, far + outside
    return near, far


def _moved(
    topology: Topology, rank: int, group: Sequence[int], schedule: Schedule, nbytes: float
) -> tuple[float, float]:
    if schedule.name == "native":  # MPI does not tell; what a ring would send
        moved = 2 * nbytes * (len(group) - 1) / len(group)
        return (0.0, moved) if topology.node_count > 1 else (moved, 0.0)
    near = far = 0.0
    for step in schedule.steps:
        for move in step.sends:
            part = nbytes * (move.hi - move.lo) / schedule.chunks
            if topology.node_of(group[move.peer]) == topology.node_of(rank):
                near += part
            else:
                far += part
    return near, far


def _total(plans: Sequence[BucketPlan]) -> int:
    return sum(plan.nbytes for plan in plans)


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


def _memory(
    sizes: Sizes, plans: Sequence[BucketPlan], topology: Topology, micro: int, transport: str
) -> str:
    """A rank's memory, part by part."""
    gradients = _total(plans)
    # Two moments of the parameter's own type, and a float32 step count each.
    optimizer = sum(2 * p.numel * p.itemsize + 4 for p in sizes.parameters)
    parts = [
        ("weights", sizes.counts.nbytes, "with buffers"),
        ("gradients", gradients, "the buckets themselves"),
        ("optimizer", optimizer, "AdamW's two moments"),
    ]
    if sizes.activations is not None:
        parts.append(
            ("activations", sizes.activations, f"of {banner.count(micro, 'sample')}, an estimate")
        )
    total = sum(nbytes for _, nbytes, _ in parts)
    lines = [f"{name:<11}  {banner.size(nbytes):>10}  {note}" for name, nbytes, note in parts]
    if sizes.activations is None:
        lines.append("activations  not counted: the model does not run without values")
    lines.append(f"{'a rank':<11}  {banner.size(total):>10}  and Python, torch, MPI and data")
    most = max(len(ranks) for ranks in topology.nodes)
    if most > 1:
        shared = f"{banner.size(gradients * most)} of it in /dev/shm"
        note = shared if transport != "mpi_host" else ""
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
