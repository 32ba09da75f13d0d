"""Why is my run slow: reads the timing traces of a run.

    python tools/trace.py RUN                    the same as: trace.py summary RUN
    python tools/trace.py COMMAND RUN ...        trace.py RUN COMMAND ... does the same
    python tools/trace.py COMMAND --help

RUN is the folder of a run, or its trace folder. The format of the files is told in tools/README.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.commands import Tool

TOOL = Tool(
    script="trace.py",
    about=__doc__ or "",
    package="tools.tracing",
    commands=(
        "summary",
        "timeline",
        "critical",
        "diff",
        "whatif",
        "export",
        "estimate",
        "hang",
    ),
    default="summary",
)
main = TOOL.main

if __name__ == "__main__":
    sys.exit(main())
