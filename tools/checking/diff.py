"""diff: what differs between two checkpoints, tensor by tensor; exit status 1 if anything does.

Tensors are equal when their bits are. Otherwise: the largest difference of two elements, and the
2-norm of the difference over that of the first.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from hpcsync.checkpoint.reader import Checkpoint
from hpcsync.checkpoint.snapshot import view
from tools import reporting
from tools.reporting import Column, Report, Table, plain

from . import sources
from .show import wide

NAME = "diff"
HELP = "what differs between two checkpoints, per tensor; the exit status is 1 if anything does"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    sources.add_source(parser, "a", "b")
    sources.add_names(parser)
    parser.add_argument("--all", action="store_true", help="show equal tensors, too")
    reporting.add_form(parser)


def run(options: argparse.Namespace) -> int:
    """Print the differences; 1 if there are any, else 0."""
    with sources.opened(options.a) as a, sources.opened(options.b) as b:
        tensors = compare(a, b, options.name)
        values = compare_values(a, b, options.name)
        sources.check_any(tensors or values, options.name, f"{a.folder} and {b.folder}")
        facts = {"a": str(a.folder), "b": str(b.folder)}
    differ = [row for row in tensors if row[1] != "equal"]
    others = [row for row in values if row[1] != row[2]]
    whole = options.all or options.csv or options.json
    columns = (
        *(Column("name", "tensor"), Column("verdict", "")),
        *(Column("max_abs", "max abs", plain), Column("relative", "relative norm", plain)),
    )
    shown = (
        Column("name", "value of"),
        *(Column(name, name, sources.shown) for name in ("a", "b")),
    )
    report = Report(
        tables=[
            Table("tensors", "", columns, tensors if whole else differ),
            Table("values", "", shown, others),
        ],
        before=[f"{key}: {value}" for key, value in facts.items()],
        after=[
            f"{len(differ)} of {len(tensors)} tensors and {len(others)} of {len(values)} other "
            "values differ"
        ],
        values={**facts, "differ": bool(differ or others)},
    )
    reporting.show(report, options)
    return int(bool(differ or others))


def compare(a: Checkpoint, b: Checkpoint, patterns: list[str]) -> list[list[Any]]:
    """Of each tensor: name, verdict, largest difference, relative norm."""
    rows: list[list[Any]] = []
    there, here = a.manifest.tensors, b.manifest.tensors
    for name in dict.fromkeys((*there, *here)):
        if not sources.meant(name, patterns):
            continue
        if name not in here or name not in there:
            rows.append([name, "only in a" if name in there else "only in b", None, None])
            continue
        one, other = there[name].meta, here[name].meta
        if one != other:
            words = [f"{each.dtype} {sources.shape(each.shape)}" for each in (one, other)]
            rows.append([name, f"{words[0]}, {words[1]}", None, None])
            continue
        rows.append([name, *difference(a.tensor(name), b.tensor(name))])
    return rows


def difference(one: Tensor, other: Tensor) -> tuple[str, float | None, float | None]:
    """Verdict, largest difference and relative norm of tensors of one shape and dtype."""
    if not one.numel() or torch.equal(torch.from_numpy(view(one)), torch.from_numpy(view(other))):
        return "equal", 0.0, 0.0
    first, second = wide(one), wide(other)
    bad = ~(torch.isfinite(first) & torch.isfinite(second))
    if bad.any():
        first, second = first[~bad], second[~bad]
    apart = (second - first).abs()
    largest = float(apart.max()) if apart.numel() else 0.0
    norm, base = float(torch.linalg.vector_norm(apart)), float(torch.linalg.vector_norm(first))
    relative = norm / base if base else float("inf") if norm else 0.0
    return "differs, with NaN or Inf" if bad.any() else "differs", largest, relative


def compare_values(a: Checkpoint, b: Checkpoint, patterns: list[str]) -> list[list[Any]]:
    """Name, and the value in each, of all that is no tensor; texts, so that NaN equals itself."""
    one, other = _facts(a), _facts(b)
    return [
        [name, one.get(name, "(none)"), other.get(name, "(none)")]
        for name in dict.fromkeys((*one, *other))
        if sources.meant(name, patterns)
    ]


def _facts(found: Checkpoint) -> dict[str, str]:
    return {name: repr(value) for name, value in sources.values(found).items()} | {
        "ranks": str(found.manifest.ranks)
    }
