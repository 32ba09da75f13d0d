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
            bootstrap = os.path.join(str(root), "tools", "bootstrap.py")
            if os.path.isfile(bootstrap):
                venv = os.path.join(str(root), ".venv", "bin", "activate")
                setup = f"{newer} {shlex.quote(bootstrap)} setup"
                return why, f"{setup} && . {shlex.quote(venv)}"
            make = f"{newer} -m venv ~/hpcsync"
            return why, f"{make} && ~/hpcsync/bin/python -m pip install 'hpcsync[mpi]'"
    return why, "python3 -m pip install --user uv && ~/.local/bin/uv python install 3.12"
