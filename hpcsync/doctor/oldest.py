"""Whether this Python will do. Parses on old ones, so that they can say so."""

from __future__ import annotations

import os
import shlex
import shutil

OLDEST = (3, 11)
_NEWEST = 20


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
    for minor in range(_NEWEST, OLDEST[1] - 1, -1):
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
