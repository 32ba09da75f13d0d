"""Progress: a live bar on a terminal, one line every few seconds in a log file."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, TextIO

from .base import CheckpointRecord, Observer, RunInfo, StepRecord

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

# Rates are means of this many steps: steady enough to read, quick enough to follow a change.
_RECENT = 50


class Progress(Observer):
    """Tells step, loss, tokens/s, the share of exposed communication, and the time left."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._recent: deque[StepRecord] = deque(maxlen=_RECENT)
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._next = 0.0
        self._told = 0

    def started(self, info: RunInfo) -> None:
        self._info = info
        self._next = time.monotonic()  # the first step is told at once
        if is_terminal(self._stream):
            self._bar = _make_bar(self._stream)
            self._task = self._bar.add_task(
                "train", total=info.steps, completed=info.first_step, words=""
            )
            self._bar.start()

    def stepped(self, record: StepRecord) -> None:
        self._recent.append(record)
        if self._bar is not None:
            assert self._task is not None
            words = "  ".join(self._words(record)[1:])
            self._bar.update(self._task, completed=record.step, words=words)
        elif time.monotonic() >= self._next or record.step == self._info.steps:
            self._next = time.monotonic() + self._info.every_s
            self._say("  ".join(self._words(record)))
        if record.skipped:
            self._say(f"step {record.step} skipped on every rank: gradients are not finite")

    def evaluated(self, step: int, loss: float) -> None:
        self._say(f"step {step}/{self._info.steps}  held-out loss {loss:.4f} {self._info.val_unit}")

    def checkpointed(self, record: CheckpointRecord) -> None:
        if not record.problem and self._bar is None:
            self._say(
                f"step {record.step}/{self._info.steps}  checkpoint saved: training stood still "
                f"for {record.stall_s * 1e3:.0f} ms, on disk after {record.durable_s:.1f} s"
            )

    def ended(self, status: str, detail: str) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self._stream, flush=True)

    def _words(self, record: StepRecord) -> list[str]:
        """The parts of a line about the last steps."""
        total = sum(entry.step_ms for entry in self._recent)
        exposed = sum(entry.exposed_comm_ms for entry in self._recent)
        mean_s = total / len(self._recent) / 1e3
        rate = self._info.tokens_per_step / mean_s if mean_s else 0.0
        left = mean_s * (self._info.steps - record.step)
        return [
            f"step {record.step}/{self._info.steps}",
            f"loss {record.loss:.4f}",
            f"{brief(rate)} {self._info.unit}s/s",
            f"exposed comm {100 * exposed / total if total else 0.0:.1f}%",
            f"left {clock(left)}",
        ]


def is_terminal(stream: TextIO) -> bool:
    """True where a live bar can be seen.

    mpirun gives every rank a pseudo-terminal even when its own output is a file; only a real
    one has a width.
    """
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):
        return False


def brief(number: float) -> str:
    """Three digits and a unit: ``45.2k``."""
    for unit in ("", "k", "M", "G"):
        if number < 999.5 or unit == "G":
            break
        number /= 1000
    return f"{number:.0f}{unit}" if number >= 100 or unit == "" else f"{number:.3g}{unit}"


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    tail = f"{whole % 60:02d}"
    return f"{hours}:{minutes:02d}:{tail}" if hours else f"{minutes}:{tail}"


def _make_bar(stream: TextIO) -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(file=stream, force_terminal=True)
    return Bar(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[words]}", markup=False),
        console=console,
        transient=False,
        refresh_per_second=4,
    )
