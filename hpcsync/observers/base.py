"""The contract of an observer, and what the loop tells it.

    started -> evaluated? -> (evaluated? -> measured? -> stepped)* -> ended

A step's held-out loss is told before the step itself, so that one row can hold both. ``ended``
comes once, whatever way the run ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What is fixed for the whole run.

    Attributes:
        folder: the run folder, made already.
        host: name of this rank's machine.
        steps: steps of the whole run.
        tokens_per_step: tokens (bytes of byte data, samples of data without tokens) that all
            ranks together train on in one step.
        unit: what a token is: "byte", "token" or "sample".
        val_unit: the unit of the held-out loss: "bits/byte" or "nats".
        codec: as the deck says.
        algorithm: how gradients are summed, as the reducer chose it.
        every_s: seconds between progress lines in a log file.
        run_id: short name that no other run has; in every file, line and metric of this one.
        node: that this rank is on, from 0; ``local_rank`` is its place there.
    """

    folder: Path
    rank: int
    ranks: int
    nodes: int
    host: str
    steps: int
    tokens_per_step: int
    unit: str
    val_unit: str
    codec: str
    algorithm: str
    every_s: float
    run_id: str = ""
    node: int = 0
    local_rank: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step. Losses and times are means over all ranks; times are in ms.

    Attributes:
        step: counted from 1.
        loss: nats a target.
        grad_norm: global norm before clipping; NaN or Inf when the step was skipped for it.
        compute_ms: ``step_ms`` less ``exposed_comm_ms`` and ``wait_ms``.
        comm_ms: from the first byte of the step's gradients to the last.
        exposed_comm_ms: time for which the computation stood still for communication.
        wait_ms: time at the step's end until all ranks had come to it.
        internode_bytes: sent by all ranks over links between nodes.
        skipped: the step was left out because gradients were not finite.
        codec: of the step's gradients; ``none`` where nothing was coded.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    step_ms: float
    compute_ms: float
    comm_ms: float
    exposed_comm_ms: float
    wait_ms: float
    tokens_per_s: float
    internode_bytes: float
    loss_scale: float
    skipped: bool
    codec: str = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelDetail:
    """What this rank's exchange did at one level in a step.

    Attributes:
        level: ``node``, ``rail`` or ``world``.
        codec: that was used there, or ``none``.
        sent_bytes: sent to other nodes, coded if there is a codec.
        plain_bytes: the same before coding; None where nobody counts them.
        busy_s: in which at least one transfer was under way.
        transfers_s: duration of each transfer.
    """

    level: str
    codec: str = "none"
    sent_bytes: float = 0.0
    plain_bytes: float | None = None
    busy_s: float = 0.0
    transfers_s: Sequence[float] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDetail:
    """One step as this rank alone saw it; what was not measured is None.

    Attributes:
        data_s: until its batches were there.
        update_s: of clipping and the optimizer.
        queued: most buckets that were ready and not yet on the way, at once.
        stalls: times that transfers were under way and none moved for a second.
        checkpoint_s: that a checkpoint took, if one was written.
    """

    data_s: float | None = None
    update_s: float | None = None
    queued: int | None = None
    stalls: int | None = None
    checkpoint_s: float | None = None
    levels: Sequence[LevelDetail] = ()


class Observer:
    """Does nothing at each event; a member overrides what it wants."""

    def started(self, info: RunInfo) -> None:
        """The run folder is there and the first step is next."""

    def wants_detail(self) -> bool:
        """Whether ``measured`` is worth its cost on this rank."""
        return False

    def measured(self, detail: StepDetail) -> None:
        """What this rank measured in a step, told before the step itself."""

    def stepped(self, record: StepRecord) -> None:
        """A step is done on every rank."""

    def evaluated(self, step: int, loss: float) -> None:
        """Held-out loss after ``step`` steps, in ``RunInfo.val_unit``."""

    def interrupted(self, signal_name: str) -> None:
        """A signal came; the run may be killed at any moment. Called from another thread."""

    def ended(self, status: str, detail: str) -> None:
        """The run is over: "done", "failed" or "interrupted", and why in one line."""


class Observers(Observer):
    """Tells several observers, in order."""

    def __init__(self, members: Sequence[Observer]) -> None:
        self.members = tuple(members)
        self._over = False

    def join(self, member: Observer) -> None:
        """Tell another one, too, after the others."""
        self.members = (*self.members, member)

    def started(self, info: RunInfo) -> None:
        for member in self.members:
            member.started(info)

    def wants_detail(self) -> bool:
        return any(member.wants_detail() for member in self.members)

    def measured(self, detail: StepDetail) -> None:
        for member in self.members:
            member.measured(detail)

    def stepped(self, record: StepRecord) -> None:
        for member in self.members:
            member.stepped(record)

    def evaluated(self, step: int, loss: float) -> None:
        for member in self.members:
            member.evaluated(step, loss)

    def interrupted(self, signal_name: str) -> None:
        for member in self.members:
            member.interrupted(signal_name)

    def ended(self, status: str, detail: str) -> None:
        """Tell each member once, whatever the others do; the first failure is raised after."""
        if self._over:
            return
        self._over = True
        failure: Exception | None = None
        for member in self.members:
            try:
                member.ended(status, detail)
            except Exception as error:  # a full disk must not keep the terminal from being reset
                failure = failure or error
        if failure is not None:
            raise failure
