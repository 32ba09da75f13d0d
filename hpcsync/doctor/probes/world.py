"""Starts MPI as a rank of the job, and gathers what all ranks found on the first.

It is a child of the process that the launcher started, and takes its place in the job.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from ... import launch
from ...errors import LaunchError
from ...runtime import Runtime
from ...topology import Topology
from . import tell

_ROUNDS = 3


def main() -> None:
    """Read this rank's report, meet the others, and tell all reports on rank 0."""
    given = json.load(sys.stdin)
    tell(stage="loading MPI")
    try:
        comm = launch.world()
    except LaunchError as error:
        tell(missing=str(error))
        sys.exit(str(error))
    name, path = launch.mpi_library()
    size = comm.Get_size()
    tell(stage="the ranks' meeting", library=name, path=path, size=size)
    tell(threads=launch.thread_level())
    if size > 1:
        alone = Topology.group(["all"] * size)
        with Runtime(comm.Dup(), alone, float(given["limit_s"])) as runtime:
            _meet(runtime, given, f"{name}, {path}")
    tell(stage="the end")


def _meet(runtime: Runtime, given: dict[str, Any], library: str) -> None:
    mark = Path(given["folder"], given["mark"])
    made = runtime.bcast(str(mark) if runtime.rank == 0 and _made(mark) else "")
    clocks = []
    for _ in range(_ROUNDS):
        runtime.wait(runtime.comm.Ibarrier())
        clocks.append(time.time())
    given["facts"].update(clocks=clocks, sees=not made or Path(made).exists())
    given["facts"]["versions"]["MPI"] = library
    reports = runtime.gather_object(given)
    if runtime.rank == 0:
        if made:
            mark.unlink(missing_ok=True)
        tell(reports=reports)
    runtime.wait(runtime.comm.Ibarrier())


def _made(mark: Path) -> bool:
    try:
        mark.touch()
    except OSError:  # why, another check says
        return False
    return True


if __name__ == "__main__":
    main()
