"""Which rank of which job this process is, as its launcher tells: there may be no MPI to ask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Launcher, and what it calls rank, size and rank on the node. Slurm's come last: mpirun in a batch
# job starts its daemons by srun, and ranks inherit theirs.
_LAUNCHERS = (
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("mpiexec", "PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID"),
    ("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


@dataclass(frozen=True, slots=True)
class Place:
    """A process of a job.

    Attributes:
        launcher: mpirun, mpiexec or srun; empty for a process that was started by hand.
        rank, size, local_rank: as the launcher counts.
        job: Slurm's job, empty outside.
    """

    launcher: str = ""
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    job: str = ""

    @classmethod
    def find(cls, env: Mapping[str, str]) -> Place:
        """From the launcher's environment variables."""
        job = env.get("SLURM_JOB_ID", "")
        for launcher, rank, size, local in _LAUNCHERS:
            if rank in env and size in env:
                if launcher == "mpiexec" and "SLURM_PROCID" in env and "PALS_RANKID" not in env:
                    launcher = "srun"  # by its plug-in pmi2, which speaks as MPICH's mpiexec does
                    local = "SLURM_LOCALID"
                here = _number(env, rank)
                return cls(launcher, here, max(1, _number(env, size)), _number(env, local), job)
        return cls(job=job)

    def describe(self, host: str, slurm: bool) -> str:
        """In words, for the head of the report."""
        job = f" of Slurm job {self.job}" if self.job else ""
        if self.launcher:
            ranks = "1 rank" if self.size == 1 else f"{self.size} ranks"
            return f"{ranks} under {self.launcher}{job}, rank {self.rank} on {host}"
        if self.job:
            return f"the batch shell{job} on {host}"
        return f"{host}, a machine with Slurm, outside any job" if slurm else host


def _number(env: Mapping[str, str], name: str) -> int:
    text = env.get(name, "0")
    return int(text) if text.isdigit() else 0
