"""What is in a run's checkpoints, whether it is whole, and what differs between two.

    python tools/checkpoint.py RUN              the same as: checkpoint.py list RUN
    python tools/checkpoint.py COMMAND RUN ...  checkpoint.py RUN COMMAND ... does the same
    python tools/checkpoint.py COMMAND --help

RUN is the folder of a run, or a checkpoint's, such as RUN/checkpoints/step-00000100. Where one
checkpoint is wanted, a run's newest is meant. The format is told in tools/README.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.commands import Tool

TOOL = Tool(
    script="checkpoint.py",
    about=__doc__ or "",
    package="tools.checking",
    commands=("list", "show", "verify", "diff", "prune"),
    default="list",
)
main = TOOL.main

if __name__ == "__main__":
    sys.exit(main())
