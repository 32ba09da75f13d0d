"""Programs that a check starts in a Python of its own: they may crash, hang or take long.

Each prints lines of JSON; the last value of a key counts. Where one ends says how far it came.
"""

from __future__ import annotations

import os
from pathlib import Path

from ...children import end_with_parent, tell

__all__ = ["nearest", "tell"]

end_with_parent()


def nearest(folder: str) -> Path:
    """``folder``, or what exists of the way there; told before each look, which may be the last."""
    path = Path(folder)
    while True:
        tell(place=str(path))
        if os.path.exists(path) or path == path.parent:
            return path
        path = path.parent
