"""Whether this Python will do. Parses on old ones, so that they can say so."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
from collections.abc import Mapping

from .. import __version__

FORMAT = 1  # of the report as JSON
OLDEST = (3, 11)
_NEWEST = 20
_RANKS = ("OMPI_COMM_WORLD_RANK", "PALS_RANKID", "PMI_RANK", "SLURM_PROCID")


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
    """Whether this is rank 0 of its job, or in none."""
    return next((env[name] for name in _RANKS if name in env), "0") == "0"


def report(told: tuple[str, str], as_json: bool) -> str:
    """The whole report, where nothing else can be looked at.

    Args:
        told: what is wrong with this Python, and the command that mends it.
    """
    why, fix = told
    if not as_json:
        return f"  FAIL  python  {why}\n                fix: {fix}"
    host = socket.gethostname()
    finding = {
        "check": "python",
        "code": "python.old",
        "status": "FAIL",
        "why": why,
        "fix": fix,
        "ranks": [0],
        "hosts": [host],
    }
    found = {
        "format": FORMAT,
        "hpcsync": __version__,
        "where": host,
        "ranks": 1,
        "heard": 1,
        "status": "FAIL",
        "exit_status": 1,
        "findings": [finding],
    }
    return json.dumps(found, indent=2)
