"""Reading manifest.json, which may come from a stranger.

Nothing is believed before it was checked: types, names, shapes against sizes, that the pieces make
up each tensor once and do not overlap in the files, that the states name each tensor once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import CheckpointError, DamagedError
from ..wording import UNPRINTABLE
from . import state
from .layout import MAX_DIMS, SIZES, TensorMeta
from .manifest import (
    FORMAT,
    MAX_BYTES,
    PLAIN,
    VERSION,
    Manifest,
    Stored,
    StoredFile,
    StoredTensor,
    digest,
    own_prefix,
    shown,
)

_MAX = 1 << 62  # of any size, so that sums of two stay within 64 bits
_CHECKSUM = re.compile("[0-9a-f]{32}")
_TAIL = re.compile(rb'"checksum": "([0-9a-f]{32})"\n}\n')
_TAIL_BYTES = 49
_FILE = re.compile(r"(rank|node)-\d{5,9}\.h5|index\.h5")
_KEYS = frozenset({"format", "version", *PLAIN, "tensors", "files", "checksum"})


def parse(data: bytes) -> Manifest:
    """A manifest from the bytes of its file, all of it checked.

    Raises:
        DamagedError: it is cut, altered, or contradicts itself.
        CheckpointError: it is of a newer format.
    """
    try:
        return _manifest(_load(data))
    except _Fault as fault:
        raise DamagedError(f"manifest.json: {fault}") from None


class _Fault(Exception):  # noqa: N818  (never leaves this module)
    """What is wrong with the manifest."""


def _load(data: bytes) -> dict[str, Any]:
    found = _TAIL.fullmatch(data[-_TAIL_BYTES:])
    if len(data) > MAX_BYTES:
        raise _Fault(f"larger than {MAX_BYTES} bytes")
    if found is None:
        raise _Fault("it is cut or was altered: it does not end with its checksum")
    if digest(memoryview(data)[:-_TAIL_BYTES]) != found[1].decode():
        raise _Fault("its checksum does not fit: it was altered")
    try:
        text = data.decode("ascii")
        read = json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise _Fault("it is no JSON, or too deep") from None
    if not isinstance(read, dict) or read.get("format") != FORMAT:
        raise _Fault("it is of another format")
    version = _count(read.get("version"), "version", low=1)
    if version > VERSION:
        raise CheckpointError(
            f"manifest.json: version {version} of the format, and this hpcsync reads {VERSION}; "
            "update hpcsync"
        )
    _keys(read, _KEYS, "the manifest")
    return read


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    return found


def _no_constant(_: str) -> Any:
    raise ValueError


def _manifest(read: dict[str, Any]) -> Manifest:
    files = _files(read["files"])
    tensors = _tensors(read["tensors"], files)
    _check_overlaps(tensors)
    ranks = _count(read["ranks"], "ranks", low=1, high=10**7)
    own = _list(read["own"], "own")
    if len(own) != ranks:
        raise _Fault("own: not one state a rank")
    _check_names(read["common"], own, tensors)
    versions = read["versions"]
    if not isinstance(versions, dict):
        raise _Fault("versions: no object")
    return Manifest(
        step=_count(read["step"], "step"),
        tokens=_count(read["tokens"], "tokens"),
        created=_text(read["created"], "created"),
        run_id=_text(read["run_id"], "run_id"),
        nodes=_nodes(read["nodes"], ranks),
        versions={name: _text(version, "versions") for name, version in versions.items()},
        config=_text(read["config"], "config"),
        common=read["common"],
        own=tuple(own),
        tensors=tensors,
        files=files,
    )


def _files(read: Any) -> dict[str, StoredFile]:
    found: dict[str, StoredFile] = {}
    for each in _list(read, "files"):
        _keys(each, StoredFile._fields, "a file")
        name = _text(each["name"], "a file's name")
        if not _FILE.fullmatch(name) or name in found:
            raise _Fault(f"file {shown(name)}: not a name of a checkpoint's file, or twice")
        size = _count(each["size"], f"file {name}: size")
        found[name] = StoredFile(name, size, _checksum(each["rest"], f"file {name}"))
    return found


def _tensors(read: Any, files: Mapping[str, StoredFile]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for each in _list(read, "tensors"):
        _keys(each, ("name", "dtype", "shape", "pieces"), "a tensor")
        name = _text(each["name"], "a tensor's name")
        where = f"tensor {shown(name)}"
        if not name or UNPRINTABLE.search(name) or name in found:
            raise _Fault(f"{where}: no name, or twice")
        meta = _meta(name, each, where)
        pieces = tuple(_piece(piece, meta, files, where) for piece in _list(each["pieces"], where))
        _check_rows(meta, pieces, where)
        found[name] = StoredTensor(meta, pieces)
    return found


def _meta(name: str, read: dict[str, Any], where: str) -> TensorMeta:
    dtype, shape = _text(read["dtype"], where), _list(read["shape"], where)
    if dtype not in SIZES:
        raise _Fault(f"{where}: dtype {shown(dtype)} is not known")
    if len(shape) > MAX_DIMS:
        raise _Fault(f"{where}: more than {MAX_DIMS} dimensions")
    count = SIZES[dtype]
    for size in shape:
        # As if none were 0: strides of a tensor without elements must be numbers, too.
        count *= max(_count(size, f"{where}: shape"), 1)
        if count > _MAX:
            raise _Fault(f"{where}: too large")
    return TensorMeta(name, dtype, tuple(shape))


def _piece(read: Any, meta: TensorMeta, files: Mapping[str, StoredFile], where: str) -> Stored:
    _keys(read, Stored._fields, f"{where}: a piece")
    file = _text(read["file"], where)
    if file not in files:
        raise _Fault(f"{where}: file {shown(file)} is not listed")
    found = Stored(
        file,
        _count(read["start"], f"{where}: start"),
        _count(read["rows"], f"{where}: rows", low=1),
        _count(read["offset"], f"{where}: offset"),
        _count(read["nbytes"], f"{where}: nbytes", low=1),
        _checksum(read["xxh3"], where),
    )
    if found.nbytes != found.rows * meta.row_nbytes:
        raise _Fault(f"{where}: {found.nbytes} bytes are not {found.rows} rows of its shape")
    if found.offset + found.nbytes > files[file].size:
        raise _Fault(f"{where}: it reaches beyond the end of {file}")
    return found


def _check_rows(meta: TensorMeta, pieces: Sequence[Stored], where: str) -> None:
    """The pieces follow on each other and make up the tensor."""
    at = 0
    for piece in pieces:
        if piece.start != at:
            raise _Fault(f"{where}: rows from {at} on are missing or twice")
        at += piece.rows
    if at != (meta.rows if meta.nbytes else 0):
        raise _Fault(f"{where}: {at} of {meta.rows} rows are there")


def _check_overlaps(tensors: Mapping[str, StoredTensor]) -> None:
    spans = sorted(
        (piece.file, piece.offset, piece.nbytes, name)
        for name, entry in tensors.items()
        for piece in entry.pieces
    )
    last, end = "", 0
    for file, offset, nbytes, name in spans:
        if file == last and offset < end:
            raise _Fault(f"tensor {shown(name)}: its bytes in {file} are another's, too")
        last, end = file, offset + nbytes


def _check_names(common: Any, own: Sequence[Any], tensors: Mapping[str, StoredTensor]) -> None:
    """Each tensor stands in the states once, and none is missing."""
    found = state.names(common)
    for rank, each in enumerate(own):
        names = state.names(each)
        if not all(name.startswith(own_prefix(rank)) for name in names):
            raise _Fault(f"own: rank {rank} has a tensor of another's")
        found += names
    if len(found) != len(set(found)) or set(found) != set(tensors):
        raise _Fault("the tensors are not those of the states")


def _nodes(read: Any, ranks: int) -> tuple[tuple[int, ...], ...]:
    nodes = tuple(
        tuple(_count(rank, "nodes", high=ranks - 1) for rank in _list(node, "nodes"))
        for node in _list(read, "nodes")
    )
    if sorted(rank for node in nodes for rank in node) != list(range(ranks)):
        raise _Fault("nodes: not each rank once")
    return nodes


def _keys(read: Any, wanted: Any, where: str) -> None:
    if not isinstance(read, dict) or set(read) != set(wanted):
        raise _Fault(f"{where} lacks a key or has one too many")


def _list(read: Any, where: str) -> list[Any]:
    if not isinstance(read, list):
        raise _Fault(f"{where}: no list")
    return read


def _text(read: Any, where: str) -> str:
    if not isinstance(read, str):
        raise _Fault(f"{where}: no text")
    return read


def _count(read: Any, where: str, low: int = 0, high: int = _MAX) -> int:
    if type(read) is not int or not low <= read <= high:
        raise _Fault(f"{where}: no number from {low} to {high}")
    return read


def _checksum(read: Any, where: str) -> str:
    if not isinstance(read, str) or not _CHECKSUM.fullmatch(read):
        raise _Fault(f"{where}: no checksum")
    return read
