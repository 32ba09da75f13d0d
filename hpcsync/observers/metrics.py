"""metrics.csv: one row a step, in the order of ``COLUMNS``."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from .base import Observer, RunInfo, StepRecord

# The held-out loss is empty where it was not measured.
COLUMNS = (*(entry.name for entry in fields(StepRecord)), "val_loss", "run_id")
FILE = "metrics.csv"


class Metrics(Observer):
    """Writes RUN/metrics.csv; a row is in the file when its step is over.

    A resumed run goes on behind the row of the step that it begins from.
    """

    def __init__(self) -> None:
        self._handle: int | None = None
        self._size = 0
        self._val: tuple[int, float] | None = None
        self._run_id = ""
        self._replayed: list[StepRecord] = []
        self._resumed: tuple[int, bytes] | None = None

    def resumed(self, state: Mapping[str, Any]) -> None:
        """``replayed``: records of steps whose rows may be missing."""
        self._replayed = list(state["replayed"])

    def started(self, info: RunInfo) -> None:
        self._run_id = info.run_id
        path: Path = info.folder / FILE
        rows = {record.step: self._row(record) for record in self._replayed}
        rows |= rows_to(path, info.first_step)
        data = b"".join([_line(COLUMNS), *(rows[step] for step in sorted(rows))])
        aside = path.with_name(f".{FILE}")  # a kill in this moment must not cost the rows
        aside.write_bytes(data)
        aside.replace(path)
        self._handle, self._size = os.open(path, os.O_RDWR), len(data)
        self._resumed = max(rows.items(), default=None)

    def evaluated(self, step: int, loss: float) -> None:
        self._val = (step, loss)
        if self._resumed is not None and self._resumed[0] == step:
            self._fill_in(self._resumed[1], loss)
            self._resumed = None

    def stepped(self, record: StepRecord) -> None:
        self._resumed = None
        self._append(self._row(record))

    def ended(self, status: str, detail: str) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _row(self, record: StepRecord) -> bytes:
        row = {**asdict(record), "run_id": self._run_id}
        if self._val is not None and self._val[0] == record.step:
            row["val_loss"] = self._val[1]
        return _line([_text(row.get(name, "")) for name in COLUMNS])

    def _fill_in(self, line: bytes, loss: float) -> None:
        """Put the held-out loss into the last row of the file, if none is there."""
        cells = next(csv.reader([line.decode()]))
        place = COLUMNS.index("val_loss")
        if not cells[place]:
            cells[place] = str(_text(loss))
            self._size -= len(line)
            self._append(_line(cells))

    def _append(self, data: bytes) -> None:
        """Append rows, or, where the disk is full, nothing: never a half."""
        if self._handle is None:
            return
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(self._handle, data[done:], self._size + done)
        except OSError:
            os.ftruncate(self._handle, self._size)
            raise
        self._size += len(data)


def rows_to(path: Path, step: int) -> dict[int, bytes]:
    """The lines of a file's rows up to a step, in today's columns, by step; those that are cut are
    left out, and columns that the file lacks are empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    whole = text[: text.rfind("\n") + 1]
    found: dict[int, bytes] = {}
    for row in csv.DictReader(io.StringIO(whole, newline="")):
        number = row.get("step") or ""
        if number.isdecimal() and 0 < int(number) <= step and None not in row.values():
            found[int(number)] = _line([row.get(name, "") for name in COLUMNS])
    return found


def _line(cells: Sequence[object]) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerow(cells)
    return out.getvalue().encode()


def _text(value: object) -> object:
    # Nine digits tell any two float32 apart.
    if isinstance(value, bool):
        return int(value)
    return f"{value:.9g}" if isinstance(value, float) else value
