"""summary.json: what the run was and came to, written at its end, however it ends.

Rank 0 writes it. When another rank fails, rank 0 may be killed before it hears of it, so the
rank that fails writes the status itself. A job that is told to stop may be killed a moment
later, so the summary is written when the signal comes and again at the end.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .base import CheckpointRecord, Observer, RunInfo, StepRecord

# Medians are of the last steps only, so that a run of weeks needs no more memory.
WINDOW = 10_000


class Summary(Observer):
    """Writes RUN/summary.json.

    Keys: run_id, ranks, nodes, steps (done), loss_first, loss_last (nats), val_loss,
    val_loss_first, val_unit, tokens_per_s, step_ms, compute_ms, comm_ms, exposed_comm_ms, wait_ms
    (medians), overlap (share of the communication that was hidden, 0 to 1),
    internode_bytes_per_step, skipped, wall_s, codec, algorithm, first_step, checkpoint_step (of the
    last one that is whole), checkpoints_failed, status, detail. A value that was not measured, NaN
    or Inf is null. The first losses of a resumed run, and its skipped steps, are those of the whole
    run; medians are of this process.
    """

    def __init__(self) -> None:
        self._info: RunInfo | None = None
        self._begin = time.monotonic()
        self._recent: deque[StepRecord] = deque(maxlen=WINDOW)
        self._first: float | None = None
        self._last: StepRecord | None = None
        self._val: list[float] = []
        self._skipped = self._failed = 0
        self._saved: int | None = None
        self._over = False
        self._lock = threading.Lock()

    def started(self, info: RunInfo) -> None:
        self._info = info
        self._saved = info.checkpoint_step

    def stepped(self, record: StepRecord) -> None:
        self._count(record)
        self._recent.append(record)

    def evaluated(self, step: int, loss: float) -> None:
        self._val = [*self._val[:1], loss]

    def checkpointed(self, record: CheckpointRecord) -> None:
        if record.problem:
            self._failed += 1
            return
        self._saved = record.step
        if self._info is not None and self._info.rank == 0:
            with self._lock:
                self._write(self._info, "running", "")

    def state(self) -> dict[str, Any]:
        return {"loss_first": self._first, "val": self._val, "skipped": self._skipped}

    def resumed(self, state: Mapping[str, Any]) -> None:
        """``replayed``: records of steps after the state was saved, told apart from it."""
        if "val" in state:
            self._first, self._val = state["loss_first"], list(state["val"])
            self._skipped = int(state["skipped"])
        for record in state.get("replayed", ()):
            self._count(record)

    def _count(self, record: StepRecord) -> None:
        if self._first is None:
            self._first = record.loss
        self._last = record
        self._skipped += record.skipped

    def interrupted(self, signal_name: str) -> None:
        info = self._info
        if info is not None and info.rank == 0:
            with self._lock:
                if self._over:  # the loop was faster, and knows more
                    return
                # A rank that failed takes the others with it by this same signal.
                known = _read(info.folder / "summary.json")
                if known.get("status") == "failed":
                    self._write(info, "failed", str(known.get("detail", "")))
                else:
                    self._write(info, "interrupted", signal_name)

    def ended(self, status: str, detail: str) -> None:
        info = self._info
        if info is None:
            return
        with self._lock:
            self._over = True
            if info.rank == 0:
                self._write(info, status, detail)
            elif status == "failed":
                known = _read(info.folder / "summary.json") or {
                    "run_id": info.run_id,
                    "ranks": info.ranks,
                    "nodes": info.nodes,
                }
                _replace(info, {**known, "status": status, "detail": detail})

    def _write(self, info: RunInfo, status: str, detail: str) -> None:
        recent = list(self._recent)
        last = self._last
        step_ms = _median(recent, "step_ms")
        comm_ms, exposed_ms = _median(recent, "comm_ms"), _median(recent, "exposed_comm_ms")
        values = {
            "run_id": info.run_id,
            "ranks": info.ranks,
            "nodes": info.nodes,
            "steps": last.step if last else info.first_step,
            "first_step": info.first_step,
            "checkpoint_step": self._saved,
            "checkpoints_failed": self._failed,
            "loss_first": self._first,
            "loss_last": last.loss if last else None,
            "val_loss": self._val[-1] if self._val else None,
            "val_loss_first": self._val[0] if self._val else None,
            "val_unit": info.val_unit,
            "tokens_per_s": info.tokens_per_step / step_ms * 1e3 if step_ms else None,
            "unit": info.unit,
            "step_ms": step_ms,
            "compute_ms": _median(recent, "compute_ms"),
            "comm_ms": comm_ms,
            "exposed_comm_ms": exposed_ms,
            "wait_ms": _median(recent, "wait_ms"),
            "overlap": overlap(comm_ms, exposed_ms),
            "internode_bytes_per_step": _median(recent, "internode_bytes"),
            "skipped": self._skipped,
            "wall_s": round(time.monotonic() - self._begin, 3),
            "codec": last.codec if last else info.codec,
            "algorithm": info.algorithm,
            "status": status,
            "detail": detail,
        }
        _replace(info, values)


def overlap(comm_ms: float | None, exposed_ms: float | None) -> float | None:
    """The share of the communication that was hidden; 1 where there was none to hide."""
    if comm_ms is None or exposed_ms is None:
        return None
    return min(1.0, max(0.0, 1 - exposed_ms / comm_ms)) if comm_ms > 0 else 1.0


def _median(records: list[StepRecord], name: str) -> float | None:
    return statistics.median(getattr(record, name) for record in records) if records else None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _replace(info: RunInfo, values: dict[str, Any]) -> None:
    """Write aside and rename: a reader finds the old file or the new one, never a half."""
    path = info.folder / "summary.json"
    # Ranks on two hosts may have the same process id.
    writer = f"{info.host}.{info.rank}.{os.getpid()}"
    plain = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
    aside = path.with_name(f".{path.name}.{writer}")
    aside.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    aside.replace(path)
