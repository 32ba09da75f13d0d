"""Reading a checkpoint that may be damaged, or a stranger's.

Bytes are taken by the manifest's offsets, checked on the way, and never given to HDF5. Nothing is
believed: sizes are compared with those of the files before memory is taken, and a file that is a
link, a pipe or a device is refused.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from ..errors import CheckpointError, DamagedError
from . import folder as folders
from . import parsing, state
from .manifest import MAX_BYTES, Manifest, Stored, shown
from .snapshot import view

CHUNK = 1 << 20
_OPEN = 64  # files of a large job are more than a process may have open
# What tells of the files themselves; other errors may pass.
_DAMAGE = {errno.ENOENT, errno.ELOOP, errno.EIO, errno.ENXIO, errno.EISDIR, errno.ENOTDIR}


class Unit(NamedTuple):
    """Bytes under one checksum: a piece of a tensor, or what is outside all pieces of a file.

    Attributes:
        tensor: empty for the latter; ``piece`` is None then.
    """

    file: str
    tensor: str
    piece: Stored | None
    nbytes: int


def open(path: str | Path) -> Checkpoint:
    """Open the checkpoint in a folder and check its manifest and the sizes of its files.

    Raises:
        DamagedError: the manifest or a file is missing, cut or altered.
        CheckpointError: there is no such folder, or it cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; name a checkpoint's, step-00000100")
    with _Files(folder) as files:
        data = files.whole(folders.MANIFEST, MAX_BYTES)
    try:
        manifest = parsing.parse(data)
    except DamagedError as error:
        raise DamagedError([f"{folder}/{each}" for each in error.problems]) from None
    except CheckpointError as error:
        raise CheckpointError(f"{folder}/{error}") from None
    found = Checkpoint(folder, manifest)
    problems = found.verify(deep=False)
    if problems:
        found.close()
        raise DamagedError(problems)
    return found


def find(checkpoints: Path) -> list[Path]:
    """The folders of checkpoints that have their final name, newest first."""
    return [checkpoints / folders.step_name(step) for step in reversed(folders.steps(checkpoints))]


class Checkpoint:
    """A checkpoint, opened; a context manager that closes its files."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._files = _Files(folder)

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def common(self, *keys: str) -> Any:
        """What all ranks hold alike, its tensors in host memory.

        Args:
            keys: only these of the uppermost dict, as far as they are there.

        Raises:
            DamagedError: bytes that are read are not those that were written.
        """
        skeleton = self.manifest.common
        if keys:
            skeleton = state.select(skeleton, keys)
        return self._tree(skeleton)

    def own(self, rank: int) -> Any:
        """What a rank held for itself; errors as of ``common``."""
        return self._tree(self.manifest.own[rank])

    def tensor(self, name: str) -> Tensor:
        """A tensor, whole, in host memory, its bytes verified.

        Raises:
            CheckpointError: there is none of this name.
            DamagedError: its bytes are not those that were written.
        """
        try:
            entry = self.manifest.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder}: no tensor {shown(name)}") from None
        found = torch.empty(entry.meta.shape, dtype=state.torch_dtype(entry.meta.dtype))
        if entry.pieces:
            data, row = view(found), entry.meta.row_nbytes
            for piece in entry.pieces:
                self.read(name, piece, data[piece.start * row :][: piece.nbytes])
        return found

    def read(self, name: str, piece: Stored, out: NDArray[np.uint8]) -> None:
        """Read a piece of the tensor ``name`` and verify it.

        Args:
            out: 1-D uint8 of ``piece.nbytes``, contiguous.

        Raises:
            DamagedError: the bytes are not those that were written.
        """
        checksum = xxhash.xxh3_128()
        where = f"dataset {shown(name)}"
        self._files.read(piece.file, piece.offset, out.data, checksum, where)
        if checksum.hexdigest() != piece.xxh3:
            raise self._damaged(piece.file, f"{where}: its checksum does not fit")
        if self.manifest.tensors[name].meta.dtype == "bool" and out.max(initial=0) > 1:
            raise self._damaged(piece.file, f"{where}: holds what is neither true nor false")

    def units(self) -> list[Unit]:
        """All that has a checksum, file by file; ``check`` of each reads each byte once."""
        found = []
        for file in self.manifest.files.values():
            pieces = self.manifest.pieces[file.name]
            found += [Unit(file.name, name, piece, piece.nbytes) for name, piece in pieces]
            inside = sum(piece.nbytes for _, piece in pieces)
            found.append(Unit(file.name, "", None, file.size - inside))
        return found

    def check(self, unit: Unit) -> None:
        """Read the bytes of a unit and drop them.

        Raises:
            DamagedError: they are not those that were written.
        """
        buffer = np.empty(CHUNK, np.uint8)
        if unit.piece is not None:
            spans, wanted = [(unit.piece.offset, unit.piece.nbytes)], unit.piece.xxh3
        else:
            spans, wanted = self._rest(unit.file), self.manifest.files[unit.file].rest
        where = f"dataset {shown(unit.tensor)}" if unit.tensor else "outside the datasets"
        checksum = xxhash.xxh3_128()
        for offset, nbytes in spans:
            for at in range(0, nbytes, CHUNK):
                part = buffer.data[: min(CHUNK, nbytes - at)]
                self._files.read(unit.file, offset + at, part, checksum, where)
        if checksum.hexdigest() != wanted:
            raise self._damaged(unit.file, f"{where}: the checksum does not fit")

    def verify(self, deep: bool = True) -> list[str]:
        """What is wrong, a line each, with file and dataset; nothing if all is well.

        Args:
            deep: read every byte; otherwise the sizes of the files are compared alone.
        """
        found: list[str] = []
        whole = set()
        for file in self.manifest.files.values():
            with _noting(found):
                self._files.check_size(file.name, file.size)
                whole.add(file.name)
        for unit in self.units() if deep else ():
            if unit.file in whole:
                with _noting(found):
                    self.check(unit)
        return found

    def _rest(self, file: str) -> list[tuple[int, int]]:
        """(offset, bytes) of what is outside a file's pieces."""
        size = self.manifest.files[file].size
        spans = [(piece.offset, piece.nbytes) for _, piece in self.manifest.pieces[file]]
        found, at = [], 0
        for offset, nbytes in [*spans, (size, 0)]:
            if at < offset:
                found.append((at, offset - at))
            at = offset + nbytes
        return found

    def _tree(self, skeleton: Any) -> Any:
        tensors = {name: self.tensor(name) for name in state.names(skeleton)}
        return state.unflatten(skeleton, tensors)

    def _damaged(self, file: str, what: str) -> DamagedError:
        return DamagedError(f"{self.folder}/{file}: {what}")


@contextlib.contextmanager
def _noting(found: list[str]) -> Iterator[None]:
    try:
        yield
    except DamagedError as error:
        found += error.problems


class _Files:
    """The files of a folder, opened when they are read; the last ``_OPEN`` stay open."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._handles: dict[str, int] = {}

    def close(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_size(self, name: str, wanted: int) -> None:
        """Raises DamagedError if a file is missing, or of another size."""
        with self._telling(name):
            found = os.stat(self._folder / name, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode):
            raise self._odd(name)
        if found.st_size != wanted:
            raise DamagedError(f"{self._folder}/{name}: {found.st_size} bytes instead of {wanted}")

    def whole(self, name: str, limit: int) -> bytes:
        """The bytes of a small file."""
        with self._telling(name):
            size = os.fstat(self._handle(name)).st_size
        if size > limit:
            raise DamagedError(f"{self._folder}/{name}: larger than {limit} bytes")
        data = bytearray(size)
        self.read(name, 0, memoryview(data), None, "")
        return bytes(data)

    def read(self, name: str, offset: int, out: memoryview, checksum: Any, where: str) -> None:
        """Fill ``out`` and give it to the checksum, chunk by chunk."""
        with self._telling(name, where):
            handle = self._handle(name)
            while out:
                count = os.preadv(handle, [out[:CHUNK]], offset)
                if not count:
                    raise DamagedError(f"{self._folder}/{name}: {where}: it ends at {offset}")
                if checksum is not None:
                    checksum.update(out[:count])
                out, offset = out[count:], offset + count

    def _handle(self, name: str) -> int:
        """A file's descriptor. A pipe must not block, and a link leads out of the folder."""
        handle = self._handles.pop(name, None)
        if handle is None:
            while len(self._handles) >= _OPEN:
                os.close(self._handles.pop(next(iter(self._handles))))
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            handle = os.open(self._folder / name, flags)
        self._handles[name] = handle  # the one used last is the last
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise self._odd(name)
        return handle

    def _odd(self, name: str) -> DamagedError:
        return DamagedError(f"{self._folder}/{name}: no plain file")

    @contextlib.contextmanager
    def _telling(self, name: str, where: str = "") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            place = f"{self._folder}/{name}" + (f": {where}" if where else "")
            if error.errno in _DAMAGE:
                raise DamagedError(f"{place}: {error.strerror}") from error
            raise CheckpointError(f"{place}: cannot be read: {error.strerror}") from error
