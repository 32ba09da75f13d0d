"""The command line of ``python -m hpcsync.doctor``."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from .. import config as configs
from .. import output
from ..errors import UserError
from ..wording import suggest
from . import checks, examine, report
from .base import System
from .place import Place

_PATIENCE_S = 3.0


def run(argv: Sequence[str]) -> int:
    """Make the checks and print the report on rank 0; the exit status."""
    output.last()
    first = Place.find(os.environ).rank == 0
    try:
        with contextlib.nullcontext() if first else contextlib.redirect_stdout(io.StringIO()):
            options = make_parser().parse_intermixed_args(argv)
        names = _names(options.only)
        config = _config(options.words)
        _check_folder()
    except UserError as error:
        _tell(error)
        return 2
    system = System(limit_s=options.limit, config=config, debug=options.debug)
    try:
        found = examine.examine(system, names)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if found is None:
        return 0
    print(report.document(found) if options.json else report.render(found), flush=True)
    return found.exit_status if output.end() else 1


def _tell(error: UserError) -> None:
    """Once: rank 0's end ends the others, unless it sees no error where they do."""
    place = Place.find(os.environ)
    if place.rank:
        time.sleep(_PATIENCE_S)
    if place.local_rank == 0:
        print(f"hpcsync: error: {error}", file=sys.stderr)


def _check_folder() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(
            f"the current folder cannot be read ({error.strerror}): it was removed, or its file "
            "system is gone; cd to one that is there"
        ) from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # Raised rather than printed: N ranks would print it N times.
        raise UserError(f"command line: {message}; --help lists what there is")


def make_parser() -> _Parser:
    """What there is to choose."""
    parser = _Parser(
        prog="python -m hpcsync.doctor",
        description="Tell what is wrong here, and the command that mends it: on a laptop, a login "
        "node, or under mpirun or srun, where rank 0 reports for all.",
        epilog="Exit status: 0 nothing failed, 1 something did, 2 wrong command line or deck.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="DECK|key=value",
        help="as for hpcsync.train: run.dir and comm.transport.node are looked at",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--only", metavar="CHECK,...", help=f"make these checks only, of {', '.join(checks.ORDER)}"
    )
    parser.add_argument(
        "--debug", action="store_true", help="show where a check failed itself, as a traceback"
    )
    parser.add_argument(
        "--limit",
        type=_seconds,
        default=60.0,
        metavar="SECONDS",
        help="how long a check may take (default: %(default)g); ranks may take three times as long "
        "to meet",
    )
    return parser


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds above 0")
    return value


def _names(only: str | None) -> Sequence[str]:
    if only is None:
        return checks.ORDER
    names = [name.strip() for name in only.split(",") if name.strip()]
    if not names:
        raise UserError("--only: names no check; --help lists them")
    for name in names:
        if name not in checks.ORDER:
            near = suggest(name, checks.ORDER)
            raise UserError(f"--only: there is no check {name}{near}; --help lists them")
    return names


def _config(words: Sequence[str]) -> configs.Config:
    decks = [word for word in words if "=" not in word]
    if len(decks) > 1:
        raise UserError(f"command line: two decks ({', '.join(decks)}); one may extend the other")
    return configs.load(decks[0] if decks else None, [word for word in words if "=" in word])
