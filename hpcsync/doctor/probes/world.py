"""Starts MPI as a rank of the job, and gathers what all ranks found on the first.

It is a child of the process that the launcher started, and takes its place in the job.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from typing import Any

from ... import launch
from ...errors import LaunchError
from ...runtime import Runtime
from ...topology import Topology
from . import nearest, tell

_ROUNDS = 3
_LOOK = 4  # a look takes at most this part of the time that there is to meet


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
    made = runtime.bcast(_marked(given) if runtime.rank == 0 and given["folder"] else "")
    clocks = []
    for _ in range(_ROUNDS):
        runtime.wait(runtime.comm.Ibarrier())
        clocks.append(time.time())
    given["facts"].update(clocks=clocks, sees=not made or _seen(made, given["limit_s"]))
    given["facts"]["versions"]["MPI"] = library
    reports = runtime.gather_object(given)
    if runtime.rank == 0:
        if made:
            with contextlib.suppress(OSError):
                os.unlink(made)
        tell(reports=reports)
    runtime.wait(runtime.comm.Ibarrier())


def _marked(given: dict[str, Any]) -> str:
    """A file in the run folder, for the others to find; empty if none can be made."""
    try:
        mark = nearest(given["folder"]) / given["mark"]
        mark.touch()
    except OSError:  # why, another check says
        return ""
    return str(mark)


def _seen(path: str, limit_s: float) -> bool:
    """Whether it is there; a file system that does not answer shows nothing."""
    found: list[bool] = []
    look = threading.Thread(target=lambda: found.append(os.path.exists(path)), daemon=True)
    look.start()
    look.join(limit_s / _LOOK)
    return found == [True]


if __name__ == "__main__":
    main()
