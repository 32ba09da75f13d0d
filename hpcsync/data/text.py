"""Text files of the user's, as bytes: one file, all files under a folder, or a glob pattern.

Files are read as they are needed and never held whole, so a corpus may be larger than memory and
many ranks of a machine share one copy, the system's file cache.
"""

from __future__ import annotations

import glob
import os
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hpcsync.data.base import Source, TokenSource, split_point
from hpcsync.errors import DataError

if TYPE_CHECKING:
    from hpcsync.config import DataConfig

_OPEN_FILES = 64
_PROBE = 1 << 16


def build(config: DataConfig, *, context: int, seed: int) -> Source:
    """The files of ``config.path`` in order of name, joined; the tail is held out.

    Raises ``DataError`` when the path is missing, empty, unreadable or too short.
    """
    where = f"data.path = {config.path!r}"
    files = Files(_find(config.path, where), where)
    split = split_point(
        files.length, context=context, val_fraction=config.val_fraction, unit="byte", what=where
    )
    count = len(files.paths)
    return TokenSource(
        files.read,
        files.length,
        split=split,
        context=context,
        vocab=256,
        unit="byte",
        what=config.path if count == 1 else f"{count:,} files of {config.path}",
        fingerprint=files.fingerprint(),
    )


class Files:
    """Several files read as one stream of bytes; at most 64 of them are open at a time."""

    def __init__(self, paths: list[Path], where: str) -> None:
        self._where = where
        self._open: OrderedDict[int, int] = OrderedDict()
        sized = [(path, self._size(path)) for path in paths]
        self.paths = [path for path, size in sized if size]
        self._ends = np.cumsum([size for _, size in sized if size], dtype=np.int64)
        self.length = int(self._ends[-1]) if self.paths else 0
        if not self.paths:
            raise DataError(f"{where} is empty: give a file with text in it")

    def read(self, lo: int, hi: int) -> NDArray[np.uint8]:
        """Bytes ``[lo, hi)`` of the stream. Raises ``DataError`` when a file has gone or shrunk."""
        parts = []
        number = int(np.searchsorted(self._ends, lo, side="right"))
        while lo < hi:
            end = int(self._ends[number])
            start = int(self._ends[number - 1]) if number else 0
            stop = min(hi, end)
            parts.append(self._read_file(number, lo - start, stop - lo))
            lo, number = stop, number + 1
        return np.frombuffer(b"".join(parts), dtype=np.uint8)

    def fingerprint(self) -> str:
        """Checksum of the files' sizes and of the stream's two ends."""
        ends = (
            self.read(0, min(_PROBE, self.length)),
            self.read(max(0, self.length - _PROBE), self.length),
        )
        return f"{zlib.crc32(b''.join([self._ends.tobytes(), *(e.tobytes() for e in ends)])):08x}"

    def close(self) -> None:
        """Close what is open; reading opens files again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def _size(self, path: Path) -> int:
        try:
            # Opened rather than only looked at: an unreadable file must be told at the start.
            with open(path, "rb") as file:
                return os.fstat(file.fileno()).st_size
        except OSError as exc:
            raise self._unreadable(path, exc) from exc

    def _read_file(self, number: int, offset: int, count: int) -> bytes:
        path = self.paths[number]
        try:
            descriptor = self._open.pop(number, -1)
            if descriptor < 0:
                if len(self._open) >= _OPEN_FILES:
                    os.close(self._open.popitem(last=False)[1])
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._open[number] = descriptor
            data = os.pread(descriptor, count, offset)
            while len(data) < count:
                more = os.pread(descriptor, count - len(data), offset + len(data))
                if not more:
                    raise DataError(
                        f"{self._where}: {path} grew shorter after the job started; "
                        "leave the data alone while it runs"
                    )
                data += more
        except OSError as exc:
            raise self._unreadable(path, exc) from exc
        return data

    def _unreadable(self, path: Path, exc: OSError) -> DataError:
        return DataError(
            f"{self._where}: cannot read {path}: {exc.strerror}; check its permissions and that "
            "every node sees it"
        )


def _find(text: str, where: str) -> list[Path]:
    """Files in order of name, the same on every rank; hidden ones are left out."""
    if not text:
        raise DataError(
            "data.path: data.name = 'text' needs a file, a folder or a glob pattern, "
            "such as data.path=corpus.txt"
        )
    path = Path(text).expanduser()
    try:
        if path.is_dir():
            os.listdir(path)  # os.walk would pass over a folder that it may not read
            return sorted(_walk(path))
        if path.exists():
            return [path]
    except OSError as exc:
        raise DataError(f"{where}: cannot read it: {exc.strerror}; check its permissions") from exc
    matches = glob.glob(str(path), recursive=True) if glob.has_magic(text) else []
    files = sorted(Path(match) for match in matches if os.path.isfile(match))
    if not files:
        raise DataError(
            f"{where}: there is no such file or folder, seen from {os.getcwd()}; check the path "
            "and that every node sees it"
        )
    return files


def _walk(root: Path) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(folder, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if path.is_file()]
    return found
