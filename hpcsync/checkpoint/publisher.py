"""From files that all ranks have written to a checkpoint; runs in the thread of rank 0."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from ..config import CheckpointConfig
from . import folder as folders
from .layout import TensorMeta
from .manifest import Document
from .writer import Part, publish


class Publisher:
    """Gives checkpoints their manifest and their final name, and removes old ones.

    Args:
        checkpoints: the folder that they stand in.
        config: which are kept.
    """

    def __init__(self, checkpoints: Path, config: CheckpointConfig) -> None:
        self._checkpoints, self._config = checkpoints, config

    def publish(
        self, document: Document, metas: Sequence[TensorMeta], parts: Sequence[Part]
    ) -> str:
        """Write index and manifest, and rename the folder.

        Returns:
            Why it could not be done, in one line; empty if it was.
        """
        place, step = self._checkpoints, document.step
        aside = folders.aside(place, step)
        try:
            publish(aside, place / folders.step_name(step), document, metas, parts)
        except Exception as error:
            return in_one_line(error, aside)
        self._tidy(step)
        return ""

    def _tidy(self, step: int) -> None:
        """What may fail without harm to the checkpoint, each without harm to the other."""
        place, config = self._checkpoints, self._config
        for tidy in (
            lambda: folders.set_latest(place, step),
            lambda: folders.prune(place, config.keep, config.keep_every),
        ):
            try:
                tidy()
            except Exception as error:
                say(f"warning: {place}: {in_one_line(error)}")


def say(text: str) -> None:
    """Tell the user, if there is anything to tell them by."""
    with contextlib.suppress(OSError):
        print(f"hpcsync: {text}", file=sys.stderr, flush=True)


def in_one_line(error: Exception, folder: Path | None = None) -> str:
    """An error in one line; of a disk, with the place."""
    if isinstance(error, OSError) and error.strerror:
        where = error.filename or folder
        return f"{error.strerror}: {where}" if where else error.strerror
    return str(error).partition("\n")[0] or type(error).__name__
