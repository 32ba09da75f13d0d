"""How a job starts and ends, as far as one process without MPI can tell."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from hpcsync import launch, runtime
from hpcsync.config import TopologyConfig
from hpcsync.errors import (
    CollectiveTimeout,
    ConfigError,
    DataError,
    LaunchError,
    ModelError,
    UserError,
)

VARIABLES = {
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "the launcher",
    "SLURM_STEP_NUM_TASKS": "srun",
}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before MPI is imported, whatever other tests of this process did."""
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)


@pytest.mark.parametrize("variable", VARIABLES)
def test_singletons_are_told_with_the_fix(variable: str) -> None:
    with pytest.raises(LaunchError) as told:
        launch.check_singletons(1, {variable: "4"})
    text = str(told.value)
    assert text.startswith(f"launch: {VARIABLES[variable]} started 4 processes ({variable})")
    assert "alone in its MPI world" in text
    fix = "srun --mpi=pmix" if "SLURM" in variable else "python -m mpi4py --mpi-library"
    assert fix in text
    assert "\n" not in text


@pytest.mark.parametrize("variable", VARIABLES)
def test_one_process_may_be_alone(variable: str) -> None:
    for value in ("1", "0", "", "many", "2(x3)"):
        launch.check_singletons(1, {variable: value})
    launch.check_singletons(1, {})
    launch.check_singletons(1, {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"})  # inside sbatch
    launch.check_singletons(4, {variable: "4"})
    launch.check_singletons(2, {variable: "8"})  # a world of several found each other


def test_no_mpi_is_told_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(LaunchError, match=r"finds no MPI library .*pip install 'hpcsync\[mpi\]'"):
        launch.start(TopologyConfig())


def test_an_mpi_that_does_not_load_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __getattr__(self, name: str) -> NoReturn:
            raise RuntimeError("cannot load MPI library\nlibmpi.so: no such file")

    monkeypatch.setitem(sys.modules, "mpi4py", Broken())
    with pytest.raises(LaunchError) as told:
        launch.start(TopologyConfig())
    assert "(cannot load MPI library)" in str(told.value)
    assert "\n" not in str(told.value)


def test_too_low_a_thread_level_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    world = SimpleNamespace(Get_size=lambda: 2)
    fake = SimpleNamespace(COMM_WORLD=world, Query_thread=lambda: 1, THREAD_MULTIPLE=3)
    monkeypatch.setattr(launch, "_import_mpi", lambda: fake)
    monkeypatch.setattr(launch, "thread_level", lambda: "THREAD_FUNNELED")
    with pytest.raises(LaunchError, match="thread level THREAD_FUNNELED is too low"):
        launch.start(TopologyConfig())


def ended(error: BaseException | int) -> int:
    """The status with which ``guard`` ends a command that returns or raises ``error``."""

    def main() -> int:
        if isinstance(error, BaseException):
            raise error
        return error

    with pytest.raises(SystemExit) as stop:
        launch.guard(main)
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.parametrize("status", [0, 1, 7])
def test_guard_passes_a_status_on(status: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert ended(status) == status
    assert ended(SystemExit(status)) == status
    assert capfd.readouterr() == ("", "")


def test_guard_takes_exits_as_python_does(capfd: pytest.CaptureFixture[str]) -> None:
    assert ended(SystemExit()) == 0
    assert ended(SystemExit("cannot go on")) == 1
    assert capfd.readouterr().err == "cannot go on\n"


@pytest.mark.parametrize("kind", [UserError, DataError, ModelError, LaunchError, ConfigError])
def test_a_users_error_is_one_line_and_2(
    kind: type[UserError], capfd: pytest.CaptureFixture[str]
) -> None:
    assert ended(kind("deck.toml:3: train.lr: is 0; use 1e-3")) == 2
    told = capfd.readouterr()
    assert told.err == "hpcsync: error: deck.toml:3: train.lr: is 0; use 1e-3\n"
    assert told.out == ""


def test_all_problems_of_a_deck_are_told(capfd: pytest.CaptureFixture[str]) -> None:
    assert ended(ConfigError(["a: one", "b: two"])) == 2
    told = capfd.readouterr().err
    assert "a: one\n" in told
    assert "b: two\n" in told
    assert "Traceback" not in told


def test_another_error_is_a_traceback_and_1(capfd: pytest.CaptureFixture[str]) -> None:
    assert ended(ZeroDivisionError("of mine")) == 1
    told = capfd.readouterr().err
    assert told.count("Traceback") == 1
    assert "ZeroDivisionError: of mine" in told
    assert "in main" in told


def test_a_failure_of_the_run_is_one_line_and_1(capfd: pytest.CaptureFixture[str]) -> None:
    assert ended(CollectiveTimeout("no collective moved")) == 1
    assert capfd.readouterr().err == "hpcsync: error: no collective moved\n"


def test_an_interrupt_is_130(capfd: pytest.CaptureFixture[str]) -> None:
    assert ended(KeyboardInterrupt()) == 130
    assert capfd.readouterr().err == "hpcsync: interrupted\n"


def test_out_of_memory_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    assert ended(MemoryError()) == 1
    assert "MemoryError" in capfd.readouterr().err


class FakeMpi:
    """Rank and size of a job, and what became of it."""

    def __init__(self, rank: int, size: int) -> None:
        self.aborted: list[int] = []
        self.COMM_WORLD = SimpleNamespace(
            Get_rank=lambda: rank, Get_size=lambda: size, Abort=self.abort
        )

    def abort(self, status: int) -> NoReturn:
        self.aborted.append(status)
        raise SystemExit(status)

    def Is_initialized(self) -> bool:  # noqa: N802
        return True

    def Is_finalized(self) -> bool:  # noqa: N802
        return False


@pytest.fixture
def mpi_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(rank: int, size: int) -> FakeMpi:
        fake = FakeMpi(rank, size)
        monkeypatch.setitem(sys.modules, "mpi4py.MPI", fake)  # type: ignore[arg-type]
        monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=fake))  # type: ignore[arg-type]
        monkeypatch.setattr(launch.time, "sleep", lambda seconds: None)
        return fake

    return make


@pytest.mark.parametrize(
    ("error", "status"),
    [(ModelError("wrong"), 2), (RuntimeError("wrong"), 1), (KeyboardInterrupt(), 130)],
)
def test_a_rank_that_fails_ends_the_others(
    mpi_of: Any, error: BaseException, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    fake = mpi_of(3, 4)
    assert ended(error) == status
    assert fake.aborted == [status]
    assert "rank 3 on " in capfd.readouterr().err


@pytest.mark.parametrize("rank", [0, 3])
def test_what_all_ranks_know_is_told_by_rank_0_and_kills_nobody(
    mpi_of: Any, rank: int, capfd: pytest.CaptureFixture[str]
) -> None:
    fake = mpi_of(rank, 4)
    assert ended(launch.AgreedError("rank 1: no such file")) == 2
    assert not fake.aborted
    told = capfd.readouterr().err
    assert told == ("hpcsync: error: rank 1: no such file\n" if rank == 0 else "")


def test_agreed_errors_keep_their_class() -> None:
    for kind in (UserError, ConfigError, DataError, ModelError, LaunchError):
        error = runtime._agreed(kind)("rank 2: wrong")
        assert isinstance(error, kind)
        assert isinstance(error, launch.AgreedError)
        assert str(error) == "rank 2: wrong"


def test_crowding_counts_the_cores_that_ranks_have_together() -> None:
    def crowding(*cores: set[int], quota: float = 64) -> float:
        return launch.crowding_of([frozenset(each) for each in cores], quota)

    assert crowding({0}, {1}, {2}, {3}) == 1  # a core each, as mpirun binds them
    assert crowding({0, 1}, {0, 1}, {0, 1}, {0, 1}) == 2
    assert crowding({0, 1, 2, 3}) == 0.25
    assert crowding({0, 1, 2, 3}, {0, 1, 2, 3}, quota=1.5) == 2 / 1.5
    assert crowding({0, 1, 2, 3}, {0, 1, 2, 3}, quota=0.2) == 2
    assert crowding(set()) == 1


def test_rank_0_notes_its_status_for_the_script_that_started_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HPCSYNC_STATUS_FILE", str(tmp_path / "status"))
    with pytest.raises(SystemExit) as stop:
        launch.guard(lambda: 75)
    assert stop.value.code == 75
    assert (tmp_path / "status").read_text() == "75\n"
    monkeypatch.setenv("HPCSYNC_STATUS_FILE", str(tmp_path / "none" / "status"))
    with pytest.raises(SystemExit):  # which is no reason to fail
        launch.guard(lambda: 75)
