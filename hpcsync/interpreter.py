"""Whether this Python will do. Parses on old ones, so that they can say so."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from importlib import util

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # holds the package
OLDEST = (3, 11)
_NEWEST = 20
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PALS_RANKID", "PMI_RANK", "SLURM_PROCID")
# A launcher ends all ranks once one has failed; rank 0 should have told why by then.
_HEAD_START_S = 1.0


def complaint(
    version: tuple[int, ...], path: str | None, root: str | os.PathLike[str]
) -> tuple[str, str] | None:
    """What is wrong with a Python, and the command that mends it; None if nothing.

    Args:
        version: of Python.
        path: PATH, where a newer one may be.
        root: the folder that holds the package.
    """
    if tuple(version[:2]) >= OLDEST:
        return None
    named, needed = (".".join(map(str, each)) for each in (version[:2], OLDEST))
    why = f"Python {named} is too old: hpcsync needs {needed} or newer"
    # The newest ones are those for which packages may not be there yet.
    for minor in range(OLDEST[1], _NEWEST + 1):
        newer = shutil.which(f"python3.{minor}", path=path)
        if newer:
            return why, environment(newer, root)
    return why, "python3 -m pip install --user uv && ~/.local/bin/uv python install 3.12"


def environment(python: str, root: str | os.PathLike[str]) -> str:
    """The command that makes a virtual environment with hpcsync, by ``python``.

    Args:
        root: the folder that holds the package.
    """
    bootstrap = os.path.join(str(root), "tools", "bootstrap.py")
    if os.path.isfile(bootstrap):
        activate = os.path.join(str(root), ".venv", "bin", "activate")
        return f"{shlex.quote(python)} {shlex.quote(bootstrap)} setup && . {shlex.quote(activate)}"
    make = f"{shlex.quote(python)} -m venv ~/hpcsync && . ~/hpcsync/bin/activate"
    return f"{make} && python -m pip install 'hpcsync[mpi]'"


def first(env: Mapping[str, str]) -> bool:
    """Whether this is rank 0 of its job as its launcher tells, or in none."""
    return next((env[name] for name in _RANKS if name in env), "0") == "0"


def complaint_here() -> tuple[str, str] | None:
    """What is wrong with the Python that runs, and the command that mends it."""
    return complaint(tuple(sys.version_info[:3]), os.environ.get("PATH"), _ROOT)


def too_old() -> str:
    """What is to be told of the Python that runs, in a line; empty if it is new enough."""
    told = complaint_here()
    return "" if told is None else f"{told[0]}; `{told[1]}`"


def fits(*packages: str) -> bool:
    """Whether a command can go on; if not, rank 0 has told why in a line.

    Args:
        packages: what the command imports before it can tell of errors itself.
    """
    told = too_old() or _lacks(packages)
    if told and first(os.environ):
        print(f"hpcsync: error: {told}", file=sys.stderr, flush=True)
    elif told:
        time.sleep(_HEAD_START_S)
    return not told


def _lacks(packages: tuple[str, ...]) -> str:
    missing = [name for name in packages if name not in sys.modules and not util.find_spec(name)]
    if not missing:
        return ""
    activate = os.path.join(_ROOT, ".venv", "bin", "activate")
    there = os.path.isfile(activate)
    fix = f". {shlex.quote(activate)}" if there else environment(sys.executable, _ROOT)
    return (
        f"Python: {sys.executable} has no {', '.join(missing)}: activate the environment that "
        f"hpcsync is in{'' if there else ', or make one'}: `{fix}`"
    )
