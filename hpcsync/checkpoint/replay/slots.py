"""The newest state that gradients do not tell, in two files that take turns.

While one is written the other is whole: it holds the step before. The ranks of a job are at most
one step apart, so there is one step that all of them have.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .records import Bytes, Record, Writer, scan


class Slots:
    """The two files of one rank.

    Args:
        paths: theirs.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._writers: dict[int, Writer] = {}

    def write(self, step: int, arrays: Sequence[Bytes], meta: dict[str, Any]) -> None:
        """Put a step's state in the place of that of two steps before.

        Raises:
            OSError: it could not be written.
        """
        which = step % len(self._paths)
        if which not in self._writers:
            self._writers[which] = Writer(self._paths[which])
        writer = self._writers[which]
        writer.rewind()
        writer.begin()
        writer.add(arrays)
        writer.finish(step, meta)

    def read(self) -> dict[int, Record]:
        """The states that are whole, by step."""
        found: dict[int, Record] = {}
        for path in self._paths:
            try:
                records, _ = scan(path)
            except OSError:
                continue
            if records:
                found[records[0].step] = records[0]
        return found

    def remove(self) -> None:
        """Delete the files."""
        self.close()
        for path in self._paths:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
