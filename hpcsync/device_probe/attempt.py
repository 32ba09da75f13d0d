"""Trials in children: as many as it takes, since one that fails spoils what comes after it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import children

DEVICE = "hpcsync.device.cuda:CudaDevice"
LIMIT_S = 120.0  # of a child: torch and CuPy alone may take half of it from a slow file system
# In their order; each is the name of a module of ``trials``.
NAMES = ("memory", "sums", "sharing", "mpi", "mpi_pair")
OPTIONAL = ("nccl",)
_ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one trial.

    Attributes:
        problem: what went wrong, in words; empty if nothing did.
        lasting: whether it would come out alike the next time; not so where time was short.
    """

    problem: str = ""
    lasting: bool = True


def attempt(
    names: Sequence[str] = NAMES,
    *,
    index: int = 0,
    device: str = DEVICE,
    env: Mapping[str, str] | None = None,
    python: str = sys.executable,
    limit_s: float = LIMIT_S,
) -> dict[str, Outcome]:
    """The outcome of each trial.

    Args:
        names: of trials.
        index: of the device, as torch counts.
        device: its class, as ``package.module:Class``.
        env: environment; this process's if not given. What a launcher put there is taken out: a
            child is no rank of the job.
        limit_s: seconds that a child may take.
    """
    surroundings = children.alone(os.environ if env is None else env)
    paths = [str(_ROOT), *filter(None, [surroundings.get("PYTHONPATH")])]
    surroundings["PYTHONPATH"] = os.pathsep.join(paths)
    command = [python, "-m", f"{__package__}.trials", device, str(index)]
    found: dict[str, Outcome] = {}
    left = list(names)
    while left:
        # MPI is started before the device is opened: in a child of its own, and then all others.
        batch = left[: left.index("mpi")] if "mpi" in left[1:] else list(left)
        answer = children.call([*command, *batch], surroundings, limit_s)
        told = answer.data()
        for name in [name for name in batch if f"done {name}" in told]:
            found[name] = Outcome(str(told[f"done {name}"]))
        missing = [name for name in batch if name not in found]
        if answer.ok:
            found.update({name: Outcome("the child said nothing of it") for name in missing})
        left = [name for name in left if name not in found]
        if answer.ok or not missing:
            continue
        current = str(told.get("trial", ""))
        if current in found:  # told, and a new child goes on with the others
            continue
        problem = f"{told.get('step', 'loading torch and CuPy')}: the child {answer.how()}"
        lost = [current] if current in batch else list(left)
        found.update({name: Outcome(problem, answer.status is not None) for name in lost})
        left = [name for name in left if name not in lost]
    return found
