"""The source text of the running Python's standard library, as bytes.

Real text that is always there. Files are taken in an order hashed from their names, so that a
part of the library is a fair sample of it; whole files are held out. Tests, installed packages and
what the build wrote for one machine are left out: ranks whose Pythons have the same version then
read the same text wherever it is installed.
"""

from __future__ import annotations

import os
import platform
import sysconfig
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hpcsync.data.base import Source, TokenSource
from hpcsync.errors import DataError

if TYPE_CHECKING:
    from hpcsync.config import DataConfig

_SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "idle_test",
    "site-packages",
    "test",
    "tests",
}
_SKIPPED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize")


def build(config: DataConfig, *, context: int, seed: int, max_mb: float = 8.0) -> Source:
    """Text of up to ``max_mb`` megabytes (10**6 bytes; 0: all of it), held in memory.

    Raises ``DataError`` when the library's sources are not installed or are too short.
    """
    root = Path(sysconfig.get_path("stdlib"))
    limit = int(max_mb * 1e6) if max_mb > 0 else None
    text, split = _read(root, limit, config.val_fraction)
    name = f"standard library of Python {platform.python_version()}"
    for size, part in ((split, "to train on"), (len(text) - split, "held out")):
        if size <= context:
            raise DataError(
                f"data.name = 'stdlib': {root} gives {size:,} bytes of source text {part}, "
                f"less than one sample of model.context + 1 = {context + 1} bytes: raise "
                "data.options.max_mb or data.val_fraction, lower model.context, or use "
                "data.name=text with data.path"
            )
    tokens = np.frombuffer(text, dtype=np.uint8)
    return TokenSource(
        lambda lo, hi: tokens[lo:hi],
        len(tokens),
        split=split,
        context=context,
        vocab=256,
        unit="byte",
        what=name,
        fingerprint=f"{zlib.crc32(tokens.data):08x}",
    )


def _read(root: Path, limit: int | None, val_fraction: float) -> tuple[bytes, int]:
    """Training text and behind it the held-out text, and where that begins.

    The first files, until they are enough, are held out.
    """
    files = _files(root)
    total = sum(size for _, size in files)
    wanted = total if limit is None else min(limit, total)
    # Parts joined once: many ranks start on a machine at the same time, and copies add up.
    held_out: list[bytes] = []
    training: list[bytes] = []
    left, to_hold_out = wanted, wanted * val_fraction
    for path, _ in files:
        if left <= 0:
            break
        try:
            text = (root / path).read_bytes()[:left]
        except OSError as exc:
            raise DataError(
                f"data.name = 'stdlib': cannot read {root / path}: {exc.strerror}; mend the "
                "Python installation or use data.name=text with data.path"
            ) from exc
        (held_out if wanted - left < to_hold_out else training).append(text)
        left -= len(text)
    split = sum(map(len, training))
    return b"".join(training + held_out), split


def _files(root: Path) -> list[tuple[str, int]]:
    """Relative path and size in bytes of each file, in the order of the names' checksums."""
    found: list[tuple[int, str, int]] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        for name in names:
            if not name.endswith(".py") or name.startswith(_SKIPPED_PREFIXES):
                continue
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            try:
                size = path.stat().st_size
            except OSError:  # a dangling link
                continue
            found.append((zlib.crc32(relative.encode()), relative, size))
    return [(relative, size) for _, relative, size in sorted(found)]
