"""Systems with faults that fakes provoke, and what the doctor's checks say of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcsync.children import Answer
from hpcsync.doctor import mpi, ranks
from hpcsync.doctor.base import Finding, System
from hpcsync.doctor.facts import Facts
from tests import launcher
from tests.doctor import follow

COMMAND = ("doctor",)


def system(env: dict[str, str] | None = None, **options: Any) -> System:
    """The system that this test runs on, less any job, with ``options`` in its place."""
    return System(env=launcher.environment(env), command=COMMAND, **options)


def files(root: Path, **texts: str) -> Path:
    """A fake root: ``__`` in a name stands for a slash."""
    for name, text in texts.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def two_gpus(root: Path) -> Path:
    """A fake root of a machine with two GPUs."""
    return files(root, dev__nvidia0="", dev__nvidia1="", dev__nvidiactl="")


def running_in(here: System, folder: Path) -> System:
    """The system with its runs in ``folder``."""
    return dataclasses.replace(here, config=follow(here, f"doctor run.dir={folder}").config)


def joined(here: System, out: str, err: str = "", status: int | None = 1) -> Finding:
    """What is said of MPI when the child that joined the job has told this."""
    (found,) = mpi.library(here, Answer(status, out, err, 60))
    return found


def rank(number: int, host: str = "a", **options: Any) -> Facts:
    """A rank's facts: eight cores of its host's, with ``options`` in their place."""
    free = {"cores": range(8), "around": range(8), "online": 8, "boot": host}
    return Facts(rank=number, host=host, **{**free, **options})


def compared(here: System, every: Sequence[Facts]) -> dict[str, Finding]:
    """The findings on all ranks together, by code."""
    return {found.code: found for _, found in ranks.judge(here, every)}
