"""What the exchange of one backward pass cost this rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..collectives import Collective


@dataclass(frozen=True)
class StepComm:
    """Communication of one backward pass on this rank.

    Attributes:
        comm_ms: time in which at least one bucket was being exchanged.
        exposed_comm_ms: time that the end of the backward pass waited for it.
        driven_ms: time that the computing thread spent on it before, between gradients.
        internode_bytes: sent by this rank to other nodes.
        bytes: of gradients, once.
    """

    comm_ms: float = 0.0
    exposed_comm_ms: float = 0.0
    driven_ms: float = 0.0
    internode_bytes: int = 0
    bytes: int = 0


def step_comm(
    collectives: Sequence[Collective], waited_s: float, driven_s: float = 0.0
) -> StepComm:
    """The account of a step: ``collectives`` have ended, the backward pass waited ``waited_s`` for
    them, and worked ``driven_s`` for them before."""
    ran = [each for each in collectives if each.nbytes and each.finished_s]
    busy = end = 0.0
    for start, stop in sorted((each.started_s, each.finished_s) for each in ran):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return StepComm(
        comm_ms=busy * 1e3,
        exposed_comm_ms=waited_s * 1e3 if ran else 0.0,
        driven_ms=driven_s * 1e3 if ran else 0.0,
        internode_bytes=sum(each.internode_bytes for each in ran),
        bytes=sum(each.nbytes for each in ran),
    )
