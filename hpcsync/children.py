"""Children that may crash or hang: what they said, and how they ended."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_GRACE_S = 2.0
_PR_SET_PDEATHSIG = 1
# What tells an MPI library that it was started by a launcher.
_LAUNCHERS = ("OMPI_COMM_", "OMPI_UNIVERSE", "PMIX_", "PRTE_LAUNCHED", "PMI_", "PALS_", "SLURM_")


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of a child.

    Attributes:
        status: exit status; negative for a signal; None if it was ended at its time limit.
        out, err: what it printed until then.
    """

    status: int | None
    out: str
    err: str
    limit_s: float = 0.0

    @property
    def ok(self) -> bool:
        return self.status == 0

    def data(self) -> dict[str, Any]:
        """The facts that it told."""
        return facts(self.out)

    def how(self) -> str:
        """In words: how it ended, with the last line of what it complained of."""
        if self.status is None:
            return f"did not end in {self.limit_s:g} s"
        if self.status < 0:
            with contextlib.suppress(ValueError):
                return f"was killed by {signal.Signals(-self.status).name}"
            return f"was killed by signal {-self.status}"
        return last_line(self.err) or f"ended with status {self.status}"


def facts(text: str) -> dict[str, Any]:
    """The JSON of all lines that hold some, later ones over earlier ones."""
    found: dict[str, Any] = {}
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.update(value)
    return found


def last_line(text: str) -> str:
    """The last line that says something; of what a launcher frames by rules, the first sentence."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or not _is_rule(lines[-1]):
        return lines[-1] if lines else ""
    framed = itertools.takewhile(lambda line: not _is_rule(line), reversed(lines[:-1]))
    return re.split(r"(?<=\.)\s", " ".join(reversed(list(framed))))[0]


def _is_rule(line: str) -> bool:
    return len(line) > 3 and not line.strip("-=*")


def _inherited(env: Mapping[str, str]) -> tuple[int, ...]:
    """The descriptor by which Hydra, and srun with its plug-in pmi2, speak with a rank."""
    text = env.get("PMI_FD", "")
    if not text.isdigit():
        return ()
    try:
        os.fstat(int(text))
    except (OSError, OverflowError):
        return ()
    return (int(text),)


def call(command: Sequence[str], env: Mapping[str, str], limit_s: float, text: str = "") -> Answer:
    """Run ``command``; at the time limit it is killed, with all its children."""
    try:
        child = subprocess.Popen(
            command,
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            pass_fds=_inherited(env),
        )
    except OSError as error:
        return Answer(127, "", f"{command[0]}: {error.strerror}", limit_s)
    try:
        out, err = child.communicate(text, timeout=limit_s)
        return Answer(child.returncode, out, err, limit_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    try:
        out, err = child.communicate(timeout=_GRACE_S)
    except subprocess.TimeoutExpired as late:  # stuck in the kernel, say on a dead file system
        out, err = _text(late.stdout), _text(late.stderr)
    return Answer(None, out, err, limit_s)


def _text(data: str | bytes | None) -> str:
    return data.decode(errors="replace") if isinstance(data, bytes) else data or ""


def alone(env: Mapping[str, str]) -> dict[str, str]:
    """``env`` less all that a launcher put there: for a child that is no rank of the job."""
    return {name: value for name, value in env.items() if not name.startswith(_LAUNCHERS)}


# ---- in the child ------------------------------------------------------------------------------


def end_with_parent() -> None:
    """Be killed with whoever started this child: by the job's end or by Ctrl-C."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def tell(**facts: object) -> None:
    """Print a line of JSON, at once: the next step may be the last."""
    print(json.dumps(facts), flush=True)
