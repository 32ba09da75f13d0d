"""The front of a tool with commands: modules with NAME, HELP, ``arguments`` and ``run``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from hpcsync.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A tool.

    Attributes:
        script: its file in tools/.
        about: what its help tells.
        package: where the modules of its commands are.
        commands: names of commands and of their modules.
        default: the command that is meant when none is named.
    """

    script: str
    about: str
    package: str
    commands: Sequence[str]
    default: str

    @property
    def name(self) -> str:
        return self.script.removesuffix(".py")

    def main(self, words: Sequence[str] | None = None) -> int:
        """Run a command; the exit status: 2, after one line, for what the user can mend."""
        words = self.in_order(list(sys.argv[1:] if words is None else words))
        options = self.parser(words[0] if words else "").parse_args(words)
        try:
            status = int(options.work(options))
            sys.stdout.flush()
        except UserError as error:
            print(f"{self.name}: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except BrokenPipeError:  # whoever reads has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        return status

    def in_order(self, words: list[str]) -> list[str]:
        """The command first: people name the run first, or only the run."""
        known = self.commands
        if len(words) > 1 and words[1] in known and words[0] not in known:
            return [words[1], words[0], *words[2:]]
        if words and not words[0].startswith("-") and words[0] not in known:
            return [self.default, *words]
        return words

    def parser(self, command: str) -> argparse.ArgumentParser:
        """The command line; only the module of ``command`` is imported if there is such a one."""
        top = _Parser(
            prog=self.script,
            description=self.about.strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
        for name in [command] if command in self.commands else self.commands:
            module = self._module(name)
            about = (module.__doc__ or "").partition("\n\n")[0]
            each = commands.add_parser(module.NAME, help=module.HELP, description=about)
            module.arguments(each)
            each.set_defaults(work=module.run)
        return top

    def _module(self, name: str) -> ModuleType:
        return importlib.import_module(f"{self.package}.{name}")


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        name = self.prog.partition(".")[0]
        self.exit(2, f"{name}: {message}; see {self.prog} --help\n")
