"""Files of the user's cache folder, which jobs write and later jobs may find."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path


def folder(env: Mapping[str, str] | None = None) -> Path:
    """The cache folder of this program."""
    env = os.environ if env is None else env
    base = env.get("XDG_CACHE_HOME") or os.path.join(env.get("HOME") or "~", ".cache")
    return Path(base).expanduser() / "hpcsync"


def write(path: Path, data: bytes) -> bool:
    """Put a file there, whole at once; whether that was done."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(data)
        aside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()
        return False
    return True
