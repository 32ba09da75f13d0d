"""``--dry-run``: what a run would be, told on a login node without MPI."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import banner, data
from . import config as configs
from .collectives import choice
from .config import Config
from .data import Source
from .device import dtype_of
from .errors import DataError, LaunchError, ModelError
from .exchange import Traffic, Way, traffic
from .footprint import Sizes, measure
from .forecast import memory_parts, plan, ways
from .gradients.plan import BucketPlan, arena_bytes
from .topology import Topology

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
    parts = ways(config, sizes, topology, plans)
    rows = [
        ("dry run", "nothing is trained, and nothing but text is written"),
        ("ranks", topology.describe() + assumed),
        ("nodes", banner.nodes(topology)),
        ("devices", _devices(config)),
        ("exchange", _names(parts)),
        ("codec", banner.codec(config, topology)),
        ("buckets", _buckets(plans)),
        ("model", _model(config, sizes)),
        ("data", told),
        banner.batch_row(config, ranks, source.tokens_per_sample, source.unit),
        banner.training_row(config),
        ("memory", _memory(config, sizes, topology, micro, parts)),
        ("bytes", _bytes(traffic(topology, parts), topology)),
    ]
    return banner.render(rows)


def _devices(config: Config) -> str:
    if config.train.device == "cuda":
        return "cuda: a GPU for each rank"
    if config.train.device == "cpu":
        return "cpu"
    return "cpu; or GPUs where every rank has one: train.device=cuda tells what these need"


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


def _names(parts: Counter[Way]) -> str:
    """What does the most first."""
    names = [
        (f"{name} ({rail} along the rails)" if rail else name) + (", coded" if ratio != 1 else "")
        for (name, rail, ratio), _ in parts.most_common()
    ]
    return " and ".join(dict.fromkeys(names))


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


def _memory(
    config: Config, sizes: Sizes, topology: Topology, micro: int, ways: Counter[Way]
) -> str:
    """A rank's memory, part by part."""
    device = config.train.device == "cuda"
    parts = memory_parts(config, sizes, topology, micro, ways, device=device)
    total = sum(nbytes for _, nbytes, _ in parts)
    lines = [
        f"{name:<11}  {banner.size(nbytes):>10}  {note}" for name, nbytes, note in parts if nbytes
    ]
    if sizes.activations is None:
        lines.append("activations  not counted: the model does not run without values")
    rest = "and CUDA's own, about 0.5 GiB" if device else "and Python, torch, MPI and data"
    lines.append(f"{'a GPU' if device else 'a rank':<11}  {banner.size(total):>10}  {rest}")
    most = max(len(ranks) for ranks in topology.nodes)
    if most > 1 and not device:
        shared = f"{banner.size(arena_bytes(sizes.parameters) * most)} of it in /dev/shm"
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
