"""What a format is: a module that reads tensors by name from a file, and writes them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from torch import Tensor

from hpcsync.errors import UserError


class Format(Protocol):
    """A module that can do this."""

    def read(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a file, on the CPU, each with memory of its own or shared as it was.

        Raises:
            UserError: it cannot be read, is damaged, or holds something else.
        """
        ...

    def write(self, path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
        """Write tensors.

        Args:
            notes: texts that go with them, where the format has a place for such.

        Raises:
            OSError: the file cannot be written.
            UserError: a tensor has no place in the format, or a package is missing.
        """
        ...


@contextmanager
def aside(path: Path, *, force: bool) -> Iterator[Path]:
    """A name to write to: what is there at the end gets the name ``path``, and is on the disk.

    Raises:
        UserError: ``path`` exists and ``force`` is not given, or it cannot be written.
    """
    taken = f"--to: {path} exists; name another file, or give --force to replace it"
    if path.is_dir():
        raise UserError(f"--to: {path} is a folder; name a file in it")
    if path.exists() and not force:
        raise UserError(taken)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        if force:
            os.replace(part, path)
        else:
            _place(part, path)
        _sync_folder(path.parent)
    except FileExistsError:
        raise UserError(taken) from None
    except OSError as error:
        raise UserError(f"--to: {path}: {error.strerror or error}; name another file") from error
    finally:
        with suppress(OSError):
            part.unlink()


def _place(part: Path, path: Path) -> None:
    """Rename, but never over a file that has come meanwhile, where the file system can tell."""
    try:
        os.link(part, path)
    except OSError as error:
        if error.errno == errno.EEXIST:
            raise
        os.replace(part, path)  # no hard links here


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some file systems refuse it for folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
