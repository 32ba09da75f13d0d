"""Writes an HDF5 file in a folder, with HDF5's own locks, and reads it."""

from __future__ import annotations

import fcntl
import shutil
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np

from . import nearest, tell


def main(folder: str) -> None:
    """Tell version, whether it was built with MPI, whether files can be locked, and written."""
    mpi = bool(h5py.get_config().mpi)
    tell(version=h5py.__version__, hdf5=h5py.version.hdf5_version, mpi=mpi)
    own = Path(tempfile.mkdtemp(prefix=".hpcsync-doctor-", dir=nearest(folder)))
    try:
        tell(locks=_locks(own / "lock"))
        path = own / "file.h5"
        data = np.arange(1000)
        with h5py.File(path, "w") as file:
            file["data"] = data
        with h5py.File(path, "r") as file:
            tell(right=bool((file["data"][:] == data).all()))
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _locks(path: Path) -> str:
    """Why the file system cannot lock a file; empty if it can."""
    with open(path, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.strerror or str(error)
    return ""


if __name__ == "__main__":
    main(sys.argv[1])
