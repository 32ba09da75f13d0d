"""Where ranks run: the cores that each may use, and the device that it computes on."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from .errors import LaunchError
from .topology import Topology
from .wording import ranges

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .runtime import Runtime

_RANKS_SHOWN = 4
_NODES_SHOWN = 2


@dataclass(frozen=True, slots=True)
class Place:
    """Of one rank.

    Attributes:
        cores: that it may use, by the system's numbers.
        device: a name that no other device of the job has; empty for the host's processor.
    """

    cores: frozenset[int]
    device: str = ""


def own_cores() -> frozenset[int]:
    """Those that this process may use, as far as the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def here(device: torch.device | None) -> Place:
    """The place of this process, which computes on ``device``: the host's processor if None."""
    return Place(own_cores(), _device_name(device) if device is not None else "")


def _device_name(device: torch.device) -> str:
    if device.type in ("cpu", "meta"):  # nothing is computed on meta
        return ""
    if device.type == "cuda":
        import torch

        # Not the index: Slurm may show each rank its own device under the same number.
        return f"GPU {torch.cuda.get_device_properties(device).uuid}"
    return f"{device} of {socket.gethostname()}"


def check_devices(places: Sequence[Place]) -> None:
    """No device may be given to two ranks.

    Args:
        places: of all ranks.

    Raises:
        LaunchError: two ranks compute on the same device.
    """
    ranks_on: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        if place.device:
            ranks_on.setdefault(place.device, []).append(rank)
    doubled = {device: ranks for device, ranks in ranks_on.items() if len(ranks) > 1}
    if not doubled:
        return
    device, ranks = next(iter(doubled.items()))
    more = f", and {len(doubled) - 1} more such" if len(doubled) > 1 else ""
    raise LaunchError(
        f"devices: ranks {ranges(ranks)} share {device}{more}: they would wait for each other; "
        "start one rank a GPU (slurm/train.sh does), and have each choose its own by its local "
        "rank; topology.share_devices=true allows it"
    )


def agree_on_places(runtime: Runtime, model: nn.Module, *, share: bool) -> list[Place]:
    """Where all ranks run, each on the device of its model; collective.

    Args:
        share: two ranks may compute on the same device.

    Raises:
        AgreedError: two ranks do, and may not; a LaunchError, too.
    """
    device = next((p.device for p in model.parameters()), None)
    places = runtime.allgather_object(here(device))
    problem: LaunchError | None = None
    if not share:
        try:
            check_devices(places)
        except LaunchError as error:
            problem = error
    runtime.agree(problem)
    return places


def describe(places: Sequence[Place], topology: Topology) -> str:
    """One line: the cores of each rank, node by node, those of equal nodes once.

    ``0-7 | 8-15 on each of 4 nodes``: two ranks a node, bound to eight cores each.
    """
    texts = [_node([places[rank].cores for rank in ranks]) for ranks in topology.nodes]
    runs = [len(list(run)) for _, run in groupby(texts)]
    if len(runs) == 1:
        count = topology.node_count
        return texts[0] if count == 1 else f"{texts[0]} on each of {count} nodes"
    named = [f"{name}: {text}" for name, text in zip(topology.names, texts, strict=True)]
    more = len(named) - _NODES_SHOWN
    if more > 1:
        named[_NODES_SHOWN:] = [f"{more} more nodes"]
    return "; ".join(named)


def _node(cores: Sequence[frozenset[int]]) -> str:
    together: frozenset[int] = frozenset().union(*cores)
    if len(cores) > 1 and len(set(cores)) == 1:
        return f"not bound: {len(cores)} ranks on {_words(together)}"
    shown = [ranges(sorted(each)) for each in cores]
    more = len(shown) - _RANKS_SHOWN
    if more > 1:
        shown[_RANKS_SHOWN - 1 : -1] = [f"... {more} more ..."]
    text = f"cores {' | '.join(shown)}" if len(cores) > 1 else _words(together)
    overlap = sum(map(len, cores)) > len(together)
    return f"{text}, which overlap" if overlap else text


def _words(cores: frozenset[int]) -> str:
    return f"{'core' if len(cores) == 1 else 'cores'} {ranges(sorted(cores))}"
