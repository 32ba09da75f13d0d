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
        resume: ``auto``, or the path of a run folder or of a checkpoint; None to start anew.
        allow_change: keys that may differ from those of the run that is resumed.
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
    resume: str | None = None
    allow_change: tuple[str, ...] = ()


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
    if found.resume is not None and not found.resume.strip():
        parser.error("--resume: needs auto, or the path of a run folder or of a checkpoint")
    if found.allow_change and found.resume is None:
        parser.error("--allow-change belongs to --resume")
    return Arguments(
        deck=decks[0] if decks else None,
        overrides=tuple(word for word in found.words if word not in decks),
        out=found.out,
        explain=found.explain,
        dry_run=found.dry_run,
        ranks=found.ranks or 0,
        nodes=found.nodes or 0,
        resume=found.resume,
        allow_change=_listed(found.allow_change),
    )


def _listed(given: Sequence[str]) -> tuple[str, ...]:
    """Keys of one or several options, each maybe ``a,b``."""
    return tuple(word.strip() for text in given for word in text.split(",") if word.strip())


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
        "--resume",
        metavar="auto|PATH",
        help="go on from the newest whole checkpoint: of the run folder that --out or the deck "
        "name (auto; starts anew where there is none), of the run folder PATH, or from the "
        "checkpoint PATH in a new run folder. Without a deck that run's own configuration counts",
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="go on though this key, which changes the mathematics, differs from the saved run's; "
        "may be repeated, or list several as a,b",
    )
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
