"""Writing a checkpoint: each writer its file, then one of them the rest and the final name.

    PartWriter(file).write(folder, datasets, filled)  ->  Part      on every writer, side by side
    publish(fresh, final, document, metas, parts)     ->  Manifest  on one, when all have written

Nothing here communicates. A part is small and plain, to be sent to the one who publishes. Errors
of the disk come as OSError; until ``publish`` has given the folder its name, nobody reads it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import xxhash

from ..errors import CheckpointError
from . import folder as folders
from . import template as templates
from .layout import Dataset, Piece, TensorMeta, datasets
from .manifest import Document, Manifest, Stored, StoredFile, StoredTensor, digest, dump
from .snapshot import Filled
from .template import Source, Template

# Bytes that are hashed and written in turn: they stay in the processor's cache between the two.
CHUNK = 1 << 20
_EARLY = 16 << 20


class Part(NamedTuple):
    """What one process has written of a file.

    Attributes:
        rest: checksum of the bytes outside all datasets; None if another writes those.
        pieces: by tensor.
    """

    file: str
    size: int
    rest: str | None
    pieces: tuple[tuple[str, Stored], ...]


class PartWriter:
    """Writes one process's pieces into its file, checkpoint after checkpoint.

    Args:
        file: ``folder.data_file(rank)``.
        leads: write what is outside the datasets, too. Where several processes write one file
            (all with the same datasets), one of them leads.
    """

    def __init__(self, file: str, leads: bool = True) -> None:
        self._file, self._leads = file, leads
        self._datasets: tuple[Dataset, ...] | None = None
        self._template: Template | None = None

    def write(
        self,
        folder: Path,
        datasets: Sequence[Dataset],
        filled: Iterable[Filled],
        fsync: bool = True,
    ) -> Part:
        """Write the file, or this process's part of it.

        Args:
            datasets: all of the file: ``layout.datasets`` of all its writers' pieces.
            filled: this process's pieces.
            fsync: return only when they are durable.

        Raises:
            OSError: as the disk says, when closing the file, too.
        """
        template = self._template_of(datasets)
        starts = {each.name: (each.start, each.meta.row_nbytes) for each in datasets}
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        handle = os.open(folder / self._file, flags, 0o666)
        try:
            output = _Output(handle)
            rest = _write_rest(output, template) if self._leads else None
            pieces = []
            for piece, data in filled:
                start, row = starts[piece.name]
                offset = template.offsets[piece.name] + (piece.start - start) * row
                xxh3 = _write_hashed(output, data.data, offset)
                stored = Stored(self._file, piece.start, piece.rows, offset, piece.nbytes, xxh3)
                pieces.append((piece.name, stored))
            if fsync:
                os.fsync(handle)
        finally:
            os.close(handle)
        return Part(self._file, template.size, rest, tuple(pieces))

    def _template_of(self, datasets: Sequence[Dataset]) -> Template:
        wanted = tuple(datasets)
        if self._template is None or wanted != self._datasets:
            self._datasets, self._template = wanted, templates.make(wanted)
        return self._template


def publish(
    fresh: Path,
    final: Path,
    document: Document,
    metas: Sequence[TensorMeta],
    parts: Sequence[Part],
) -> Manifest:
    """Write index and manifest beside the parts, then give the folder its name, all durably.

    ``latest`` is for the caller to move: ``folder.set_latest``.

    Args:
        metas: of all tensors that the document's states name, in this order in the manifest.
        parts: of all writers, each written durably.

    Raises:
        CheckpointError: a part is not there.
        OSError: as the disk says; ``fresh`` is then for the caller to remove.
    """
    _check_present(fresh, parts)
    tensors = _tensors(metas, parts)
    data = templates.index(tuple((meta, _sources(meta, tensors[meta.name])) for meta in metas))
    written = [StoredFile(part.file, part.size, part.rest) for part in parts if part.rest]
    assert {part.file for part in parts} == {file.name for file in written}, "a file has no leader"
    files = [*written, StoredFile(folders.INDEX, len(data), digest(data))]
    plain = {each.name: getattr(document, each.name) for each in fields(Document)}
    manifest = Manifest(**plain, tensors=tensors, files={file.name: file for file in files})
    text = dump(manifest)
    write_file(fresh / folders.INDEX, data)
    write_file(fresh / folders.MANIFEST, text)
    folders.publish(fresh, final)
    return manifest


def _check_present(fresh: Path, parts: Sequence[Part]) -> None:
    """Other writers may have written to disks of their own, or the folder was removed since."""
    for name, size in {part.file: part.size for part in parts}.items():
        try:
            found = os.stat(fresh / name, follow_symlinks=False)
            whole = stat.S_ISREG(found.st_mode) and found.st_size == size
        except FileNotFoundError:
            whole = False
        if not whole:
            raise CheckpointError(
                f"{fresh / name}: is not there as its rank wrote it: the run's folder must be on a "
                "file system that all nodes share"
            )


def write_file(path: Path, data: bytes) -> None:
    """Write a new file durably."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class _Output:
    """A file that is written at given places, and begins to go to the disk meanwhile."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self._low = self._high = self._count = 0

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of it."""
        if not self._count:
            self._low = self._high = offset
        self._low = min(self._low, offset)
        self._count += len(data)
        while data:
            count = os.pwrite(self.handle, data, offset)
            data, offset = data[count:], offset + count
        self._high = max(self._high, offset)
        if self._count >= _EARLY:
            self._begin()

    def _begin(self) -> None:
        """Ask the system to write what it holds, so that fsync finds little left to do."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                length = self._high - self._low
                os.posix_fadvise(self.handle, self._low, length, os.POSIX_FADV_DONTNEED)
        self._count = 0


def _write_rest(output: _Output, template: Template) -> str:
    os.ftruncate(output.handle, template.size)
    checksum = xxhash.xxh3_128()
    for offset, data in template.rest:
        checksum.update(data)
        output.write(memoryview(data), offset)
    return checksum.hexdigest()


def _write_hashed(output: _Output, data: memoryview, offset: int) -> str:
    checksum = xxhash.xxh3_128()
    for at in range(0, len(data), CHUNK):
        chunk = data[at : at + CHUNK]
        checksum.update(chunk)
        output.write(chunk, offset + at)
    return checksum.hexdigest()


def _tensors(metas: Sequence[TensorMeta], parts: Sequence[Part]) -> dict[str, StoredTensor]:
    found: dict[str, list[Stored]] = {meta.name: [] for meta in metas}
    if len(found) != len(metas):
        raise CheckpointError("checkpoint: two tensors have the same name")
    for part in parts:
        for name, stored in part.pieces:
            found[name].append(stored)
    return {
        meta.name: StoredTensor(meta, tuple(sorted(found[meta.name], key=lambda each: each.start)))
        for meta in metas
    }


def _sources(meta: TensorMeta, entry: StoredTensor) -> tuple[Source, ...]:
    """The dataset of each file that holds part of a tensor."""
    by_file: dict[str, list[Piece]] = {}
    for stored in entry.pieces:
        piece = Piece(meta.name, stored.start, stored.rows, stored.nbytes)
        by_file.setdefault(stored.file, []).append(piece)
    return tuple(
        Source(file, each) for file, pieces in by_file.items() for each in datasets([meta], pieces)
    )
