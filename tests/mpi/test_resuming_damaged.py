"""Checkpoints that are damaged or cannot be read when a run is to go on from them."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from hpcsync import checkpoint, train
from hpcsync.checkpoint import folder as folders
from hpcsync.checkpoint import reader
from hpcsync.errors import CheckpointError, UserError
from tests.tiny_runs import SIZE, run, step

pytestmark = pytest.mark.mpi


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
