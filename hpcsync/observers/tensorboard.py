"""RUN/tensorboard: curves for TensorBoard, written by rank 0.

The run's id is in the name of the event file and in the text "run"; steps are those of the run.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from ..errors import UserError
from .base import Observer, RunInfo, StepRecord

FOLDER = "tensorboard"
_FLUSH_S = 10


class TensorBoard(Observer):
    """Writes one event a step, with all its numbers.

    Raises:
        UserError: tensorboard is not installed.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError(
                "metrics.tensorboard: needs the package tensorboard, which is not installed; "
                "pip install 'hpcsync[tensorboard]', or set metrics.tensorboard=false"
            )
        self._writer: Any = None

    def started(self, info: RunInfo) -> None:
        from torch.utils.tensorboard import FileWriter, summary

        self._writer = FileWriter(
            str(info.folder / FOLDER), flush_secs=_FLUSH_S, filename_suffix=f".{info.run_id}"
        )
        rows = {
            "run": info.folder.name,
            "run id": info.run_id,
            "ranks": info.ranks,
            "nodes": info.nodes,
            "codec": info.codec,
            "algorithm": info.algorithm,
            "tokens a step": f"{info.tokens_per_step} ({info.unit}s)",
            "held-out loss in": info.val_unit,
        }
        table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
        text: Any = summary.text
        self._writer.add_summary(text("run", f"| what | |\n|---|---|\n{table}"), 0)

    def evaluated(self, step: int, loss: float) -> None:
        self._add(step, {"loss/held_out": loss})

    def stepped(self, record: StepRecord) -> None:
        self._add(
            record.step,
            {
                "loss/train": record.loss,
                "optimizer/lr": record.lr,
                "optimizer/grad_norm": record.grad_norm,
                "optimizer/loss_scale": record.loss_scale,
                "optimizer/skipped": float(record.skipped),
                "time/step_s": record.step_ms / 1e3,
                "time/compute_s": record.compute_ms / 1e3,
                "time/communication_s": record.comm_ms / 1e3,
                "time/exposed_s": record.exposed_comm_ms / 1e3,
                "time/wait_s": record.wait_ms / 1e3,
                "time/checkpoint_s": record.checkpoint_ms / 1e3,
                "rate/tokens_per_s": record.tokens_per_s,
                "rate/internode_bytes_per_step": record.internode_bytes,
            },
        )

    def ended(self, status: str, detail: str) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add(self, step: int, values: dict[str, float]) -> None:
        from tensorboard.compat.proto import summary_pb2

        made: Any = summary_pb2  # generated, so that a type checker finds nothing in it
        if self._writer is not None:
            found = [
                made.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()
            ]
            self._writer.add_summary(made.Summary(value=found), step)
