"""Writes, syncs and renames a file in a folder, as a checkpoint does."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from . import nearest, tell

_NBYTES = 1 << 20


def main(folder: str) -> None:
    """Tell where, how long it took and how much room there is; ends with the system's error."""
    began = time.perf_counter()
    try:
        folder = str(nearest(folder))
        own = Path(tempfile.mkdtemp(prefix=".hpcsync-doctor-", dir=folder))
        try:
            _try(own)
        finally:
            shutil.rmtree(own, ignore_errors=True)
    except OSError as error:
        sys.exit(f"{error.strerror or error} ({type(error).__name__})")
    seconds = time.perf_counter() - began
    tell(seconds=seconds, free=shutil.disk_usage(folder).free)


def _try(own: Path) -> None:
    data = os.urandom(_NBYTES)
    fresh, final = own / "fresh", own / "final"
    final.write_bytes(b"old")
    with open(fresh, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, final)
    handle = os.open(own, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    if fresh.exists() or final.read_bytes() != data:
        raise OSError(0, "a file that was written, synced and renamed does not hold what it should")


if __name__ == "__main__":
    main(sys.argv[1])
