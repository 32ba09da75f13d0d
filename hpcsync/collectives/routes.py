"""By which transports gradients in a device's memory go; pure, from the deck and what was found.

node   ranks of one node        cuda_ipc, nccl, mpi_device or mpi_staged
rail   one rank of each node    mpi_device or mpi_staged
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from ..conflicts import NCCL_AND_MPI, of_gpus, of_the_host
from ..errors import UserError
from ..sections import NODE_OF_GPUS, RAIL_OF_GPUS

NODE, RAIL = NODE_OF_GPUS, RAIL_OF_GPUS


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a rank cannot use, and why; an empty text says that it works.

    Attributes:
        cuda_ipc: the node's ranks read each other's device memory.
        mpi_device: MPI takes pointers to device memory.
        nccl: ranks of the node exchange through it.
    """

    cuda_ipc: str = ""
    mpi_device: str = "MPI was not tried on device memory"
    nccl: str = "it is used only where comm.transport.node=nccl asks for it"


def asked(node: str, rail: str) -> list[str]:
    """The transports that may come to be used, so that no other need be tried.

    Args:
        node, rail: ``comm.transport.node`` and ``comm.transport.rail``.
    """
    tried = NODE[:-1] if "auto" in (node, rail) else ()
    return [name for name in NODE if name in tried or name in (node, rail)]


def facts_of(problems: Mapping[str, str]) -> Facts:
    """Facts from the problems of the transports that were tried."""
    names = [each.name for each in fields(Facts)]
    return Facts(**{name: problems[name] for name in names if name in problems})


@dataclass(frozen=True)
class Route:
    """The transport of a level, and why it is not a better one, if so."""

    transport: str
    why: str = ""

    @property
    def described(self) -> str:
        """``mpi_staged (no mpi_device: MPI was not tried on device memory)``."""
        return f"{self.transport} ({self.why})" if self.why else self.transport


@dataclass(frozen=True)
class Routes:
    """Of a rank's two levels."""

    node: Route
    rail: Route


def agreed(every: Iterable[Facts]) -> Facts:
    """What all ranks can use, from what each of them can: the first reason counts."""
    ranks = list(every)
    found = {
        each.name: next((text for rank in ranks if (text := getattr(rank, each.name))), "")
        for each in fields(Facts)
    }
    return Facts(**found)


def choose(node: str, rail: str, facts: Facts) -> Routes:
    """The transports of both levels.

    Args:
        node, rail: ``comm.transport.node`` and ``comm.transport.rail``.

    Raises:
        UserError: the one asked for cannot work; nothing is taken in its place.
    """
    across = _choose("rail", rail, RAIL, facts)
    if node == "nccl" and across.transport == "mpi_device":
        if rail == "mpi_device":
            raise UserError(f"comm.transport.rail: {NCCL_AND_MPI}")
        across = Route("mpi_staged", "nccl and MPI must not work on one GPU at once")
    wanted = NODE[:-1] if node == "auto" else NODE
    return Routes(_choose("node", node, wanted, facts), across)


def check_host(node: str, rail: str) -> None:
    """See that both keys name transports of host memory.

    Raises:
        UserError: one is of devices.
    """
    for level, asked in (("node", node), ("rail", rail)):
        if asked in NODE:
            raise UserError(f"comm.transport.{level}: {of_gpus(level, asked)}")


def _choose(level: str, asked: str, names: Sequence[str], facts: Facts) -> Route:
    key = f"comm.transport.{level}"
    if asked != "auto":
        if asked not in names:
            raise UserError(f"{key}: {of_the_host(level, asked)}")
        if problem := getattr(facts, asked, ""):
            raise UserError(f"{key}: {asked} cannot be used: {problem}; use {key}=auto")
        return Route(asked)
    reasons: list[str] = []
    for name in names:
        if not (problem := getattr(facts, name, "")):
            return Route(name, "; ".join(reasons))
        reasons.append(f"no {name}: {problem}")
    raise AssertionError("mpi_staged always works")
