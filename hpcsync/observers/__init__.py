"""What watches a run: the loop tells observers what happened and knows none of them."""

from __future__ import annotations

from ..config import MetricsConfig
from .base import (
    CheckpointRecord,
    LevelDetail,
    Observer,
    Observers,
    RunInfo,
    StepDetail,
    StepRecord,
)

__all__ = [
    "CheckpointRecord",
    "LevelDetail",
    "Observer",
    "Observers",
    "RunInfo",
    "StepDetail",
    "StepRecord",
    "standard",
]


def standard(rank: int, metrics: MetricsConfig | None = None) -> Observers:
    """The observers of a training run: all on rank 0, elsewhere those that tell of a failure, and
    metrics where the section says so.

    Raises:
        UserError: a package that the section needs is not installed.
    """
    from .log import Log
    from .metrics import Metrics
    from .progress import Progress
    from .summary import Summary

    members: list[Observer] = [Summary(), Log()]
    if rank == 0:
        members = [Metrics(), *members, Progress()]
    return Observers([*members, *_exporters(rank, metrics or MetricsConfig())])


def _exporters(rank: int, metrics: MetricsConfig) -> list[Observer]:
    """What hands metrics to other programs, on this rank."""
    found: list[Observer] = []
    port = metrics.http_port if rank in metrics.http_ranks else 0
    textfile = metrics.textfile if rank == 0 or "{rank}" in metrics.textfile else ""
    if port or textfile:
        from .prometheus import Prometheus

        found.append(Prometheus(textfile.replace("{rank}", str(rank)), port))
    if metrics.tensorboard and rank == 0:
        from .tensorboard import TensorBoard

        found.append(TensorBoard())
    return found
