"""show: what a checkpoint holds: tensors with shapes, dtypes and norms, and plain values."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from hpcsync.checkpoint.reader import Checkpoint
from hpcsync.checkpoint.state import torch_dtype
from tools import reporting
from tools.reporting import Column, Report, Table, plain, size

from . import sources

NAME = "show"
HELP = "tensors with shapes, dtypes and norms; steps, versions and other values"

_MOST = 40  # values that a table for people shows


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    sources.add_source(parser)
    sources.add_names(parser)
    reporting.add_form(parser)
    parser.add_argument("--no-norms", action="store_true", help="do not read the tensors")
    parser.add_argument("--values", action="store_true", help="all values, not the first 40")


def run(options: argparse.Namespace) -> int:
    """Print what there is.

    Raises:
        DamagedError: a tensor that is read is not what was written.
    """
    with sources.opened(options.source) as found:
        reporting.show(report(found, options), options)
    return 0


def report(found: Checkpoint, options: argparse.Namespace) -> Report:
    """What the checkpoint holds."""
    manifest = found.manifest
    rows = [
        [
            *(name, entry.meta.dtype, sources.shape(entry.meta.shape), entry.meta.nbytes),
            len({piece.file for piece in entry.pieces}),
            *([None] * 4 if options.no_norms else figures(found.tensor(name))),
        ]
        for name, entry in manifest.tensors.items()
        if sources.meant(name, options.name)
    ]
    values = [
        [name, value]
        for name, value in sources.values(found).items()
        if sources.meant(name, options.name)
    ]
    sources.check_any(rows or values, options.name, found.folder)
    people = not (options.csv or options.json)
    left = len(values) - _MOST if people and not options.values else 0
    nodes = f"{len(manifest.nodes)} node{'s' if len(manifest.nodes) > 1 else ''}"
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    return Report(
        tables=[_tensors(rows, norms=not options.no_norms), _values(values, left)],
        before=[
            f"{found.folder}: step {manifest.step}, {manifest.tokens:,} tokens, {manifest.created}",
            f"run {manifest.run_id} of {manifest.ranks} ranks on {nodes}; {versions}",
            f"{len(manifest.tensors)} tensors, {size(manifest.nbytes)} in "
            f"{len(manifest.files)} files",
        ],
        after=[f"{left} more values: --values shows them"] if left > 0 else [],
        values={
            "folder": str(found.folder),
            **{key: getattr(manifest, key) for key in ("step", "tokens", "created", "run_id")},
            "ranks": manifest.ranks,
            "nodes": manifest.nodes,
            "versions": dict(manifest.versions),
            "bytes": manifest.nbytes,
        },
    )


def _tensors(rows: list[list[Any]], *, norms: bool) -> Table:
    columns = [
        *(Column("name", "tensor"), Column("dtype", "dtype"), Column("shape", "shape")),
        *(Column("bytes", "size", size), Column("files", "files")),
    ]
    if not norms:
        return Table("tensors", "", columns, [row[: len(columns)] for row in rows])
    columns += [Column(key, key, plain) for key in ("norm", "min", "max")]
    return Table("tensors", "", [*columns, Column("bad", "NaN, Inf")], rows)


def _values(rows: list[list[Any]], left: int) -> Table:
    columns = (Column("name", "value of"), Column("value", "", sources.shown))
    return Table("values", "", columns, rows[:_MOST] if left > 0 else rows)


def figures(tensor: Tensor) -> tuple[float | None, float | None, float | None, int]:
    """2-norm, least and largest element, each of the finite ones, and how many are not finite."""
    flat = wide(tensor).flatten()
    finite = flat[torch.isfinite(flat)]
    bad = flat.numel() - finite.numel()
    if not finite.numel():
        return None, None, None, bad
    norm = float(torch.linalg.vector_norm(finite))
    if flat.is_complex():
        return norm, None, None, bad
    return norm, float(finite.min()), float(finite.max()), bad


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float64, or complex128."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch_dtype("float64"))
