"""The folder that runs are written to, and HDF5 in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..banner import size as size_of
from .base import Finding, System, fail, good, result, warn
from .machine import file_system
from .software import absent

ROOM = 1 << 30


def wanted(system: System) -> Path:
    """``run.dir``, which may not exist; only children look, since a look may never end."""
    return Path(system.config.run.dir).absolute()


def elsewhere(system: System) -> str:
    """This command with a run folder in the first place that usually may be written to."""
    bases = (system.env.get(name) for name in ("SCRATCH", "WORK", "HOME", "TMPDIR"))
    here = wanted(system)
    for base in filter(None, bases):
        if not here.is_relative_to(base):
            return system.again(f"run.dir={base}/runs")
    return system.again("run.dir=/tmp/runs")


def folder(system: System) -> Iterator[Finding]:
    """Write, sync and rename in the run folder, as a checkpoint does."""
    answer = system.probe("run_folder", str(wanted(system)))
    told = answer.data()
    place = Path(told.get("place", wanted(system)))
    kind = file_system(system, place)
    where = f"{place} ({kind})" if kind else str(place)
    if answer.status is None:
        yield fail(
            "folder.stuck",
            f"{where}: writing a file of 1 MiB {answer.how()}: its file system does not answer",
            elsewhere(system),
        )
    elif not answer.ok:
        yield fail(
            "folder.unwritable",
            f"{where}: a file cannot be written, synced and renamed: {answer.how()}",
            elsewhere(system),
        )
    elif told["free"] < ROOM:
        yield warn(
            "folder.full",
            f"{where} has {size_of(told['free'])} free: checkpoints take 12 bytes a parameter, "
            f"{system.config.checkpoint.keep + 1} of them at once",
            elsewhere(system),
        )
    else:
        took = f"write, fsync and rename in {1000 * told['seconds']:.0f} ms"
        yield good("folder", f"{where}: {took}, {size_of(told['free'])} free")


def hdf5(system: System) -> Iterator[Finding]:
    """h5py imports, is a serial build, and writes and locks files of the run folder."""
    answer = system.probe("hdf5_file", str(wanted(system)))
    told = answer.data()
    place = told.get("place", wanted(system))
    again = system.pip("--force-reinstall", "--no-deps", "h5py")
    unlocked = system.env.get("HDF5_USE_FILE_LOCKING", "").upper() in ("FALSE", "0", "BEST_EFFORT")
    if "version" not in told and answer.status is None:
        why = f"h5py: importing it {answer.how()}: it may be slow to load only"
        yield fail("hdf5.slow", why, system.longer)
        return
    if "version" not in told:
        yield fail("hdf5.broken", f"h5py: {answer.how()}", absent(system, answer.err) or again)
        return
    if answer.status is None:
        why = f"HDF5 in {place} {answer.how()}: its file system does not answer"
        yield fail("hdf5.stuck", why, elsewhere(system))
        return
    if answer.status < 0:
        yield fail("hdf5.crash", f"HDF5 in {place} {answer.how()}", again)
        return
    found = []
    if told["mpi"]:
        found.append(
            warn(
                "hdf5.parallel",
                "h5py was built with an MPI, which may be another than the job's; files are "
                "written by one rank each and need none",
                system.pip("--force-reinstall", "--no-deps", "--only-binary=:all:", "h5py"),
            )
        )
    if told.get("locks") and not unlocked:
        found.append(
            warn(
                "hdf5.locks",
                f"{place} cannot lock files ({told['locks']}): HDF5 refuses to open them, in tools "
                "that read checkpoints and traces, too",
                "export HDF5_USE_FILE_LOCKING=FALSE",
            )
        )
    elif "locks" in told and not (answer.ok and told.get("right")):
        why = "reads back wrong data" if answer.ok else answer.how()
        found.append(fail("hdf5.file", f"HDF5 in {place}: {why}", elsewhere(system)))
    build = "with MPI" if told["mpi"] else "serial"
    locks = "files are not locked" if unlocked else "files can be locked"
    if "locks" not in told:
        locks = f"not tried: no file can be made in {place}"
    yield from result("hdf5", found, f"h5py {told['version']} ({build}), {locks}")
