"""What the exchange of one backward pass cost this rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..collectives import Collective
from ..device import Event


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


class Comm(Protocol):
    """What is told of an exchange; see ``StepComm``."""

    @property
    def comm_ms(self) -> float: ...

    @property
    def exposed_comm_ms(self) -> float: ...

    @property
    def driven_ms(self) -> float: ...

    @property
    def internode_bytes(self) -> int: ...

    @property
    def bytes(self) -> int: ...


class DeviceComm:
    """The same of an exchange that a device does: times are waited for when they are asked for.

    Args:
        collectives: whose work has been given.
        before, after: of the computation, around its wait for them.
        driven_s: as of ``step_comm``.
    """

    def __init__(
        self, collectives: Sequence[Collective], before: Event, after: Event, driven_s: float
    ) -> None:
        ran = [each for each in collectives if each.nbytes and each.ends]
        self._marks = [pair for each in ran for pair in zip(each.begins, each.ends, strict=True)]
        self._before, self._after = before, after
        self.driven_ms = driven_s * 1e3
        self.internode_bytes = sum(each.internode_bytes for each in ran)
        self.bytes = sum(each.nbytes for each in ran)

    @property
    def comm_ms(self) -> float:
        self._after.synchronize()
        pairs = ((begin.reached_ns(), end.reached_ns()) for begin, end in self._marks)
        return covered(pairs) / 1e6

    @property
    def exposed_comm_ms(self) -> float:
        if not self._marks:
            return 0.0
        self._after.synchronize()
        return (self._after.reached_ns() - self._before.reached_ns()) / 1e6


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The time in which at least one span was under way."""
    busy = end = 0.0
    for start, stop in sorted(spans):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy


def step_comm(
    collectives: Sequence[Collective], waited_s: float, driven_s: float = 0.0
) -> StepComm:
    """The account of a step: ``collectives`` have ended, the backward pass waited ``waited_s`` for
    them, and worked ``driven_s`` for them before."""
    ran = [each for each in collectives if each.nbytes and each.finished_s]
    busy = covered((each.started_s, each.finished_s) for each in ran)
    return StepComm(
        comm_ms=busy * 1e3,
        exposed_comm_ms=waited_s * 1e3 if ran else 0.0,
        driven_ms=driven_s * 1e3 if ran else 0.0,
        internode_bytes=sum(each.internode_bytes for each in ran),
        bytes=sum(each.nbytes for each in ran),
    )
