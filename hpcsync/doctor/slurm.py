"""Slurm: whether srun can start MPI's ranks, and whether the job may be requeued."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .base import Finding, System, fail, good, result, warn
from .mpi import configured, plugins

_LIMIT_S = 20.0


def slurm(system: System) -> Iterator[Finding]:
    """Its plug-ins for MPI, its default among them, and the job's requeue flag."""
    job = system.place.job
    if system.which("srun") is None:
        yield good("slurm", "not here")
        return
    if not job and not configured(system):
        yield good("slurm", "srun is here, but it has no configuration")
        return
    config = system.call("scontrol", "show", "config", limit_s=_LIMIT_S)
    if not config.ok:
        yield warn(
            "slurm.silent",
            f"its controller does not answer: {config.how()} (for the administrator, where "
            "slurmctld runs)",
            f"{system.sudo}systemctl restart munge slurmctld",
        )
        return
    settings = dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", config.out, re.M))
    found = list(_plugins(system, settings.get("MpiDefault", "none")))
    found += _job(system, job)
    kinds = ", ".join(plugins(system))
    version = settings.get("SLURM_VERSION", "")
    yield from result("slurm", found, f"{version}, srun's MPI plug-ins: {kinds}".strip(", "))


def _plugins(system: System, default: str) -> Iterator[Finding]:
    listed = plugins(system)
    useful = [name for name in listed if name.startswith(("pmix", "pmi2", "cray"))]
    chosen = system.env.get("SLURM_MPI_TYPE", default)
    if not useful:
        if system.place.launcher != "mpirun":
            yield warn(
                "slurm.no_plugin",
                "srun has no plug-in for MPI, so it starts ranks that do not find each other; "
                "inside a job mpirun starts them",
                f"mpirun {system.again()}",
            )
    elif chosen not in listed:
        by = "SLURM_MPI_TYPE" if "SLURM_MPI_TYPE" in system.env else "MpiDefault"
        code = "slurm.unknown_plugin" if chosen != "none" else "slurm.default"
        why = f"{by} is {chosen}; srun without --mpi would start ranks that do not find each other"
        make = fail if chosen != "none" and by == "SLURM_MPI_TYPE" else warn
        yield make(code, why, f"export SLURM_MPI_TYPE={useful[-1]}")


def _job(system: System, job: str) -> Iterator[Finding]:
    if not job:
        return
    answer = system.call("scontrol", "show", "job", job, limit_s=_LIMIT_S)
    if re.search(r"\bRequeue=0\b", answer.out):
        yield warn(
            "slurm.requeue",
            f"job {job} will not be requeued when its time is over or a node fails; from the "
            "start: sbatch --requeue",
            f"scontrol update JobId={job} Requeue=1",
        )
