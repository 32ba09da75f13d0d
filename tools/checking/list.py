"""list: the checkpoints of a run, and what else lies in their folder."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from hpcsync import checkpoint
from hpcsync.checkpoint import folder, source
from hpcsync.errors import CheckpointError, DamagedError, UserError
from tools import reporting
from tools.reporting import Column, Report, Table, size

NAME = "list"
HELP = "the checkpoints of a run: step, tokens, size, whether it is whole at first sight"

_COLUMNS = (
    Column("name", "name"),
    Column("step", "step"),
    Column("tokens", "tokens"),
    Column("created", "created"),
    Column("ranks", "ranks"),
    Column("tensors", "tensors"),
    Column("bytes", "size", size),
    Column("state", "state"),
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("run", type=Path, help="a run's folder, or its folder checkpoints")
    reporting.add_form(parser)


def run(options: argparse.Namespace) -> int:
    """Print the list; the status is 0 whatever was found."""
    place = source.checkpoints_of(options.run)
    try:
        names = sorted(each.name for each in place.iterdir())
    except OSError as error:
        raise UserError(f"{place}: {error.strerror}; name a run's folder") from error
    latest = folder.latest(place)
    rows = [row for name in names if (row := _row(place / name, latest))]
    if not rows:
        raise UserError(f"{place}: holds no checkpoint")
    table = Table("checkpoints", "", _COLUMNS, rows)
    after = [] if latest is None or latest in names else [f"latest names {latest}, which is gone"]
    reporting.show(Report([table], after=after, values={"latest": latest}), options)
    return 0


def _row(path: Path, latest: str | None) -> list[Any] | None:
    """What is told of a folder; None if it has nothing to do with checkpoints."""
    step = folder.step_of(path.name)
    if step is None:
        unfinished = re.fullmatch(r"\.(step-\d+)(-\d+)?\.tmp", path.name)
        aside = re.fullmatch(r"(step-\d+)\.damaged(-\d+)?", path.name)
        if not (unfinished or aside) or not path.is_dir():
            return None
        told = "being written, or left behind" if unfinished else "damaged, set aside"
        return [path.name, None, None, None, None, None, _bytes(path), told]
    try:
        with checkpoint.open(path) as found:
            manifest = found.manifest
    except DamagedError as error:
        problem = str(error.problems[0]).removeprefix(f"{path}/")
        return [path.name, step, None, None, None, None, _bytes(path), f"damaged: {problem}"]
    except CheckpointError as error:
        problem = str(error).removeprefix(f"{path}/")
        return [path.name, step, None, None, None, None, _bytes(path), problem]
    told = "complete, latest" if path.name == latest else "complete"
    counts = [manifest.ranks, len(manifest.tensors), manifest.nbytes]
    return [path.name, step, manifest.tokens, manifest.created, *counts, told]


def _bytes(path: Path) -> int:
    """Of the files of a folder, as far as they stay while they are counted."""
    total = 0
    for each in path.glob("*"):
        try:
            total += each.lstat().st_size
        except OSError:
            continue
    return total
