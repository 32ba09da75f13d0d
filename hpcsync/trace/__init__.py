"""Timing traces: spans of every rank, on clocks that can be compared.

recorder   the last spans of a rank, in memory
clock      what the ranks' clocks differ by
file       HDF5 files, one a node: written while the run goes on, read by ``open``
analysis   what tools/trace.py tells of them
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from .file import Trace


def open(run: str | Path) -> Trace:
    """The trace of the run in this folder; see ``hpcsync.trace.file.Trace``."""
    from .file import read

    return read(run)
