"""What watches a run: the loop tells observers what happened and knows none of them."""

from __future__ import annotations

from .base import Observer, Observers, RunInfo, StepRecord

__all__ = ["Observer", "Observers", "RunInfo", "StepRecord", "standard"]


def standard(rank: int) -> Observers:
    """The observers of a training run: all on rank 0, elsewhere those that tell of a failure."""
    from .log import Log
    from .metrics import Metrics
    from .progress import Progress
    from .summary import Summary

    everywhere: list[Observer] = [Summary(), Log()]
    return Observers([Metrics(), *everywhere, Progress()] if rank == 0 else everywhere)
