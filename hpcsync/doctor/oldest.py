"""The report of a Python that is too old for the rest. Parses on old ones, too."""

from __future__ import annotations

import json
import socket

from .. import __version__

FORMAT = 1  # of the report as JSON


def report(told: tuple[str, str], as_json: bool) -> str:
    """The whole report, where nothing else can be looked at.

    Args:
        told: what is wrong with this Python, and the command that mends it.
    """
    why, fix = told
    if not as_json:
        return f"  FAIL  python  {why}\n                fix: {fix}"
    host = socket.gethostname()
    finding = {
        "check": "python",
        "code": "python.old",
        "status": "FAIL",
        "why": why,
        "fix": fix,
        "ranks": [0],
        "hosts": [host],
    }
    found = {
        "format": FORMAT,
        "hpcsync": __version__,
        "where": host,
        "ranks": 1,
        "heard": 1,
        "status": "FAIL",
        "exit_status": 1,
        "findings": [finding],
    }
    return json.dumps(found, indent=2)
