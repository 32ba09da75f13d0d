"""MPI on pointers to device memory, between two processes that an mpirun of this host starts.

Where no mpirun of the library is found, or it starts none, there is nothing to hold against MPI:
what a process sends to itself has to do. The two write what they have to tell into files: what they
print may be lost with them on its way through mpirun.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ... import children, launch
from ...children import end_with_parent, tell
from ...device.base import Device
from . import FailedError, say
from .mpi import exchange

_LIMIT_S = 60.0
_RANKS = 2
_STARTS = 2  # an mpirun may fail for reasons that pass
# So that a network, or too few cores or slots, has no say.
_OPEN_MPI = {
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_mpi_yield_when_idle": "1",
}


def run(_device: Device, spec: str, index: int, env: Mapping[str, str]) -> None:
    """Start the pair and judge by how far it came.

    Raises:
        FailedError: the two met, and what they sent did not arrive.
    """
    say("starting two processes by mpirun")
    command = _mpirun()
    if command is None:
        return
    told: dict[str, object] = {}
    for _ in range(_STARTS):
        with tempfile.TemporaryDirectory(prefix="hpcsync-pair-") as folder:
            words = ["-n", str(_RANKS), sys.executable, "-m", __name__, spec, str(index), folder]
            # What an Open MPI that is killed leaves would stop a later one of its process id.
            own = {**_OPEN_MPI, "PRTE_MCA_prte_tmpdir_base": folder}
            answer = children.call([command, *words], {**own, **env}, _LIMIT_S)
            for path in sorted(Path(folder).glob("*.json")):
                told.update(children.facts(path.read_text()))
        if answer.ok:
            return
        if "met" in told or answer.status is None:
            break
    if "met" not in told:
        return
    step = told.get("step", "MPI on device memory")
    raise FailedError(f"{step}: {told.get('failed') or f'one of two processes {answer.how()}'}")


def _mpirun() -> str | None:
    """The mpirun beside the library, or beside this Python."""
    _, library = launch.mpi_library()
    for folder in (Path(library).resolve().parent.parent / "bin", Path(sys.executable).parent):
        if (folder / "mpirun").is_file():
            return str(folder / "mpirun")
    return None


def pair(spec: str, index: int) -> None:
    """One of the two."""
    comm = launch.world()
    if comm.Get_size() != _RANKS:
        return
    module, _, kind = spec.partition(":")
    device: Device = getattr(importlib.import_module(module), kind)(index)
    comm.Barrier()
    tell(met=True)
    exchange(device, comm, 1 - comm.Get_rank(), launch.mpi_library()[0])
    comm.Barrier()


if __name__ == "__main__":
    end_with_parent()
    signal.alarm(int(_LIMIT_S) + 1)  # mpirun may be gone
    status = 0
    sys.stdout = Path(sys.argv[3], f"{os.getpid()}.json").open("w")  # noqa: SIM115 - until the end
    try:
        pair(sys.argv[1], int(sys.argv[2]))
    except Exception as error:
        text = " ".join(str(error).split())
        tell(failed=text if isinstance(error, FailedError) else f"{type(error).__name__}: {text}")
        status = 1
    if status:
        os._exit(status)
