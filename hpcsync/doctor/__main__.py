"""``python -m hpcsync.doctor``: PASS, WARN or FAIL of this place, with commands that mend it.

Exit status: 0 if nothing failed (warnings may have been given), 1 if something did, 2 if the
command line or the deck cannot be understood. In a job all ranks run it, and rank 0 reports.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .. import interpreter
from . import oldest


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status. Runs on Python 3.7 and newer, to say what it needs."""
    told = interpreter.complaint_here()
    words = sys.argv[1:] if argv is None else argv
    if told is not None:
        if interpreter.first(os.environ):
            print(oldest.report(told, "--json" in words), flush=True)
        return 1
    from .command import run

    return run(words)


if __name__ == "__main__":
    sys.exit(main())
