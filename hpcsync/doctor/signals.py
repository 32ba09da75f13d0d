"""Signals that ask a run to save or to stop, and must reach it."""

from __future__ import annotations

import signal
from collections.abc import Iterator

from .base import Finding, System, result, warn

_NEEDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_UNBLOCK = (
    "import os, signal, sys; signal.pthread_sigmask(signal.SIG_SETMASK, []); "
    "os.execvp(sys.argv[1], sys.argv[1:])"
)


def signals(system: System) -> Iterator[Finding]:
    """Blocked or ignored where this process was started: its children inherit that.

    A rank hears what it ignored at its start, since it answers signals itself, but a launcher that
    ignores one may not pass it on.
    """
    told = dict(
        line.split(":", 1)
        for line in system.read("/proc/self/status").splitlines()
        if line.startswith("Sig")
    )
    blocked = _names(told.get("SigBlk", "0"))
    ignored = _names(told.get("SigIgn", "0"))
    found = []
    if blocked:
        found.append(
            warn(
                "signals.blocked",
                f"{blocked} {_are(blocked)} blocked by what started this: a run would not hear it",
                f'{system.python} -c "{_UNBLOCK}" {system.again()}',
            )
        )
    if ignored and not system.place.launcher:
        found.append(
            warn(
                "signals.ignored",
                f"{ignored} {_are(ignored)} ignored by what started this (trap '' in its script, "
                "or nohup): launchers would not pass it on",
                f"trap - {ignored.replace('SIG', '').replace(',', '')}",
            )
        )
    yield from result("signals", found, "SIGTERM, SIGUSR1 and SIGUSR2 reach this process")


def _names(mask: str) -> str:
    bits = int(mask.strip() or "0", 16)
    return ", ".join(each.name for each in _NEEDED if bits >> (each - 1) & 1)


def _are(names: str) -> str:
    return "are" if "," in names else "is"
