"""manifest.json: what a checkpoint holds, where each byte lies, and the checksum of each.

It is one JSON object whose last line but one is the checksum of all bytes before that line:

    {
    "format": "hpcsync-checkpoint",
    ...
    "checksum": "0123456789abcdef0123456789abcdef"
    }

Each byte of a file is under one checksum: those of a piece under the piece's, all others, in the
order in which they stand, under the file's ``rest``. Checksums are XXH3-128 in hex.

Reading it is ``parsing``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import xxhash

from ..errors import CheckpointError
from ..wording import UNPRINTABLE
from .layout import TensorMeta

FORMAT = "hpcsync-checkpoint"
VERSION = 1
MAX_BYTES = 256 << 20  # of the manifest: its values take some ten times as much memory
# In the file's order; all but tensors and files.
PLAIN = (
    *("step", "tokens", "created", "run_id", "ranks", "nodes", "versions", "config"),
    *("common", "own"),
)


class Stored(NamedTuple):
    """Rows of a tensor, and the bytes of a file that they are.

    Attributes:
        start, rows: in the tensor, along its ``TensorMeta.axis``.
        offset, nbytes: in the file.
        xxh3: checksum of the bytes.
    """

    file: str
    start: int
    rows: int
    offset: int
    nbytes: int
    xxh3: str


class StoredFile(NamedTuple):
    """A file; ``rest`` is the checksum of the bytes outside all pieces."""

    name: str
    size: int
    rest: str


class StoredTensor(NamedTuple):
    """A tensor and its pieces, in the order of their rows; without elements it has none."""

    meta: TensorMeta
    pieces: tuple[Stored, ...]


@dataclass(frozen=True, kw_only=True)
class Document:
    """What a checkpoint says of a run, without where it lies.

    Attributes:
        step, tokens: trained so far.
        created: date and time, ISO 8601.
        nodes: the ranks of each node.
        versions: of hpcsync, torch, numpy, python, h5py and mpi.
        config: the resolved deck, TOML.
        common: skeleton (``state.flatten``) of what all ranks hold alike.
        own: skeletons of what each rank holds; the names of their tensors begin with ``ranks/3/``.
    """

    step: int
    tokens: int
    created: str
    run_id: str
    nodes: tuple[tuple[int, ...], ...]
    versions: Mapping[str, str]
    config: str
    common: Any
    own: tuple[Any, ...]

    @property
    def ranks(self) -> int:
        return len(self.own)


@dataclass(frozen=True, kw_only=True)
class Manifest(Document):
    """A document with its tensors, by name, and the files that hold them, index.h5 among them."""

    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, StoredFile]

    @property
    def nbytes(self) -> int:
        """Of all files without the manifest."""
        return sum(file.size for file in self.files.values())

    @functools.cached_property
    def pieces(self) -> Mapping[str, Sequence[tuple[str, Stored]]]:
        """The pieces of each file with their tensors' names, in the order of their bytes."""
        found: dict[str, list[tuple[str, Stored]]] = {name: [] for name in self.files}
        for name, entry in self.tensors.items():
            for piece in entry.pieces:
                found[piece.file].append((name, piece))
        for pieces in found.values():
            pieces.sort(key=lambda each: each[1].offset)
        return found


def own_prefix(rank: int) -> str:
    """What the names of a rank's own tensors begin with."""
    return f"ranks/{rank}/"


def digest(data: Any) -> str:
    """The checksum of bytes."""
    return xxhash.xxh3_128(data).hexdigest()


def dump(manifest: Manifest) -> bytes:
    """The manifest as it stands in its file.

    Raises:
        CheckpointError: it is larger than what is read again.
    """
    tensors = (
        {
            "name": name,
            "dtype": entry.meta.dtype,
            "shape": entry.meta.shape,
            "pieces": [piece._asdict() for piece in entry.pieces],
        }
        for name, entry in manifest.tensors.items()
    )
    lines = [
        f'"format": {_json(FORMAT)}',
        f'"version": {VERSION}',
        *(f'"{name}": {_json(getattr(manifest, name))}' for name in PLAIN),
        f'"tensors": {_table(tensors)}',
        f'"files": {_table(file._asdict() for file in manifest.files.values())}',
    ]
    body = ("{\n" + ",\n".join(lines) + ",\n").encode("ascii")
    whole = body + f'"checksum": "{digest(body)}"\n}}\n'.encode("ascii")
    if len(whole) > MAX_BYTES:
        raise CheckpointError(
            f"manifest.json: {len(whole)} bytes, more than {MAX_BYTES}; keep fewer or larger "
            'tensors, or set checkpoint.files = "node"'
        )
    return whole


def shown(name: str) -> str:
    """A name in a message, without what could upset a terminal."""
    short = name if len(name) <= 200 else name[:197] + "..."
    return ascii(short) if UNPRINTABLE.search(short) else short


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _table(rows: Any) -> str:
    """A list with a row a line."""
    return "[\n" + ",\n".join(map(_json, rows)) + "\n]"
