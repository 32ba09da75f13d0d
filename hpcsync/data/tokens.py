"""A file of tokens in HDF5, read as it is needed.

The file holds a one-dimensional dataset ``tokens`` of unsigned integers of 8, 16 or 32 bits, with
the size of the vocabulary in its attribute ``vocab``; 8-bit tokens without it are plain bytes::

    with h5py.File("corpus.h5", "w") as file:
        file.create_dataset("tokens", data=ids.astype("uint16")).attrs["vocab"] = 50257
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpcsync.data.base import Source, TokenSource, Unit, split_point
from hpcsync.errors import DataError

if TYPE_CHECKING:
    from hpcsync.config import DataConfig

_PROBE = 1 << 16


def build(config: DataConfig, *, context: int, seed: int, dataset: str = "tokens") -> Source:
    """The tokens of ``dataset`` in the file ``config.path``; the tail is held out.

    Raises ``DataError`` when the file is missing, empty, unreadable, not HDF5 or too short, or
    the dataset is missing or of another form.
    """
    where = f"data.path = {config.path!r}"
    tokens = _open(config.path, where, dataset)
    vocab, unit = _vocabulary(tokens, where)
    length = int(tokens.shape[0])
    split = split_point(
        length, context=context, val_fraction=config.val_fraction, unit=unit, what=where
    )

    def read(lo: int, hi: int) -> NDArray[Any]:
        try:
            part: NDArray[Any] = tokens[lo:hi]
        except OSError as exc:
            raise DataError(f"{where}: cannot read tokens {lo} to {hi}: {exc}") from exc
        return part

    ends = read(0, min(_PROBE, length)).tobytes() + read(max(0, length - _PROBE), length).tobytes()
    return TokenSource(
        read,
        length,
        split=split,
        context=context,
        vocab=vocab,
        unit=unit,
        what=config.path,
        fingerprint=f"{length}-{vocab}-{zlib.crc32(ends):08x}",
    )


def _open(text: str, where: str, name: str) -> h5py.Dataset:
    if not text:
        raise DataError(
            "data.path: data.name = 'tokens' needs an HDF5 file, such as data.path=tokens.h5"
        )
    path = Path(text).expanduser()
    if not path.exists():
        raise DataError(
            f"{where}: there is no such file, seen from {os.getcwd()}; check the path and that "
            "every node sees it"
        )
    try:
        with open(path, "rb") as probe:
            if not probe.read(1):
                raise DataError(f"{where} is empty: give a file with a dataset {name!r}")
        # Parallel file systems often refuse file locks, and nothing is written here.
        file = h5py.File(path, "r", locking=False)
    except OSError as exc:
        # HDF5's own errors carry no errno text; the system's do.
        if exc.strerror:
            text = f"cannot read it: {exc.strerror}; check its permissions"
        else:
            text = f"not an HDF5 file, or a damaged one; give a file with a dataset {name!r}"
        raise DataError(f"{where}: {text}") from exc
    tokens = file.get(name)
    if not isinstance(tokens, h5py.Dataset):
        held = sorted(key for key, value in file.items() if isinstance(value, h5py.Dataset))
        raise DataError(
            f"{where}: there is no dataset {name!r} in it, only: {', '.join(held) or 'none'}; "
            "name one by data.options.dataset"
        )
    return tokens


def _vocabulary(tokens: h5py.Dataset, where: str) -> tuple[int, Unit]:
    """Vocabulary and unit, after checking the dataset's form."""
    name = str(tokens.name).lstrip("/")
    if tokens.ndim != 1 or tokens.dtype not in (np.uint8, np.uint16, np.uint32):
        raise DataError(
            f"{where}: dataset {name!r} is {tokens.dtype} of shape {tokens.shape}; it must have "
            "one dimension and be uint8, uint16 or uint32"
        )
    given = tokens.attrs.get("vocab")
    if given is None:
        if tokens.dtype == np.uint8:
            return 256, "byte"
        raise DataError(
            f"{where}: dataset {name!r} has no attribute 'vocab'; set it to the number of "
            "distinct tokens"
        )
    if not isinstance(given, int | np.integer) or int(given) < 1:
        raise DataError(
            f"{where}: attribute 'vocab' of dataset {name!r} is {given!r}; it must be a positive "
            "integer"
        )
    return int(given), "token"
