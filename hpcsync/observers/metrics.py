"""metrics.csv: one row a step, in the order of ``COLUMNS``."""

from __future__ import annotations

import csv
from dataclasses import asdict, fields
from pathlib import Path
from typing import TextIO

from .base import Observer, RunInfo, StepRecord

# The held-out loss is empty where it was not measured.
COLUMNS = (*(entry.name for entry in fields(StepRecord)), "val_loss", "run_id")


class Metrics(Observer):
    """Writes RUN/metrics.csv; a row is in the file when its step is over."""

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._val: tuple[int, float] | None = None
        self._run_id = ""

    def started(self, info: RunInfo) -> None:
        self._run_id = info.run_id
        path: Path = info.folder / "metrics.csv"
        self._file = path.open("w", newline="", encoding="utf-8", buffering=1)
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(COLUMNS)

    def evaluated(self, step: int, loss: float) -> None:
        self._val = (step, loss)

    def stepped(self, record: StepRecord) -> None:
        if self._file is None:
            return
        row = {**asdict(record), "run_id": self._run_id}
        if self._val is not None and self._val[0] == record.step:
            row["val_loss"] = self._val[1]
        self._writer.writerow(_text(row.get(name, "")) for name in COLUMNS)

    def ended(self, status: str, detail: str) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _text(value: object) -> object:
    # Nine digits tell any two float32 apart.
    if isinstance(value, bool):
        return int(value)
    return f"{value:.9g}" if isinstance(value, float) else value
