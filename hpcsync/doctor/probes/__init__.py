"""Programs that a check starts in a Python of its own: they may crash, hang or take long.

Each prints lines of JSON; the last value of a key counts. Where one ends says how far it came.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1

# Whoever started a probe may be killed, with the job or by Ctrl-C: nothing stays behind.
with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def tell(**facts: object) -> None:
    """Print a line of JSON, at once: the next step may be the last."""
    print(json.dumps(facts), flush=True)


def nearest(folder: str) -> Path:
    """``folder``, or what exists of the way there; told before each look, which may be the last."""
    path = Path(folder)
    while True:
        tell(place=str(path))
        if os.path.exists(path) or path == path.parent:
            return path
        path = path.parent
