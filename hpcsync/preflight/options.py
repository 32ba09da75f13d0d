"""The command line of ``python -m hpcsync.preflight``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from ..config import CommConfig
from ..errors import UserError

SLOW = 0.8
_MOST_THREADS = 1024


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # Raised rather than printed: N ranks would print it N times.
        raise UserError(f"command line: {message}; --help lists what there is")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Understand the command line; ``--help`` prints and exits.

    Raises:
        UserError: it cannot be understood.
    """
    parser = _Parser(
        prog="python -m hpcsync.preflight",
        description="Measure and check the nodes of a job and the links between them: start it "
        "as the job will be started, under mpirun or srun, before the job.",
        epilog="Exit status: 0 all well; 4 nodes are named, slow or wrong; 2 it could not be "
        "started so; 1 it failed.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object")
    add(
        "--save",
        default=CommConfig().costs,
        metavar="PATH",
        help="where the costs of links are kept for compress.codec=auto and trace.py whatif "
        "(comm.costs of the deck; default: %(default)s); '' to keep nothing",
    )
    add(
        "--slow",
        type=float,
        default=SLOW,
        metavar="SHARE",
        help="name nodes below this share of the median (default: %(default)s)",
    )
    add(
        "--seconds",
        type=float,
        default=60.0,
        help="do not begin further turns of pairs after so long (default: %(default)g)",
    )
    add(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="after which a rank that does not answer is taken for gone (default: %(default)g)",
    )
    add("--threads", type=int, default=1, help="of torch a rank, as train.threads (default: 1)")
    add(
        "--ranks-per-node",
        type=int,
        default=0,
        metavar="N",
        help="as topology.ranks_per_node; 0: nodes are told by host name",
    )
    options = parser.parse_args(argv)
    if not 0 < options.slow < 1:
        parser.error(f"--slow: must be between 0 and 1, not {options.slow:g}")
    for name in ("seconds", "timeout"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name}: must be above 0, not {getattr(options, name):g}")
    if options.ranks_per_node < 0:
        parser.error("--ranks-per-node: must be 0 or more")
    if not 0 <= options.threads <= _MOST_THREADS:
        parser.error(f"--threads: must be from 0 to {_MOST_THREADS}")
    return options
