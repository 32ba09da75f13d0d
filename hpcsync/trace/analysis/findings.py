"""What is wrong with a run: findings, each with its place by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...wording import ranges


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: ``straggler``, ``bucket``, ``link``, ``data`` or ``clock``.
        text: a line that names it.
        advice: what to do, or which setting to try.
        ranks: whose fault it is; empty if it is no rank's.
        node, bucket, lane: where, if it has such a place; of a clock that contradicts itself the
            lane is ``wrong``.
        lost_ms: a step.
        since: the first step with it, if it was not there from the beginning.
        fault: False for what is only worth knowing.
    """

    kind: str
    text: str
    advice: str = ""
    ranks: tuple[int, ...] = ()
    node: int | None = None
    bucket: int | None = None
    lane: str | None = None
    lost_ms: float = 0.0
    since: int | None = None
    fault: bool = True


def named(ranks: Sequence[int]) -> str:
    """``rank 3`` or ``ranks 0-3, 7``."""
    ordered = sorted(ranks)
    return f"rank {ordered[0]}" if len(ordered) == 1 else f"ranks {ranges(ordered)}"
