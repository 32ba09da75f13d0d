"""The saver of a small state, without a run: when it saves, and disks that are slow or fail."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from hpcsync import checkpoint, launch
from hpcsync.checkpoint import folder as folders
from hpcsync.checkpoint.contract import About, Outcome, Taken
from hpcsync.checkpoint.files import Files
from hpcsync.checkpoint.saver import Saver
from hpcsync.checkpoint.writer import Part, PartWriter
from hpcsync.config import CheckpointConfig, TopologyConfig
from hpcsync.errors import CheckpointError
from hpcsync.runtime import Runtime
from hpcsync.topology import Topology
from tests.tiny_runs import SIZE, step

pytestmark = pytest.mark.mpi


class Job:
    """A saver of a small state, without a run around it."""

    def __init__(self, folder: Path, runtime: launch.Runtime, **keys: Any) -> None:
        self.outcomes: list[Outcome] = []
        self.runtime = runtime
        self.weights = torch.zeros(1000, 7)
        self.saver = Saver(
            runtime,
            CheckpointConfig(**{"every": 1, **keys}),
            folder,
            lambda: Taken({"w": self.weights, "tokens": 3}, {"r": torch.arange(5)}),
            About(run_id="x", config="", versions={}),
            told=self.outcomes.append,
        )

    def step(self, number: int) -> None:
        self.weights.fill_(float(number))
        saver = self.saver
        saver.hear(self.runtime.allreduce_scalar(saver.offer(number)))
        saver.boundary(number)


@pytest.fixture
def make(folder: Path) -> Any:
    with launch.start(TopologyConfig(), timeout_s=30.0) as runtime:
        made: list[Job] = []

        def build(**keys: Any) -> Job:
            made.append(Job(folder, runtime, **keys))
            return made[-1]

        yield build
        for job in made:
            job.saver.close()


def kept(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "checkpoints"))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_snapshots_are_of_their_step(
    folder: Path, make: Callable[..., Job], asynchronous: bool
) -> None:
    job = make(async_=asynchronous, keep=3, keep_every=2)
    for number in range(1, 9):
        job.step(number)
        job.saver.drain()
    assert [each.step for each in job.outcomes] == list(range(1, 9))
    assert not job.saver.failed
    if job.runtime.rank == 0:
        steps = [2, 4, 6, 7, 8]
        assert kept(folder) == ["latest", *(f"step-{each:08d}" for each in steps)]
        assert (folder / "checkpoints" / "latest").read_text() == "step-00000008\n"
        for number in steps:
            with checkpoint.open(folder / "checkpoints" / f"step-{number:08d}") as found:
                assert found.verify() == []
                assert bool((found.common()["w"] == number).all())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_costs_that_checkpoint_alone(
    folder: Path,
    make: Callable[..., Job],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    code: int,
) -> None:
    job = make()
    job.step(1)
    job.saver.drain()
    before = PartWriter.write

    def fails(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    if job.runtime.rank == SIZE - 1:
        monkeypatch.setattr(PartWriter, "write", fails)
    job.step(2)
    job.saver.drain()
    assert job.saver.failed
    assert os.strerror(code) in job.outcomes[-1].problem
    if job.runtime.rank == 0:
        told = capfd.readouterr().err
        assert "the checkpoint of step 2 was NOT saved" in told
        assert "the last one is step 1" in told
    monkeypatch.setattr(PartWriter, "write", before)
    job.step(3)
    job.saver.drain()
    assert not job.saver.failed
    assert [bool(each.problem) for each in job.outcomes] == [False, True, False]
    if job.runtime.rank == 0:
        assert kept(folder) == ["latest", "step-00000001", "step-00000003"]


def test_the_last_rename_may_fail(
    folder: Path, make: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make()

    def fails(*_: Any) -> None:
        raise OSError(errno.EIO, "planted")

    monkeypatch.setattr(folders, "publish", fails)
    job.step(1)
    job.saver.drain()
    assert "planted" in job.outcomes[-1].problem


def test_what_fails_in_tidying_up_costs_nothing(
    folder: Path,
    make: Callable[..., Job],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    job = make(keep=1)
    job.step(1)
    job.saver.drain()

    def fails(*_: Any) -> None:
        raise CheckpointError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(folders, "set_latest", fails)
        job.step(2)
        job.saver.drain()
    if job.runtime.rank == 0:
        assert kept(folder) == ["latest", "step-00000002"], "pruned all the same"
    monkeypatch.setattr(folders, "prune", fails)
    job.step(3)
    job.saver.drain()
    assert [each.problem for each in job.outcomes] == ["", "", ""]
    if job.runtime.rank == 0:
        assert folders.latest(folder / "checkpoints") == "step-00000003"
        assert capfd.readouterr().err.count("planted") == 2


@pytest.mark.parametrize("files", ["rank", "node"])
def test_ranks_may_take_turns_over_the_nodes(folder: Path, files: str) -> None:
    nodes = Topology.group([f"node{rank % 2}" for rank in range(SIZE)])
    with Runtime(MPI.COMM_WORLD.Dup(), nodes, 30.0) as runtime:
        job = Job(folder, runtime, files=files)
        job.step(1)
        job.saver.drain()
        job.saver.close()
    assert [each.problem for each in job.outcomes] == [""]
    if MPI.COMM_WORLD.rank == 0:
        with checkpoint.open(step(folder, 1)) as found:
            assert found.verify() == []
            assert bool((found.common()["w"] == 1).all())
            count = min(2, SIZE) if files == "node" else SIZE
            assert len(found.manifest.files) == count + 1


def test_a_share_that_cannot_be_made_costs_that_checkpoint_alone(
    folder: Path, make: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make(files="node")

    def fails(*_: Any) -> None:
        raise CheckpointError("planted")

    with monkeypatch.context() as patch:
        if job.runtime.rank == SIZE - 1:
            patch.setattr(Files, "_make", fails)
        job.step(1)
        job.saver.drain()
    job.step(2)
    job.saver.drain()
    assert ["planted" in each.problem for each in job.outcomes] == [True, False]
    assert not job.outcomes[1].problem


def test_the_newest_checkpoint_tells_whether_the_last_was_saved(
    folder: Path, make: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that cannot be written ends before the one before it has its name."""
    job, gate, before = make(), threading.Event(), folders.publish

    def waits(*arguments: Any) -> None:
        assert gate.wait(60)
        before(*arguments)

    monkeypatch.setattr(folders, "publish", waits)
    job.step(1)
    while not job.saver._publishing:
        job.saver.hear(job.runtime.allreduce_scalar(job.saver.offer()))
        job.saver._advance()
    job.weights = torch.eye(3).to_sparse()  # type: ignore[assignment]
    job.saver.require()
    job.saver.boundary(2)
    while not job.outcomes:
        job.saver.hear(job.runtime.allreduce_scalar(job.saver.offer()))
        job.saver._advance()
    gate.set()
    job.saver.drain()
    assert [(each.step, bool(each.problem)) for each in job.outcomes] == [(2, True), (1, False)]
    assert job.saver.failed


def test_a_slow_disk_holds_up_nobody(
    folder: Path,
    make: Callable[..., Job],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Writing goes on only after step 6: two checkpoints are taken before, the next after."""
    job, gate, before = make(keep=9), threading.Event(), PartWriter.write

    def waits(*arguments: Any) -> Part:
        assert gate.wait(60)
        return before(*arguments)

    monkeypatch.setattr(PartWriter, "write", waits)
    for number in range(1, 7):
        job.step(number)
    assert not job.outcomes
    gate.set()
    job.saver.drain()
    job.step(7)
    job.saver.drain()
    assert [each.step for each in job.outcomes] == [1, 2, 7]
    if job.runtime.rank == 0:
        assert capfd.readouterr().err.count("will be taken later") == 1
        for number in (1, 2, 7):
            with checkpoint.open(folder / "checkpoints" / f"step-{number:08d}") as found:
                assert bool((found.common()["w"] == number).all())


def test_the_folder_of_checkpoints_may_vanish(folder: Path, make: Callable[..., Job]) -> None:
    job = make()
    for number in (1, 2):
        job.step(number)
        job.saver.drain()
        MPI.COMM_WORLD.Barrier()
        if job.runtime.rank == 0:
            (folder / "checkpoints").rename(folder / f"away-{number}")
        MPI.COMM_WORLD.Barrier()
    assert not any(each.problem for each in job.outcomes)


def test_who_asks_gets_one(folder: Path, make: Callable[..., Job]) -> None:
    job = make(every=0)
    job.step(1)
    job.saver.drain()
    assert not job.outcomes
    if job.runtime.rank == SIZE - 1:
        job.saver.ask()  # as SIGUSR1 does
    job.step(2)
    job.saver.drain()
    if job.runtime.rank == 0:
        (folder / "save-now").touch()
        job.saver._triggers._looked_s = 0.0
    job.step(3)
    job.saver.drain()
    if job.runtime.rank == 0:
        assert not (folder / "save-now").exists()
        (folder / "stop-after-save").touch()
        job.saver._triggers._looked_s = 0.0
    assert not job.saver.stop
    job.step(4)
    assert job.saver.stop
    job.saver.finish(4, save=False)
    assert [each.step for each in job.outcomes] == [2, 3, 4]
    assert job.runtime.rank or not (folder / "stop-after-save").exists()


def test_a_state_that_cannot_be_stored_is_told(folder: Path, make: Callable[..., Job]) -> None:
    job = make(files="node")
    job.weights = torch.eye(3).to_sparse()  # type: ignore[assignment]
    job.saver.require()
    job.saver.boundary(1)
    job.saver.drain()
    assert "sparse" in job.outcomes[-1].problem
