"""Runs that save and go on, on the ranks of this job."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

from hpcsync import assembly, checkpoint, launch, resuming, train
from hpcsync import config as configs
from hpcsync.checkpoint import folder as folders
from hpcsync.checkpoint import reader
from hpcsync.checkpoint.contract import About, Outcome, Taken
from hpcsync.checkpoint.files import Files
from hpcsync.checkpoint.saver import Saver
from hpcsync.checkpoint.writer import Part, PartWriter
from hpcsync.config import CheckpointConfig, Config, TopologyConfig
from hpcsync.engine import Engine
from hpcsync.errors import CheckpointError, UserError
from hpcsync.gradients import memory
from hpcsync.loop import Loop
from hpcsync.runtime import Runtime
from hpcsync.stopping import StopSignals
from hpcsync.topology import Topology
from tests.checkpoints import make as write

pytestmark = pytest.mark.mpi

SIZE = MPI.COMM_WORLD.size
TINY = (
    "train.steps=8",
    "train.warmup=2",
    "train.global_batch=8",
    "train.eval_batches=1",
    "train.eval_every=4",
    "model.layers=1",
    "model.width=32",
    "model.heads=2",
    "model.context=16",
    "model.dropout=0.1",
    "data.options={max_mb=0.5}",
    "checkpoint.every=4",
    "trace.enabled=false",
)
CODED = (
    *("bf16", "fp8", "int8", "int8_shared", "int4", "onebit", "topk", "threshold", "randomk"),
    "powersgd",
)
# What differs between two runs of the same bits.
OF_THE_RUN = {"run"}


@pytest.fixture
def folder(comm: MPI.Intracomm, tmp_path: Path) -> Path:
    """A folder that all ranks share."""
    shared: Path = comm.bcast(tmp_path)
    return shared


def run(*words: str) -> int:
    given = {word.partition("=")[0] for word in words}
    status = train.run([*(word for word in TINY if word.partition("=")[0] not in given), *words])
    MPI.COMM_WORLD.Barrier()
    return status


def step(run: Path, number: int) -> str:
    return str(run / "checkpoints" / f"step-{number:08d}")


def numbers(run: Path) -> list[tuple[str, ...]]:
    return columns(run, ("step", "loss", "lr", "grad_norm", "loss_scale", "codec", "val_loss"))


def columns(run: Path, names: tuple[str, ...]) -> list[tuple[str, ...]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [tuple(row[name] for name in names) for row in csv.DictReader(file)]


def same_bits(one: Path, other: Path, number: int) -> None:
    """All that two runs would go on from is the same: tensors, plain values, generators."""
    with checkpoint.open(step(one, number)) as a, checkpoint.open(step(other, number)) as b:
        assert list(a.manifest.tensors) == list(b.manifest.tensors)
        for name in a.manifest.tensors:
            assert torch.equal(a.tensor(name), b.tensor(name)), name
        assert a.manifest.own == b.manifest.own
        common = a.manifest.common, b.manifest.common
        assert {k for k in common[0] if common[0][k] != common[1][k]} <= OF_THE_RUN


@pytest.mark.parametrize("codec", CODED)
def test_a_resumed_run_makes_the_same_bits(folder: Path, comm: MPI.Intracomm, codec: str) -> None:
    words = [
        f"compress.codec={codec}",
        "compress.warmup=2",
        "compress.min_elements=64",
        "compress.rounding=stochastic",
        "compress.rank=2",
        f"topology.ranks_per_node={max(1, SIZE // 2)}",
        f"checkpoint.files={'node' if codec in ('int8', 'powersgd') else 'rank'}",
    ]
    words += ["compress.momentum=0.5", "compress.ratio=0.1"] if codec == "topk" else []
    words += ["train.optimizer=onebit_adam", "train.freeze=3"] if codec == "onebit" else []
    words += ["train.loss_scale=dynamic"] if codec == "int4" else []
    whole, rest = folder / "whole", folder / "rest"
    assert run(*words, "--out", str(whole)) == 0
    assert run(*words, "--out", str(rest), "--resume", step(whole, 4)) == 0
    if comm.rank == 0:
        assert numbers(rest) == numbers(whole)[4:]
        same_bits(whole, rest, 8)
        held = [name for name in os.listdir(step(whole, 8)) if name.endswith(".h5")]
        writers = min(2, SIZE) if "checkpoint.files=node" in words else SIZE
        assert len(held) == writers + 1


def test_a_run_goes_on_in_its_folder(
    folder: Path, comm: MPI.Intracomm, capfd: pytest.CaptureFixture[str]
) -> None:
    """What came after the checkpoint is done again, and its rows are there once."""
    made, whole = folder / "made", folder / "whole"
    auto = ("--out", str(made), "--resume", "auto")
    assert run("train.steps=8", "--out", str(whole)) == 0
    assert run("checkpoint.every=3", "checkpoint.at_end=false", *auto) == 0
    assert comm.rank or "starts anew" in capfd.readouterr().err
    if comm.rank == 0:
        names = sorted(os.listdir(made / "checkpoints"))
        assert names == ["latest", "step-00000003", "step-00000006"]
        (made / "checkpoints" / ".step-00000007.tmp").mkdir()
        with (made / "metrics.csv").open("a") as file:
            file.write("9,1.2")  # torn off by a kill
    comm.Barrier()
    assert run("train.eval_every=2", *auto) == 0
    if comm.rank == 0:
        told = capfd.readouterr().err
        assert "train.eval_every = 2 (was 4)" in told
        assert f"goes on after step 6, from {step(made, 6)}" in told
        assert [row[:4] for row in numbers(made)] == [row[:4] for row in numbers(whole)]
        same_bits(whole, made, 8)
        assert not (made / "checkpoints" / ".step-00000007.tmp").exists()
        assert (made / "config-1.toml").exists()
        summary = json.loads((made / "summary.json").read_text())
        first = json.loads((whole / "summary.json").read_text())
        assert (summary["first_step"], summary["steps"], summary["status"]) == (6, 8, "done")
        for name in ("loss_first", "val_loss_first", "loss_last", "val_loss"):
            assert summary[name] == first[name]
        events = [json.loads(line) for line in (made / "log.jsonl").read_text().splitlines()]
        assert [e["first_step"] for e in events if e["event"] == "started"] == [0, 6]


def test_nothing_is_left_to_do(folder: Path, comm: MPI.Intracomm) -> None:
    made = folder / "made"
    assert run("--out", str(made)) == 0
    before = numbers(made) if comm.rank == 0 else []
    assert run("--resume", str(made)) == 0
    if comm.rank == 0:
        assert numbers(made) == before
        assert sorted(os.listdir(made / "checkpoints")) == [
            "latest",
            "step-00000004",
            "step-00000008",
        ]


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    folder: Path, comm: MPI.Intracomm, capfd: pytest.CaptureFixture[str]
) -> None:
    made = folder / "made"
    assert run("--out", str(made)) == 0
    if comm.rank == 0:
        with checkpoint.open(step(made, 8)) as found:
            stored = found.manifest.tensors["model/embedding.weight"].pieces[-1]
        path = Path(step(made, 8)) / stored.file
        data = bytearray(path.read_bytes())
        data[stored.offset + 5] ^= 4
        path.write_bytes(data)
    comm.Barrier()
    assert run("--resume", str(made)) == 0
    if comm.rank == 0:
        told = capfd.readouterr().err
        assert "damaged checkpoint" in told
        assert f"{stored.file}: dataset model/embedding.weight" in told.replace("'", "")
        assert "set aside as step-00000008.damaged" in told
        names = sorted(os.listdir(made / "checkpoints"))
        assert names == ["latest", "step-00000004", "step-00000008", "step-00000008.damaged"]
        for number in (4, 8):
            os.unlink(Path(step(made, number)) / "index.h5")
    comm.Barrier()
    with pytest.raises(UserError, match=r"no checkpoint is whole: .*index\.h5"):
        run("--resume", str(made), "train.steps=12")


@pytest.mark.parametrize("where", ["index.h5", "the rest of a file", "held back", "generators"])
@pytest.mark.parametrize("nodes", ["same", "other"])
def test_a_bit_flipped_anywhere_is_found(
    folder: Path, comm: MPI.Intracomm, capfd: pytest.CaptureFixture[str], where: str, nodes: str
) -> None:
    """Whoever needs the bytes, or nobody: of each file all are checked."""
    if where == "held back" and SIZE < 2:
        pytest.skip("one rank holds nothing back")
    made = folder / "made"
    words = ["compress.codec=int8", "compress.warmup=1", "compress.min_elements=64"]
    words += ["compress.where=all", "train.eval_every=0", "checkpoint.every=2", "train.steps=4"]
    assert run(*words, "topology.ranks_per_node=1", "--out", str(made)) == 0
    if comm.rank == 0:
        with checkpoint.open(step(made, 4)) as found:
            last = f"ranks/{SIZE - 1}/"
            part = {"held back": "held", "generators": "random"}.get(where)
            if part:
                name = next(n for n in found.manifest.tensors if n.startswith(last + part))
                piece = found.manifest.tensors[name].pieces[0]
                file, at = piece.file, piece.offset
            else:
                file = "index.h5" if where == "index.h5" else folders.data_file(SIZE - 1)
                at = found._rest(file)[-1][0]
        path = Path(step(made, 4)) / file
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)
    comm.Barrier()
    placed = "topology.ranks_per_node=" + ("1" if nodes == "same" else str(SIZE))
    assert run(*words, placed, "--resume", str(made)) == 0
    if comm.rank == 0:
        told = capfd.readouterr().err
        assert f"damaged checkpoint: {path}" in told
        assert f"goes on after step 2, from {step(made, 2)}" in told
        assert Path(step(made, 4) + ".damaged").exists()


def test_a_file_that_one_rank_cannot_read_holds_up_nobody(
    folder: Path, comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be there again later: the checkpoint is not set aside."""
    made = folder / "made"
    assert run("--out", str(made)) == 0

    def preadv(*_: Any) -> int:
        raise OSError(errno.ESTALE, "Stale file handle")

    def read(*words: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", preadv)
            whole(*words)

    whole = reader.Checkpoint.read
    if comm.rank == SIZE - 1:
        monkeypatch.setattr(reader.Checkpoint, "read", read)
    with pytest.raises(CheckpointError, match="cannot be read: Stale file handle"):
        run("--resume", str(made))
    assert Path(step(made, 8)).exists()


def test_changed_decks(folder: Path, comm: MPI.Intracomm) -> None:
    made = folder / "made"
    assert run("--out", str(made)) == 0
    with pytest.raises(CheckpointError, match=r"train\.lr = 0\.5 .*--allow-change train\.st.*\.lr"):
        run("--resume", str(made), "train.lr=0.5", "train.beta1=0.5", "train.steps=9")
    with pytest.raises(CheckpointError, match=r"train\.steps = 9 \(was 8\); set"):
        run("--resume", str(made), "train.steps=9")
    with pytest.raises(CheckpointError, match=r"model\.width = 64"):
        run("--resume", str(made), "model.width=64")
    words = ("model.width=64", "--allow-change", "model.width")
    with pytest.raises(CheckpointError, match=r"embedding\.weight has shape"):
        run("--resume", str(made), *words)
    words = ("train.lr=0.5", "train.beta1=0.5", "train.global_batch=16", "train.steps=9")
    names = "train.lr,train.beta1,train.global_batch,train.steps"
    assert run("--resume", str(made), *words, "--allow-change", names) == 0
    if comm.rank == 0:
        assert len(numbers(made)) == 9
        with checkpoint.open(step(made, 9)) as found:
            assert found.manifest.tokens == (8 * 8 + 16) * 16


def test_a_damaged_checkpoint_of_another_deck_stops_one_run_alone(
    folder: Path, comm: MPI.Intracomm, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without a deck the newest one's is taken, which need not be that of the one before."""
    made = folder / "made"
    assert run("--out", str(made)) == 0
    words = ("train.lr=0.5", "train.steps=9", "--allow-change", "train.lr,train.steps")
    assert run("--resume", str(made), *words) == 0
    if comm.rank == 0:
        index = Path(step(made, 9)) / "index.h5"
        index.write_bytes(bytes(index.stat().st_size))
    comm.Barrier()
    with pytest.raises(CheckpointError, match=r"differs .*step-00000008: train.steps = 9 "):
        train.run(["--resume", str(made)])
    comm.Barrier()
    told = capfd.readouterr().err
    assert comm.rank or "set aside as step-00000009.damaged" in told
    assert train.run(["--resume", str(made)]) == 0
    comm.Barrier()
    told = capfd.readouterr().err
    assert comm.rank or f"goes on after step 8, from {step(made, 8)}" in told


def test_other_nodes_take_over_what_codecs_held_back(folder: Path, comm: MPI.Intracomm) -> None:
    if SIZE < 4:
        pytest.skip("needs 4 ranks for two placements that both code")
    words = ("compress.codec=int8", "compress.warmup=1", "compress.min_elements=64")
    made = folder / "made"
    assert run(*words, "topology.ranks_per_node=2", "--out", str(made)) == 0
    rest = folder / "rest"
    other = ("topology.ranks_per_node=1", "--out", str(rest))
    assert run(*words, *other, "--resume", step(made, 4)) == 0
    if comm.rank == 0:
        losses = [[float(row[1]) for row in numbers(each)] for each in (made, rest)]
        assert losses[1] == pytest.approx(losses[0][4:], rel=2e-3)


def test_what_nobody_can_hold_back_any_more_is_told(
    folder: Path, comm: MPI.Intracomm, capfd: pytest.CaptureFixture[str]
) -> None:
    if SIZE < 2:
        pytest.skip("one rank sends nothing")
    words = ("compress.codec=int8", "compress.warmup=1", "compress.min_elements=64")
    made, rest = folder / "made", folder / "rest"
    assert run(*words, "topology.ranks_per_node=1", "--out", str(made)) == 0
    capfd.readouterr()
    one_node = ("topology.ranks_per_node=0", "--out", str(rest))
    assert run(*words, *one_node, "--resume", step(made, 4)) == 0
    comm.Barrier()
    told = capfd.readouterr().err
    assert ("what codecs held back is dropped" in told) == (comm.rank == 0)


def tiny(*words: str) -> Config:
    given = {word.partition("=")[0] for word in words}
    return configs.load(
        None, [*(word for word in TINY if word.partition("=")[0] not in given), *words]
    )


@pytest.mark.parametrize("codec", ["int8", "topk"])
@pytest.mark.parametrize("ranks", [1, SIZE, SIZE + 1, 2 * SIZE + 1])
def test_nothing_that_codecs_held_back_is_lost_on_other_ranks_and_nodes(
    folder: Path, comm: MPI.Intracomm, ranks: int, codec: str
) -> None:
    """What is pending of each parameter, in units of the mean, is the same before and after."""
    if SIZE < 2:
        pytest.skip("one rank sends nothing")
    words = [f"compress.codec={codec}", "compress.warmup=1", "compress.min_elements=64"]
    words += ["compress.where=all", "train.steps=4"]
    assert run(*words, "topology.ranks_per_node=1", "--out", str(folder / "made")) == 0
    path = Path(step(folder / "other", 4))
    if comm.rank == 0:  # the same state, as if more or fewer ranks had saved it
        with checkpoint.open(step(folder / "made", 4)) as found:
            owns = [found.own(rank % SIZE) for rank in range(ranks)]
            assert found.manifest.ranks == SIZE
            write(path.parent, 4, found.common(), owns, config=found.manifest.config)
    comm.Barrier()
    config = tiny(*words, "topology.ranks_per_node=1")  # what was written has all on one node
    with launch.start(config.topology, timeout_s=30.0) as runtime:
        signals = StopSignals(lambda _: None, lambda _: None)
        parts = assembly.assemble(runtime, config, signals, fresh=False)
        with checkpoint.open(path) as found:
            resuming.take_up(runtime, config, parts, resuming.Plan(candidates=(path,)))
            reducer = parts.parallel.reducer
            before, after = (memory.Sums(reducer.layout.described) for _ in range(2))
            for rank in range(runtime.rank, ranks, SIZE):
                before.add(found.own(rank)["held"])
        after.add(parts.state().own["held"])
        errors = [sums.over(runtime)[memory.ERROR] for sums in (before, after)]
        assert any(values.any() for values in errors[0].values())
        for name, values in errors[0].items():
            np.testing.assert_allclose(errors[1][name], values, rtol=1e-4, atol=1e-8)


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


def test_no_step_is_made_before_a_log_has_its_base(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill in the first steps would cost all of them while the first checkpoint is written."""
    write, engine_step = PartWriter.write, Engine.step
    there: list[bool] = []

    def slowly(*arguments: Any) -> Part:
        time.sleep(0.3)
        return write(*arguments)

    def step_(engine: Engine, batches: Any) -> Any:
        there.append((folder / "made" / "checkpoints" / "latest").exists())
        return engine_step(engine, batches)

    monkeypatch.setattr(PartWriter, "write", slowly)
    monkeypatch.setattr(Engine, "step", step_)
    words = ("checkpoint.replay_log=true", "train.steps=3", "--out", str(folder / "made"))
    assert run(*words) == 0
    assert there == [True] * 3


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


def test_a_log_is_not_replayed_on_another_base(
    folder: Path, comm: MPI.Intracomm, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run that does not log has replaced a checkpoint that a log follows on."""
    made, replay = folder / "made", folder / "made" / "checkpoints" / "replay"
    words = ("checkpoint.every=3", "checkpoint.at_end=false", "--out", str(made))
    assert run(*words, "checkpoint.replay_log=true") == 0
    if comm.rank == 0:
        shutil.rmtree(step(made, 6))
        shutil.copytree(replay, folder / "kept")
    comm.Barrier()
    changed = ("train.lr=0.01", "--allow-change", "train.lr", "--resume", "auto")
    assert run(*words, *changed, "checkpoint.replay_log=false") == 0
    expected = numbers(made) if comm.rank == 0 else []
    assert not replay.exists()
    comm.Barrier()
    if comm.rank == 0:
        (folder / "kept").rename(replay)
        capfd.readouterr()
    comm.Barrier()
    assert run(*words, *changed, "checkpoint.replay_log=true") == 0
    if comm.rank == 0:
        assert "it is of another run" in capfd.readouterr().err
        assert numbers(made) == expected


@pytest.mark.parametrize("last", [4, 8])
def test_a_replay_that_ends_before_the_held_out_loss(
    folder: Path, comm: MPI.Intracomm, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lost run died between a step and its held-out loss."""
    made, whole = folder / "made", folder / "whole"
    words = ("checkpoint.every=0", "checkpoint.at_end=false", "checkpoint.replay_log=true")
    assert run(*words, "--out", str(whole)) == 0

    def dies(self: Loop) -> float:
        if self.parts.engine.step_count == last:
            raise UserError("planted")
        return before(self)

    before = Loop.held_out
    monkeypatch.setattr(Loop, "held_out", dies)
    with pytest.raises(UserError, match="planted"):
        run(*words, "--out", str(made))
    monkeypatch.undo()
    comm.Barrier()
    assert run(*words, "--out", str(made), "--resume", "auto") == 0
    if comm.rank == 0:
        names = ("step", "loss", "lr", "grad_norm", "loss_scale", "val_loss")
        assert columns(made, names) == columns(whole, names)
        found, wanted = (json.loads((each / "summary.json").read_text()) for each in (made, whole))
        assert (found["checkpoint_step"], found["first_step"]) == (0, last)
        for name in ("loss_first", "loss_last", "val_loss", "skipped", "steps", "status"):
            assert found[name] == wanted[name]


def test_a_loss_that_is_nan_ends_a_replay_as_it_ended_the_run(
    folder: Path,
    comm: MPI.Intracomm,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    made, before = folder / "made", Engine.step
    words = ("checkpoint.every=0", "checkpoint.at_end=false", "--out", str(made))

    def step(self: Engine, batches: Any) -> Any:
        result = before(self, batches)
        bad = result.step == 3 and comm.rank == comm.size - 1
        return dataclasses.replace(result, loss=math.nan) if bad else result

    monkeypatch.setattr(Engine, "step", step)
    assert run(*words, "checkpoint.replay_log=true") == 1
    monkeypatch.undo()
    capfd.readouterr()
    assert run(*words, "checkpoint.replay_log=true", "--resume", "auto") == 1
    if comm.rank == 0:
        assert f"step 3: the loss is nan on rank {SIZE - 1}" in capfd.readouterr().err
        summary = json.loads((made / "summary.json").read_text())
        assert summary["status"] == "failed"
        assert "checkpoint.replay_log=false" in summary["detail"]
    comm.Barrier()
    assert run(*words, "checkpoint.replay_log=false", "--resume", "auto") == 0


def test_a_stopped_run_tells_that_its_last_checkpoint_failed(
    folder: Path,
    comm: MPI.Intracomm,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    made = folder / "made"

    def fails(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = Engine.step

    def step(self: Engine, batches: Any) -> Any:
        if self.step_count == 2 and comm.rank == comm.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(self, batches)

    monkeypatch.setattr(PartWriter, "write", fails)
    monkeypatch.setattr(Engine, "step", step)
    assert run("--out", str(made), "train.eval_every=0") == 128 + signal.SIGTERM
    if comm.rank == 0:
        text = "stopped by SIGTERM; the last checkpoint was not saved"
        assert capfd.readouterr().err.splitlines()[-1] == f"hpcsync: {text}"
        summary = json.loads((made / "summary.json").read_text())
        assert (summary["status"], summary["detail"]) == ("interrupted", text)
