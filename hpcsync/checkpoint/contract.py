"""What goes into a saver, and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

from .manifest import Document


class StepLog(Protocol):
    """Keeps what came after a checkpoint, so that a resumed run need not compute it again."""

    def start(self, step: int) -> None:
        """The snapshot of ``step`` was taken: what comes now follows on it."""

    def published(self, step: int) -> None:
        """It is whole on disk: what came before it is not needed any more."""


class Taken(NamedTuple):
    """The state of a run at a step, as trees; see ``state``.

    Attributes:
        common: the same on all ranks, but for the tensors of ``Saver``'s ``first_only``.
        own: this rank's.
    """

    common: Mapping[str, Any]
    own: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a checkpoint says of its run; texts."""

    run_id: str
    config: str
    versions: Mapping[str, str]

    def document(
        self,
        step: int,
        nodes: tuple[tuple[int, ...], ...],
        common: Mapping[str, Any],
        own: Sequence[Any],
    ) -> Document:
        """What the manifest says of a step besides its tensors, as of now.

        Args:
            nodes: ranks of each node.
            common: skeleton of the common state.
            own: those of each rank's.
        """
        return Document(
            step=step,
            tokens=int(common.get("tokens", 0)),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            run_id=self.run_id,
            nodes=nodes,
            versions=self.versions,
            config=self.config,
            common=common,
            own=tuple(own),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a checkpoint, the same on all ranks but for times.

    Attributes:
        problem: why it was not saved, if so: one line.
        nbytes: that this rank wrote.
        stall_s: for which training stood still on this rank.
        durable_s: from the snapshot until it was known to be whole.
    """

    step: int
    problem: str = ""
    nbytes: int = 0
    stall_s: float = 0.0
    durable_s: float = 0.0
