"""The contract of a check: what it is given, and what it finds."""

from __future__ import annotations

import enum
import importlib.util
import itertools
import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import children, interpreter
from ..children import Answer
from ..config import Config
from ..device_probe.attempt import DEVICE
from .place import Place

PACKAGE = Path(__file__).resolve().parent.parent


class Status(enum.IntEnum):
    """How bad it is; the worst of all decides the exit status."""

    PASS = 0
    WARN = 1
    FAIL = 2


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found.

    Attributes:
        code: the check's name; with a dot and a word behind it where something is wrong.
        why: one line: what was found, and what follows from it.
        fix: the command that mends it, for a shell; empty for PASS.
    """

    code: str
    status: Status
    why: str
    fix: str = ""

    @property
    def check(self) -> str:
        """Name of the check."""
        return self.code.partition(".")[0]


def good(check: str, why: str) -> Finding:
    """Nothing to mend."""
    return Finding(check, Status.PASS, why)


def warn(code: str, why: str, fix: str) -> Finding:
    """It works, but not as well as it could."""
    return Finding(code, Status.WARN, why, fix)


def fail(code: str, why: str, fix: str) -> Finding:
    """It does not work, or gives wrong results."""
    return Finding(code, Status.FAIL, why, fix)


def _takes_packages() -> bool:
    """Debian's own Python, and others that say so, belong to the system's package manager."""
    managed = Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists()
    own = sys.prefix != sys.base_prefix
    return importlib.util.find_spec("pip") is not None and (own or not managed)


class Scope(enum.Enum):
    """Who makes a check: every rank, the first of each node, or rank 0."""

    RANK = "rank"
    NODE = "node"
    JOB = "job"


@dataclass(frozen=True, kw_only=True)
class System:
    """What a check looks at; tests put something else in its place.

    Attributes:
        env: environment variables.
        config: the deck that is to run.
        root: where /proc, /sys, /dev and /etc are found.
        limit_s: seconds that a child may take.
        command: this command, as it was typed.
        prefix: the Python environment.
        version: of Python.
        user: effective user id.
        debug: whether to show where a check failed itself.
        takes_packages: whether pip is here, and may install into this Python.
        device: the class of the GPUs that are tried.
    """

    env: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    config: Config = field(default_factory=Config)
    root: Path = Path("/")
    limit_s: float = 60.0
    command: Sequence[str] = field(default_factory=lambda: tuple(sys.orig_argv))
    python: str = sys.executable
    prefix: Path = Path(sys.prefix)
    version: tuple[int, ...] = tuple(sys.version_info[:3])
    user: int = field(default_factory=os.geteuid)
    debug: bool = False
    takes_packages: bool = field(default_factory=lambda: _takes_packages())
    device: str = DEVICE

    @property
    def place(self) -> Place:
        """Which rank of which job this is."""
        return Place.find(self.env)

    @property
    def sudo(self) -> str:
        """What comes before a command that only root may give."""
        return "" if self.user == 0 else "sudo "

    def at(self, path: str) -> Path:
        """A path of the system, such as ``/proc/self/status``."""
        return self.root / path.lstrip("/")

    def read(self, path: str) -> str:
        """Text of a file of the system, stripped; empty where there is none."""
        try:
            return self.at(path).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""

    def which(self, name: str) -> str | None:
        """Full path of a program."""
        return shutil.which(name, path=self.env.get("PATH", os.defpath))

    def call(self, *command: str, limit_s: float | None = None) -> Answer:
        """Run a program to its end, or to the time limit."""
        return children.call(command, self.env, limit_s or self.limit_s)

    def probe(
        self,
        name: str,
        *arguments: str,
        text: str = "",
        env: Mapping[str, str] | None = None,
        limit_s: float | None = None,
    ) -> Answer:
        """Run a module of ``probes`` in a Python of its own; ``text`` is its standard input."""
        module = f"{__package__}.probes.{name}"
        env = dict(self.env if env is None else env)
        paths = [str(PACKAGE.parent), *filter(None, [env.get("PYTHONPATH")])]
        env["PYTHONPATH"] = os.pathsep.join(paths)
        command = [self.python, "-m", module, *arguments]
        return children.call(command, env, limit_s or self.limit_s, text)

    def again(self, *words: str) -> str:
        """This command with ``words`` behind it, in place of others of the same key or option."""
        keys = {word.partition("=")[0] for word in words if "=" in word}
        pairs = itertools.pairwise([*words, "--"])
        valued = {one for one, two in pairs if one.startswith("--") and not two.startswith("--")}
        keys |= {word for word in words if word.startswith("--")}
        kept = [
            word
            for before, word in zip(("", *self.command), self.command, strict=False)
            if word.partition("=")[0] not in keys and before not in valued
        ]
        return shlex.join([*kept, *words])

    @property
    def longer(self) -> str:
        """This command with more time for each check."""
        return self.again("--limit", f"{max(300.0, 5 * self.limit_s):g}")

    def pip(self, *words: str) -> str:
        """The command that has pip install something into this environment, or makes another."""
        if not self.takes_packages:
            return interpreter.environment(self.python, PACKAGE.parent)
        return shlex.join([self.python, "-m", "pip", "install", *words])


@dataclass(frozen=True, slots=True)
class Check:
    """A check: its name, who makes it, and the function."""

    name: str
    scope: Scope
    run: Callable[[System], Iterable[Finding]]


def result(check: str, findings: Iterable[Finding], why: str) -> list[Finding]:
    """``findings``, or a PASS with ``why`` if there are none."""
    return list(findings) or [good(check, why)]
