"""Checkpoints: the state of a run in HDF5 files, written in parallel and checked byte by byte.

layout     which bytes of which tensor each writer stores (pure)
state      a tree of values as tensors by name and JSON
snapshot   host buffers that a step's state is copied into
template   the HDF5 structure of a file, made once
writer     a writer's file; then index, manifest and the final name
manifest   what the files hold, with checksums
parsing    a manifest from its file, all of it checked
reader     opening, verifying and reading a checkpoint
folder     names of checkpoints, and which are kept
replay     a log of the steps since the last checkpoint, and doing them again

The format is described in tools/README.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from .reader import Checkpoint


def open(path: str | Path) -> Checkpoint:
    """The checkpoint in this folder; see ``hpcsync.checkpoint.reader``."""
    from . import reader

    return reader.open(path)
