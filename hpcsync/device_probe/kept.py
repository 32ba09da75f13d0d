"""Outcomes of trials in a file of the user's cache folder, one a host, for later jobs there.

They hold for the same libraries, driver, GPUs and settings of MPI, and for ``GOOD_DAYS``; anything
else is tried anew. What failed for want of time is not kept. A file that cannot be read, or that
another version wrote, counts as none; one that cannot be written is not missed.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import cache_files
from .attempt import Outcome

FORMAT, VERSION = "hpcsync-device-probe", 1
GOOD_DAYS = 30
# Settings that change what a library does.
_SETTINGS = (
    *("OMPI_MCA_", "UCX_", "MPICH_", "I_MPI_", "MV2_", "FI_", "NCCL_", "CUDA_", "MPI4PY_"),
    "PYTORCH_",  # how device memory is allocated: MPI cannot take every kind
    "LD_LIBRARY_PATH",
)


@dataclass(frozen=True, slots=True)
class Kept:
    """What a file holds.

    Attributes:
        made: when it was tried.
        outcomes: by trial.
        path: of the file.
    """

    made: datetime.datetime
    outcomes: Mapping[str, Outcome]
    path: Path


def path_of(host: str, within: Path | None = None) -> Path:
    """The file of a host: home folders are shared by nodes."""
    name = re.sub(r"[^\w.-]", "_", host)
    return (within or cache_files.folder()) / f"device-probe-{name}.json"


def settings(env: Mapping[str, str] | None = None) -> str:
    """A digest of the environment variables that count."""
    env = os.environ if env is None else env
    chosen = sorted((name, value) for name, value in env.items() if name.startswith(_SETTINGS))
    return hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:16]


def read(path: Path, identity: Mapping[str, str], names: Sequence[str]) -> Kept | None:
    """What was kept of those trials in the same surroundings; None if there is no such thing."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(whole, dict) or (whole["format"], whole["version"]) != (FORMAT, VERSION):
            return None
        if whole["identity"] != dict(identity):
            return None
        made = datetime.datetime.fromisoformat(whole["made"])
        age = datetime.datetime.now(datetime.UTC) - made
        outcomes = {name: Outcome(_text(whole["outcomes"][name])) for name in names}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None
    if not -1 <= age.days < GOOD_DAYS:
        return None
    return Kept(made, outcomes, path)


def write(path: Path, identity: Mapping[str, str], outcomes: Mapping[str, Outcome]) -> bool:
    """Keep outcomes, in place of what is there; whether that was done."""
    if not all(outcome.lasting for outcome in outcomes.values()):
        return False
    whole = {
        "format": FORMAT,
        "version": VERSION,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "identity": dict(identity),
        "outcomes": {name: outcome.problem for name, outcome in outcomes.items()},
    }
    return cache_files.write(path, (json.dumps(whole, indent=1) + "\n").encode())


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a problem is told in words")
    return value
