"""prune: removes checkpoints that the keep rules do not keep. The newest always stays."""

from __future__ import annotations

import argparse
from pathlib import Path

from hpcsync.checkpoint import folder, source
from hpcsync.errors import UserError
from tools import reporting
from tools.reporting import Column, Report, Table, size

NAME = "prune"
HELP = "remove all but the newest, and those of every so many steps"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("run", type=Path, help="a run's folder, or its folder checkpoints")
    parser.add_argument(
        "--keep", type=_count, required=True, metavar="N", help="the newest so many"
    )
    parser.add_argument(
        "--keep-every", type=_count, default=0, metavar="M", help="and those of each M-th step"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")
    reporting.add_form(parser)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write a number from 1")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Remove what is superfluous and say what went."""
    place = source.checkpoints_of(options.run)
    steps = folder.steps(place)
    if not steps:
        source.locate(options.run)  # tells what is missing
    gone = folder.superfluous(steps, options.keep, options.keep_every)
    rows, freed = [], 0
    for step in steps:
        path = place / folder.step_name(step)
        nbytes = sum(each.lstat().st_size for each in path.iterdir())
        if step in gone:
            freed += nbytes
            if not options.dry_run:
                _remove(path)
        told = "kept" if step not in gone else "would go" if options.dry_run else "removed"
        rows.append([path.name, step, nbytes, told])
    columns = (
        *(Column("name", "name"), Column("step", "step"), Column("bytes", "size", size)),
        Column("state", ""),
    )
    would = "would be " if options.dry_run else ""
    report = Report(
        tables=[Table("checkpoints", "", columns, rows)],
        after=[f"{len(gone)} of {len(steps)} {would}removed, {size(freed)} {would}freed"],
        values={"removed": len(gone), "freed": freed, "dry_run": options.dry_run},
    )
    reporting.show(report, options)
    return 0


def _remove(path: Path) -> None:
    try:
        folder.remove(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be removed: {error.strerror}") from error
