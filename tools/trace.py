"""Why is my run slow: reads the timing traces of a run.

    python tools/trace.py RUN                    the same as: trace.py summary RUN
    python tools/trace.py COMMAND RUN ...        trace.py RUN COMMAND ... does the same
    python tools/trace.py COMMAND --help

RUN is the folder of a run, or its trace folder. The format of the files is told in tools/README.md.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hpcsync.errors import UserError

COMMANDS = (
    "summary",
    "timeline",
    "critical",
    "diff",
    "whatif",
    "export",
    "estimate",
    "hang",
)
_DEFAULT = "summary"


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 2, after one line, for what the user can mend."""
    words = in_order(list(sys.argv[1:] if words is None else words))
    options = parser(words[0] if words else "").parse_args(words)
    try:
        status = int(options.work(options))
        sys.stdout.flush()
    except UserError as error:
        print(f"trace: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def in_order(words: list[str]) -> list[str]:
    """The command first: people name the run first, or only the run."""
    if len(words) > 1 and words[1] in COMMANDS and words[0] not in COMMANDS:
        return [words[1], words[0], *words[2:]]
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        return [_DEFAULT, *words]
    return words


def parser(command: str) -> argparse.ArgumentParser:
    """The command line; only the module of ``command`` is imported if there is such a one."""
    top = _Parser(
        prog="trace.py",
        description=(__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name in [command] if command in COMMANDS else COMMANDS:
        module = _module(name)
        each = commands.add_parser(
            module.NAME, help=module.HELP, description=(module.__doc__ or "").partition("\n\n")[0]
        )
        module.arguments(each)
        each.set_defaults(work=module.run)
    return top


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"tools.tracing.{name}")


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"trace: {message}; see {self.prog} --help\n")


if __name__ == "__main__":
    sys.exit(main())
