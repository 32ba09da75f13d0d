"""log.jsonl: what happened, an object a line, each with time, run id, step, rank and host.

Rank 0 writes the course of the run; another rank writes only of a failure of its own. Lines
are appended whole, so that ranks do not cut into each other's.
"""

from __future__ import annotations

import json
import math
import os
import time
from datetime import UTC, datetime

from .base import CheckpointRecord, Observer, RunInfo, StepRecord


class Log(Observer):
    """Appends to RUN/log.jsonl."""

    def __init__(self) -> None:
        self._info: RunInfo | None = None
        self._begin = time.monotonic()
        self._step = 0

    def started(self, info: RunInfo) -> None:
        self._info, self._step = info, info.first_step
        if info.rank == 0:
            self._write(
                "started",
                ranks=info.ranks,
                nodes=info.nodes,
                steps=info.steps,
                tokens_per_step=info.tokens_per_step,
                unit=info.unit,
                codec=info.codec,
                algorithm=info.algorithm,
                first_step=info.first_step,
            )

    def evaluated(self, step: int, loss: float) -> None:
        if self._info is not None and self._info.rank == 0:
            self._write("evaluated", step=step, val_loss=loss, unit=self._info.val_unit)

    def stepped(self, record: StepRecord) -> None:
        self._step = record.step
        if record.skipped and self._info is not None and self._info.rank == 0:
            self._write(
                "skipped",
                reason="gradients are not finite",
                loss_scale=record.loss_scale,
            )

    def checkpointed(self, record: CheckpointRecord) -> None:
        if self._info is None or self._info.rank != 0:
            return
        if record.problem:
            self._write("checkpoint failed", of=record.step, problem=record.problem)
        else:
            self._write(
                "checkpoint",
                of=record.step,
                bytes=record.nbytes,
                stall_s=round(record.stall_s, 6),
                durable_s=round(record.durable_s, 6),
            )

    def interrupted(self, signal_name: str) -> None:
        if self._info is not None and self._info.rank == 0:
            self._write("signal", signal=signal_name)

    def ended(self, status: str, detail: str) -> None:
        if self._info is not None and (self._info.rank == 0 or status == "failed"):
            self._write("ended", status=status, detail=detail)

    def _write(self, event: str, **values: object) -> None:
        assert self._info is not None
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "elapsed_s": round(time.monotonic() - self._begin, 3),
            "run_id": self._info.run_id,
            "step": self._step,
            "rank": self._info.rank,
            "host": self._info.host,
            "event": event,
            **{name: _plain(value) for name, value in values.items()},
        }
        data = (json.dumps(line) + "\n").encode()
        handle = os.open(
            self._info.folder / "log.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
        )
        try:
            os.write(handle, data)
        finally:
            os.close(handle)


def _plain(value: object) -> object:
    """JSON has no NaN and no Inf: they are written as texts."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
