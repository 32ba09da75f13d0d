"""The contract of an observer, and what the loop tells it.

    started -> evaluated? -> (checkpointed* -> evaluated? -> measured? -> stepped)* -> ended

A step's held-out loss is told before the step itself, so that one row can hold both. ``ended``
comes once, whatever way the run ends.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
        first_step: the step that a resumed run goes on from, else 0.
        checkpoint_step: of the checkpoint that it has taken up; later steps were replayed.
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
    first_step: int = 0
    checkpoint_step: int | None = None
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
        checkpoint_ms: at the step's beginning, for which it stood still for checkpoints.
        checkpoints_failed: that were not saved, since the start of the process.
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
    checkpoint_ms: float = 0.0
    checkpoints_failed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord:
    """What became of a checkpoint.

    Attributes:
        step: that it was taken after.
        problem: why it was not saved, if so: one line.
        nbytes: that this rank wrote.
        stall_s: for which training stood still on this rank.
        durable_s: from the snapshot until it was known to be whole on disk.
    """

    step: int
    problem: str = ""
    nbytes: int = 0
    stall_s: float = 0.0
    durable_s: float = 0.0


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
        checkpoint_s: that copying the state for a checkpoint took, if one was taken.
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

    def checkpointed(self, record: CheckpointRecord) -> None:
        """A checkpoint is whole, or was not saved."""

    def state(self) -> dict[str, Any]:
        """What a resumed run's observer of this kind should know; plain values."""
        return {}

    def resumed(self, state: Mapping[str, Any]) -> None:
        """Told before ``started``: what ``state`` gave in the run that is gone on with."""

    def interrupted(self, signal_name: str) -> None:
        """A signal came; the run may be killed at any moment. Called from another thread."""

    def ended(self, status: str, detail: str) -> None:
        """The run is over: "done", "failed" or "interrupted", and why in one line."""


class Observers(Observer):
    """Tells several observers, in order.

    A file that one of them cannot write does not end the run, once it has begun: that is told
    once, and the observer goes on being told.
    """

    def __init__(self, members: Sequence[Observer]) -> None:
        self.members = tuple(members)
        self._over = False
        self._warned: set[int] = set()

    def join(self, member: Observer) -> None:
        """Tell another one, too, after the others."""
        self.members = (*self.members, member)

    def started(self, info: RunInfo) -> None:
        for member in self.members:
            member.started(info)

    def wants_detail(self) -> bool:
        return any(member.wants_detail() for member in self.members)

    def measured(self, detail: StepDetail) -> None:
        self._each(lambda member: member.measured(detail))

    def stepped(self, record: StepRecord) -> None:
        self._each(lambda member: member.stepped(record))

    def evaluated(self, step: int, loss: float) -> None:
        self._each(lambda member: member.evaluated(step, loss))

    def checkpointed(self, record: CheckpointRecord) -> None:
        self._each(lambda member: member.checkpointed(record))

    def state(self) -> dict[str, Any]:
        return {
            type(member).__name__: found for member in self.members if (found := member.state())
        }

    def resumed(self, state: Mapping[str, Any]) -> None:
        for member in self.members:
            if (name := type(member).__name__) in state:
                member.resumed(state[name])

    def interrupted(self, signal_name: str) -> None:
        self._each(lambda member: member.interrupted(signal_name))

    def ended(self, status: str, detail: str) -> None:
        """Tell each member once, whatever the others do; the first failure is raised after, unless
        it is a disk's."""
        if self._over:
            return
        self._over = True
        failure: Exception | None = None
        for member in self.members:
            try:
                member.ended(status, detail)
            except OSError as error:
                self._warn(member, error)
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _each(self, tell: Callable[[Observer], None]) -> None:
        for member in self.members:
            try:
                tell(member)
            except OSError as error:
                self._warn(member, error)

    def _warn(self, member: Observer, error: OSError) -> None:
        if id(member) in self._warned:
            return
        self._warned.add(id(member))
        with contextlib.suppress(OSError):
            name = type(member).__name__.lower()
            reason = f"{error.strerror or error}" + (
                f": {error.filename}" if error.filename else ""
            )
            text = f"hpcsync: WARNING: the run's {name} is not complete: {reason}; it goes on"
            print(text, file=sys.stderr, flush=True)
