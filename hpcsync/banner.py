"""What a run consists of, on one screen: pure text from facts gathered elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import __version__
from .config import Config
from .topology import Topology
from .wording import ranges

_NODES_SHOWN = 4
_NOBODY = "none: one rank has nobody to exchange with"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a job found when it started.

    Attributes:
        mpi: name with version, and path, of the MPI library.
        threads: thread level that MPI gave.
        devices: what computes, in words.
        transports: level -> transport.
        tried: when it was found out what the device can do, in words; empty if that is certain.
        buckets: the plan of buckets, in words.
        algorithm: how gradients are summed.
    """

    mpi: tuple[str, str]
    threads: str
    devices: str
    transports: Mapping[str, str]
    buckets: str
    algorithm: str
    tried: str = ""


def render(rows: Sequence[tuple[str, str]]) -> str:
    """Lines of a name and a text each, texts aligned; a text may have several lines."""
    width = max(len(name) for name, _ in rows)
    lines = [f"hpcsync {__version__}"]
    for name, text in rows:
        first, *rest = text.splitlines() or [""]
        lines.append(f"  {name:<{width}}  {first}")
        lines += [f"  {'':<{width}}  {line}" for line in rest]
    return "\n".join(lines)


def machine_rows(topology: Topology, machine: Machine, config: Config) -> list[tuple[str, str]]:
    """Rows about ranks, MPI, devices and the exchange of gradients."""
    name, path = machine.mpi
    levels = ", ".join(f"{level} by {way}" for level, way in machine.transports.items())
    when = "during the backward pass" if config.comm.overlap else "after the backward pass"
    return [
        ("ranks", topology.describe()),
        ("nodes", nodes(topology)),
        ("MPI", f"{name}, {machine.threads}\n{path}"),
        ("devices", machine.devices),
        ("transports", "\n".join(filter(None, (levels or _NOBODY, machine.tried)))),
        ("exchange", f"{machine.algorithm}, {when}"),
        ("codec", codec(config, topology)),
        ("buckets", machine.buckets),
    ]


def codec(config: Config, topology: Topology) -> str:
    """What is coded, where and from when on."""
    compress = config.compress
    if compress.codec == "none":
        return "none"
    name = compress.codec
    if name == "auto":
        name = f"auto, of {', '.join(compress.allow)}"
    if compress.where == "rail" and topology.node_count == 1:
        return (
            f"{name}, between nodes: there is one, so nothing is coded; compress.where=all codes "
            "between all ranks"
        )
    text = f"{name}, between {'all ranks' if compress.where == 'all' else 'nodes'}"
    if compress.warmup:
        text += f", from step {compress.warmup + 1} on"
    return text if compress.error_feedback else text + ", without error feedback"


def nodes(topology: Topology) -> str:
    """Node names with their ranks, the first few of them."""
    parts = [
        f"{name} ({ranges(ranks)})"
        for name, ranks in zip(topology.names, topology.nodes, strict=True)
    ]
    more = len(parts) - _NODES_SHOWN
    if more > 1:
        parts[_NODES_SHOWN - 1 : -1] = [f"... {more} more ..."]
    return ", ".join(parts)


def batch_row(config: Config, ranks: int, tokens_per_sample: int, unit: str) -> tuple[str, str]:
    """The arithmetic of a step, in words."""
    train = config.train
    micro = train.global_batch // (ranks * train.accumulate)
    text = (
        f"{count(train.global_batch, 'sample')} a step = {count(ranks, 'rank')} x "
        f"{count(train.accumulate, 'micro-batch')} x {count(micro, 'sample')}"
    )
    if unit != "sample":
        text += f"; {train.global_batch * tokens_per_sample:,} {unit}s"
    return "batch", text


def training_row(config: Config) -> tuple[str, str]:
    """Steps, learning rate and precision."""
    train = config.train
    optimizer = "AdamW" if train.optimizer == "adamw" else "1-bit Adam"
    text = f"{count(train.steps, 'step')}, {optimizer}, lr {train.lr:g}, {train.precision}"
    extras = {
        f"loss scale {train.loss_scale}": train.loss_scale != "none",
        "activation checkpointing": train.activation_checkpointing,
        "torch.compile": train.compile,
    }
    return "training", ", ".join([text, *(word for word, on in extras.items() if on)])


def count(number: int, noun: str) -> str:
    """``1 rank``, ``2 ranks``, ``2 micro-batches``."""
    ending = "" if number == 1 else "es" if noun.endswith("ch") else "s"
    return f"{number:,} {noun}{ending}"


def size(nbytes: float) -> str:
    """Bytes with a binary unit: ``25.0 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            break
        nbytes /= 1024
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"


def parameters(total: int) -> str:
    """``1.9 million``: a number of parameters for people."""
    for limit, word in ((10**9, "billion"), (10**6, "million")):
        if total >= limit:
            return f"{total / limit:.3g} {word}"
    return f"{total:,}"
