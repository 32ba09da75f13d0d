"""Where ranks run: the cores that each may use, and the device that it computes on."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from . import cuda_state
from .cuda_state import CudaState
from .errors import DeviceError, LaunchError, UserError
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
        kind: of the device, as torch names it.
    """

    cores: frozenset[int]
    device: str = ""
    kind: str = "cpu"


def own_cores() -> frozenset[int]:
    """Those that this process may use, as far as the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


@dataclass(frozen=True, slots=True)
class Seen:
    """Of one rank, before it chooses a device.

    Attributes:
        gpus: names that no other GPUs have, in the order in which torch counts them; empty for
            those on which nothing may compute.
        problem: why this rank cannot use CUDA; empty if it can.
        note: what is to be told if it does not.
    """

    host: str
    gpus: tuple[str, ...] = ()
    problem: str = ""
    note: str = ""


def choose(
    runtime: Runtime,
    wanted: str,
    *,
    share: bool,
    look: Callable[[], CudaState] = cuda_state.look,
) -> tuple[str, int]:
    """The device that this rank computes on, and which of them; collective.

    All ranks compute on the same kind. Those of a host take a GPU each: the first that it sees and
    no rank before it has, which suits a launcher that shows each rank its own as well as one that
    shows all to all.

    Args:
        wanted: auto, cpu or cuda; auto takes CUDA where all ranks can use it, each its own GPU.
        share: two ranks may compute on the same GPU.

    Raises:
        AgreedError: cuda, and a rank cannot use it; or there are fewer GPUs than ranks and they
            may not be shared. A DeviceError or LaunchError, too.
    """
    if wanted == "cpu":
        return "cpu", 0
    every: list[Seen] = runtime.allgather_object(_seen(runtime.host, wanted, look()))
    problem: UserError | None = None
    note = ""
    if told := next((each for each in every if each.problem), None):
        problem = DeviceError(f"train.device: cuda: {told.host}: {told.problem}")
        note = next((each.note for each in every if each.note), "")
    else:
        try:
            return "cuda", assign(every, share=share)[runtime.rank]
        except LaunchError as error:
            problem = error
            note = f"the GPU is not used: {str(error).removeprefix('devices: ')}"
    if wanted == "cuda":
        runtime.agree(problem)
    elif note and runtime.rank == 0:
        print(f"hpcsync: warning: {note}", file=sys.stderr, flush=True)
    return "cpu", 0


def _seen(host: str, wanted: str, state: CudaState) -> Seen:
    problem = cuda_state.problem(state)
    note = cuda_state.resolve(wanted, state)[1] if wanted == "auto" else ""
    gpus = ("" if gpu.mode == cuda_state.PROHIBITED else gpu.uuid for gpu in state.gpus)
    return Seen(host, tuple(gpus), problem, note)


def assign(every: Sequence[Seen], *, share: bool) -> list[int]:
    """The GPU of each rank, by its place among those that the rank sees.

    Args:
        every: of all ranks; each sees a GPU.
        share: where there are too few, several ranks take the same.

    Raises:
        LaunchError: there are too few, and they may not be shared.
    """
    taken: dict[tuple[str, str], list[int]] = {}
    for rank, seen in enumerate(every):
        if _place(rank, every, taken, set()):
            continue
        if not share:
            alike = [other for other, each in enumerate(every) if each.host == seen.host]
            count = len({gpu for other in alike for gpu in every[other].gpus if gpu})
            raise LaunchError(
                f"devices: {seen.host} has {len(alike)} ranks but {count} "
                f"GPU{'s' if count > 1 else ''} for them: two on one would wait for each other; "
                "start one rank a GPU (slurm/train.sh does), or set topology.share_devices=true "
                "or train.device=cpu"
            )
        free = min(filter(None, seen.gpus), key=lambda gpu: len(taken[seen.host, gpu]))
        taken[seen.host, free].append(rank)
    chosen = {rank: gpu for (_, gpu), ranks in taken.items() for rank in ranks}
    return [seen.gpus.index(chosen[rank]) for rank, seen in enumerate(every)]


def _place(
    rank: int, every: Sequence[Seen], taken: dict[tuple[str, str], list[int]], asked: set[str]
) -> bool:
    """Give a rank a GPU that is free, or that another may leave for one that is free."""
    seen = every[rank]
    gpus = list(filter(None, seen.gpus))
    for gpu in gpus:
        if not taken.get((seen.host, gpu)):
            taken[seen.host, gpu] = [rank]
            return True
    for gpu in gpus:
        if gpu not in asked and len(taken[seen.host, gpu]) == 1:
            asked.add(gpu)
            if _place(taken[seen.host, gpu][0], every, taken, asked):
                taken[seen.host, gpu] = [rank]
                return True
    return False


def here(device: torch.device | None) -> Place:
    """The place of this process, which computes on ``device``: the host's processor if None."""
    if device is None:
        return Place(own_cores())
    # A parameter that was left on meta is told by its name, when gradients are laid out.
    kind = "cpu" if device.type == "meta" else device.type
    return Place(own_cores(), _device_name(device), kind)


def _device_name(device: torch.device) -> str:
    if device.type in ("cpu", "meta"):  # nothing is computed on meta
        return ""
    if device.type == "cuda":
        import torch

        # Not the index: Slurm may show each rank its own device under the same number. Asked of the
        # driver, as where ranks are given their GPUs: it has a name for each part of one (MIG).
        index = torch.cuda.current_device() if device.index is None else device.index
        gpus = cuda_state.visible_gpus()
        return f"GPU {(gpus[index] if gpus else torch.cuda.get_device_properties(index)).uuid}"
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


def check_kinds(kinds: Sequence[str]) -> None:
    """What is exchanged must be on the same kind of device everywhere: each has its own ways.

    Args:
        kinds: of all ranks, as torch names them.

    Raises:
        LaunchError: two ranks' differ.
    """
    other = next((rank for rank, kind in enumerate(kinds) if kind != kinds[0]), 0)
    if other:
        raise LaunchError(
            f"devices: rank 0 computes on {kinds[0]}, but rank {other} on {kinds[other]}, and what "
            "they exchange must be on the same kind of device; move it there on every rank"
        )


def agree_on_places(runtime: Runtime, model: nn.Module, *, share: bool) -> list[Place]:
    """Where all ranks run, each on the device of its model; collective.

    Args:
        share: two ranks may compute on the same device.

    Raises:
        AgreedError: two ranks do, and may not, or their devices are of two kinds; a LaunchError,
            too.
    """
    device = next((p.device for p in model.parameters()), None)
    places: list[Place] = runtime.allgather_object(here(device))
    problem: LaunchError | None = None
    try:
        check_kinds([place.kind for place in places])
        if not share:
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
