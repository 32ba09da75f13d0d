"""verify: reads every byte of checkpoints and checks it; exit status 1 if anything is damaged."""

from __future__ import annotations

import argparse
from pathlib import Path

from hpcsync import checkpoint
from hpcsync.checkpoint import folder, source
from hpcsync.checkpoint.reader import find
from hpcsync.errors import DamagedError
from tools import reporting
from tools.reporting import Column, Report, Table, size

NAME = "verify"
HELP = "check every byte; the exit status is 1 if anything is damaged"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="RUN|CHECKPOINT",
        help="a checkpoint's folder, or a run's: all of its checkpoints",
    )
    parser.add_argument(
        "--quick", action="store_true", help="manifest and sizes of files only; reads no tensor"
    )
    reporting.add_form(parser)


def run(options: argparse.Namespace) -> int:
    """Print what was found; 1 if a checkpoint is damaged, else 0."""
    path: Path = options.source
    alone = (path / folder.MANIFEST).exists() or folder.step_of(path.name) is not None
    places = [path] if alone else find(source.checkpoints_of(path))
    if not places:
        source.locate(path)  # tells what is missing
    checked, faults = [], []
    for place in places:
        problems, nbytes = check(place, deep=not options.quick)
        checked.append([place.name, nbytes, len(problems)])
        faults += [[place.name, problem.removeprefix(f"{place}/")] for problem in problems]
    columns = (
        *(Column("name", "checkpoint"), Column("bytes", "size", size)),
        Column("problems", "problems"),
    )
    tables = [
        Table("checkpoints", "", columns, checked),
        Table("problems", "", (Column("name", "checkpoint"), Column("problem", "")), faults),
    ]
    what = "manifests and sizes are" if options.quick else "every byte is"
    after = ["damaged"] if faults else [f"{what} as written"]
    reporting.show(Report(tables, after=after, values={"damaged": bool(faults)}), options)
    return int(bool(faults))


def check(place: Path, *, deep: bool) -> tuple[list[str], int | None]:
    """The problems of a checkpoint, and its bytes where the manifest can be read."""
    try:
        with checkpoint.open(place) as found:
            return found.verify(deep=deep), found.manifest.nbytes
    except DamagedError as error:
        return list(error.problems), None
