"""Faults that show only when ranks are compared.

Each fault is found, its fix is followed as a shell would, and then the check passes.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from hpcsync.doctor.base import Status
from hpcsync.doctor.facts import Facts
from tests.doctor import follow, provokes, script
from tests.faults import compared, rank, running_in, system


@provokes("nodes.same_name")
def test_two_machines_of_one_name() -> None:
    every = [rank(0, boot="x"), rank(1, boot="x"), rank(2, boot="y"), rank(3, boot="y")]
    here = system()
    found = compared(here, every)["nodes.same_name"]
    assert found.status == Status.FAIL
    assert found.fix == "doctor topology.ranks_per_node=2"
    after = compared(follow(here, found.fix), every)
    assert after["nodes"].why == "4 ranks on 2 nodes (2 x 2)"
    turns = [rank(0, boot="x"), rank(1, boot="y"), rank(2, boot="x"), rank(3, boot="y")]
    assert compared(here, turns)["nodes.same_name"].fix == "doctor topology.ranks_per_node=1"


@provokes("nodes.uneven")
def test_nodes_of_different_size() -> None:
    every = [rank(0, "a"), rank(1, "a"), rank(2, "a"), rank(3, "b")]
    here = system()
    job = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}
    found = compared(dataclasses.replace(here, env=job), every)["nodes.uneven"]
    assert found.fix == "mpirun -n 4 --map-by ppr:2:node doctor"
    even = [rank(0, "a"), rank(1, "a"), rank(2, "b"), rank(3, "b")]
    assert "nodes" in compared(here, even)


@provokes("alike.versions")
def test_hosts_with_different_software(tmp_path: Path) -> None:
    mine = {"Python": "3.11", "torch": "2.13"}
    other = {"Python": "3.11", "torch": "2.12"}
    script(tmp_path / "bin", "python", "echo mine")
    every = [
        rank(0, "a", versions=mine, prefix=str(tmp_path)),
        rank(1, "b", versions=other, prefix="/usr"),
    ]
    here = system()
    found = compared(here, every)["alike.versions"]
    assert found.why == "ranks differ in torch: 2.13 on a, 2.12 on b"
    # Now all hosts start rank 0's Python.
    assert follow(here, found.fix).call("sh", "-c", "python").out == "mine\n"
    assert compared(here, [rank(0, versions=mine), rank(1, versions=mine)])["alike"]


@provokes("folder.local")
def test_run_folder_that_is_not_shared(tmp_path: Path) -> None:
    here = running_in(system({"SCRATCH": "/scratch/me"}), tmp_path)
    found = compared(here, [rank(0, "a"), rank(1, "b", sees=False)])["folder.local"]
    assert f"{tmp_path} on b is not that of rank 0" in found.why
    assert found.fix == "doctor run.dir=/scratch/me/runs"
    assert follow(here, found.fix).config.run.dir == "/scratch/me/runs"
    assert "folder.local" not in compared(here, [rank(0, "a"), rank(1, "b")])


@provokes("clock.skew")
def test_clocks_that_differ(tmp_path: Path) -> None:
    """The fix sets the clock, here a file with its offset."""
    offset = tmp_path / "offset"
    offset.write_text("60")
    script(tmp_path / "bin", "sudo", 'exec "$@"')
    script(tmp_path / "bin", "chronyc", f'[ "$*" = makestep ] && echo 0 > {offset}')
    here = system({"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})

    def every() -> list[Facts]:
        ahead = float(offset.read_text())
        # The second rank wakes up late twice.
        late = [ahead + 1009, ahead + 2000, ahead + 3020]
        return [rank(0, "a", clocks=[1000, 2000, 3000]), rank(1, "b", clocks=late)]

    found = compared(here, every())["clock.skew"]
    assert found.why.startswith("the clock of b is 60 s ahead of that of a")
    follow(here, found.fix)
    assert "clock.skew" not in compared(here, every())


@pytest.mark.parametrize(
    ("code", "every", "fix"),
    [
        (
            "cores.crowded",
            [rank(each, around=range(2), cores=range(2), online=2) for each in range(4)],
            "mpirun -n 2 doctor",
        ),
        ("cores.crowded", [rank(each, quota=2.0) for each in range(4)], "mpirun -n 2 doctor"),
        (
            "cores.crowded",
            [rank(each, around=[0], cores=[0]) for each in range(2)],
            "taskset -cp 0-7 $$",
        ),
        ("cores.shared", [rank(0, cores=[0]), rank(1, cores=[0])], "export PRTE_MCA_"),
        ("cores.narrow", [rank(0, cores=[0]), rank(1, cores=[1])], "export PRTE_MCA_"),
        (
            "cores.threads",
            [rank(0, threads=8), rank(1, threads=8)],
            "export OMP_NUM_THREADS=4",
        ),
    ],
)
@provokes("cores.crowded", "cores.shared", "cores.narrow", "cores.threads")
def test_cores(code: str, every: list[Facts], fix: str) -> None:
    """That the fixes help is for tests/jobs."""
    found = compared(system(), every)
    assert "cores" not in found
    assert found[code].fix.startswith(fix)


def test_fewer_ranks_on_several_hosts() -> None:
    job = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_ID": "7"}
    two = {"cores": range(2), "around": range(2)}
    every = [rank(each, "ab"[each // 4], **two) for each in range(8)]
    found = compared(dataclasses.replace(system(), env=job), every)["cores.crowded"]
    assert found.fix == "srun --mpi=pmix -n 4 --ntasks-per-node=2 doctor"


def test_ranks_of_mpich_are_spread_as_it_knows() -> None:
    job = {"PMI_RANK": "0", "PMI_SIZE": "4"}
    every = [rank(0, "a"), rank(1, "a"), rank(2, "a"), rank(3, "b")]
    found = compared(dataclasses.replace(system(), env=job), every)["nodes.uneven"]
    assert found.fix == "mpiexec -n 4 -ppn 2 doctor"


@pytest.mark.parametrize(
    "every",
    [
        [rank(0)],
        [rank(0), rank(1)],
        [rank(0, cores=[0]), rank(1, cores=[1], around=[0, 1])],  # as many ranks as cores
        [rank(0, cores=range(4)), rank(1, cores=range(4, 8))],
        [rank(0, threads=4), rank(1, threads=4)],
    ],
)
def test_cores_that_are_well(every: list[Facts]) -> None:
    if len(every) == 2 and len(every[0].cores) == 1:
        every = [dataclasses.replace(each, around=[0, 1], online=2) for each in every]
    assert "cores" in compared(system(), every)
