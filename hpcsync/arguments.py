"""The command line of ``python -m hpcsync.train``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from .errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """What was asked for.

    Attributes:
        deck: path or name of a deck.
        overrides: ``key=value`` words, in order.
        out: the run folder.
        explain: key or section to explain; empty for all.
        ranks, nodes: to assume in a dry run; 0 if not given.
    """

    deck: str | None
    overrides: tuple[str, ...]
    out: str | None
    explain: str | None
    dry_run: bool
    ranks: int
    nodes: int


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # Raised rather than printed: N ranks would print it N times.
        raise UserError(f"command line: {message}; --help lists what there is")


def parse(argv: Sequence[str]) -> Arguments:
    """Understand the command line; ``--help`` prints and exits.

    Raises:
        UserError: it cannot be understood.
    """
    parser = _make_parser()
    found = parser.parse_intermixed_args(argv)
    decks = [word for word in found.words if "=" not in word or os.path.isfile(word)]
    if len(decks) > 1:
        parser.error(f"two decks ({decks[0]}, {decks[1]}); one may extend the other")
    for name in ("ranks", "nodes"):
        if getattr(found, name) is None:
            continue
        if not found.dry_run:
            parser.error(f"--{name} belongs to --dry-run; mpirun -n N starts N ranks")
        if getattr(found, name) < 1:
            parser.error(f"--{name}: must be at least 1, not {getattr(found, name)}")
    return Arguments(
        deck=decks[0] if decks else None,
        overrides=tuple(word for word in found.words if word not in decks),
        out=found.out,
        explain=found.explain,
        dry_run=found.dry_run,
        ranks=found.ranks or 0,
        nodes=found.nodes or 0,
    )


def _make_parser() -> _Parser:
    parser = _Parser(
        prog="python -m hpcsync.train",
        description="Train a model on all ranks of the job: alone, under mpirun, or under srun.",
        epilog="A deck's keys can be given as section.key=value; --explain tells what they mean.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="DECK|key=value",
        help="a deck (a path, or a name such as laptop), and values that replace its own, such "
        "as train.steps=50",
    )
    parser.add_argument("--out", metavar="DIR", help="the run folder; else a new one in run.dir")
    parser.add_argument(
        "--explain", nargs="?", const="", metavar="KEY", help="tell what a key or section means"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="tell topology, buckets, memory and bytes a step; needs no MPI, trains nothing",
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks to assume in a dry run")
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes to assume in a dry run")
    return parser
