"""Records in files: appended, each with its checksum; reading ends at the first that is not whole.

    record    head, 48 bytes | payload | meta, JSON
    head      "HSRL", bytes of meta (u32), step (u64), bytes of payload (u64), XXH3-64 of these
              (u64), XXH3-128 of payload and meta (16 bytes); little endian

The head is written last. What was written stays when the process is killed; what a crash of the
node or a full disk leaves is found by the checksums.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

MAGIC = b"HSRL"
_FIELDS = struct.Struct("<4sIQQ")
_SUMS = struct.Struct("<Q16s")
HEAD_BYTES = _FIELDS.size + _SUMS.size
_CHUNK = 1 << 18  # hashed and handed to the kernel while it is in the processor's cache
_MOST_PARTS = 512  # of one writev
_READ = 1 << 22
MOST_META = 1 << 26


@dataclass(frozen=True)
class Record:
    """A whole record in a file.

    Attributes:
        start, stop: its first byte, and that behind its last.
        nbytes: of the payload.
    """

    path: Path
    start: int
    stop: int
    step: int
    nbytes: int
    meta: dict[str, Any]

    def read(self) -> Bytes:
        """The payload.

        Raises:
            OSError: it is not there any more.
        """
        out = np.empty(self.nbytes, np.uint8)
        with self.path.open("rb", buffering=0) as file:
            _fill(file.fileno(), out.data, self.start + HEAD_BYTES)
        return out


class Writer:
    """Writes records into one file, one after the other or in one place.

    Args:
        start: where the next record goes; what stands there and behind is lost.
    """

    def __init__(self, path: Path, start: int = 0) -> None:
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.ftruncate(self._fd, start)
        self._start = self._end = start
        self._hash = xxhash.xxh3_128()
        self._nbytes = 0
        self._group: list[memoryview] = []
        self._room = _CHUNK

    @property
    def fileno(self) -> int:
        return self._fd

    def begin(self) -> None:
        """Begin a record; one that was begun and not ended is forgotten."""
        self._end = self._start + HEAD_BYTES
        self._hash.reset()
        self._nbytes = 0
        self._group, self._room = [], _CHUNK

    def add(self, arrays: Iterable[Bytes]) -> None:
        """Append to the payload; the arrays must stay as they are until ``flush``.

        Raises:
            OSError: the disk is full, or whatever else keeps bytes from being written.
        """
        for array in arrays:
            rest = array.data
            self._nbytes += rest.nbytes
            while rest.nbytes:
                part, rest = rest[: self._room], rest[self._room :]
                self._group.append(part)
                self._room -= part.nbytes
                if not self._room or len(self._group) == _MOST_PARTS:
                    self.flush()

    def flush(self) -> None:
        """Write what was added."""
        group, self._group, self._room = self._group, [], _CHUNK
        for part in group:
            self._hash.update(part)
        if group:
            self._end += _put(self._fd, group, self._end)

    def finish(self, step: int, meta: dict[str, Any]) -> int:
        """End the record; where the next one begins.

        Raises:
            OSError: as ``add``.
        """
        nbytes, words = self._nbytes, json.dumps(meta).encode()
        self.add([np.frombuffer(words, np.uint8)])
        self.flush()
        fields = _FIELDS.pack(MAGIC, len(words), step, nbytes)
        head = fields + _SUMS.pack(xxhash.xxh3_64_intdigest(fields), self._hash.digest())
        _put(self._fd, [memoryview(head)], self._start)
        self._start = self._end
        return self._end

    def rewind(self) -> None:
        """Write the next record over the first."""
        self._start = 0

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def scan(path: Path) -> tuple[list[Record], str]:
    """The whole records from the beginning of a file on, all of them read and checked.

    Returns:
        The records, and why reading ended before the end of the file; empty if it did not.

    Raises:
        OSError: the file cannot be read.
    """
    found: list[Record] = []
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return found, "it is no file"
        at = 0
        while at < status.st_size:
            record, problem = _one(fd, path, at, status.st_size)
            if record is None:
                return found, f"{problem} at byte {at}"
            found.append(record)
            at = record.stop
    finally:
        os.close(fd)
    return found, ""


def _one(fd: int, path: Path, at: int, size: int) -> tuple[Record | None, str]:
    """The record at byte ``at`` of a file of ``size`` bytes."""
    if size - at < HEAD_BYTES:
        return None, "a record that is cut off"
    head = np.empty(HEAD_BYTES, np.uint8)
    _fill(fd, head.data, at)
    fields = head.tobytes()[: _FIELDS.size]
    magic, meta_bytes, step, nbytes = _FIELDS.unpack(fields)
    told, digest = _SUMS.unpack(head.tobytes()[_FIELDS.size :])
    if magic != MAGIC or told != xxhash.xxh3_64_intdigest(fields):
        return None, "a record whose head is damaged"
    stop = at + HEAD_BYTES + nbytes + meta_bytes
    if stop > size or meta_bytes > MOST_META:
        return None, "a record that is cut off"
    words = np.empty(meta_bytes, np.uint8)
    _fill(fd, words.data, stop - meta_bytes)
    if _hashed(fd, at + HEAD_BYTES, nbytes, words) != digest:
        return None, f"the record of step {step} has another checksum than its content"
    try:
        meta = json.loads(words.tobytes())
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict):
        return None, f"the record of step {step} is no JSON object"
    return Record(path, at, stop, step, nbytes, meta), ""


def _hashed(fd: int, start: int, nbytes: int, rest: Bytes) -> bytes:
    found = xxhash.xxh3_128()
    room = np.empty(min(_READ, nbytes), np.uint8).data
    for at in range(0, nbytes, _READ):
        part = room[: min(_READ, nbytes - at)]
        _fill(fd, part, start + at)
        found.update(part)
    found.update(rest.data)
    return found.digest()


def _put(fd: int, parts: list[memoryview], at: int) -> int:
    """Write all of it from byte ``at`` on; how much that is."""
    whole = wanted = sum(part.nbytes for part in parts)
    while wanted:
        done = os.pwritev(fd, parts, at)
        wanted -= done
        at += done
        while wanted and done >= parts[0].nbytes:
            done -= parts[0].nbytes
            parts = parts[1:]
        if wanted and done:
            parts = [parts[0][done:], *parts[1:]]
    return whole


def _fill(fd: int, out: memoryview, at: int) -> None:
    while out.nbytes:
        done = os.preadv(fd, [out], at)
        if not done:
            raise OSError("the file ends before the record does")
        at, out = at + done, out[done:]
