"""Whole jobs that are killed, resumed, told to save, and run on disks that fail."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hpcsync import checkpoint
from tests import launcher

pytestmark = [pytest.mark.usefixtures("mpi"), pytest.mark.timeout(280)]

TINY = (
    "train.steps=40",
    "train.warmup=2",
    "train.global_batch=12",
    "train.eval_batches=1",
    "train.eval_every=10",
    "model.layers=1",
    "model.width=32",
    "model.heads=2",
    "model.context=16",
    "data.options={max_mb=0.5}",
    "checkpoint.every=5",
    "trace.enabled=false",
)


def words(folder: Path, *more: str) -> list[str]:
    given = {word.partition("=")[0] for word in more}
    kept = [word for word in TINY if word.partition("=")[0] not in given]
    return ["-m", "hpcsync.train", *kept, "--out", str(folder), *more]


def start(ranks: int, folder: Path, *more: str) -> launcher.Job:
    return launcher.Job([*launcher.mpirun(ranks), sys.executable, *words(folder, *more)])


def run(ranks: int, folder: Path, *more: str, status: int = 0) -> launcher.Outcome:
    outcome = launcher.run(ranks, *words(folder, *more))
    outcome.assert_clean()
    assert outcome.status == status, outcome.describe()
    return outcome


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def curve(folder: Path) -> list[tuple[str, ...]]:
    names = ("step", "loss", "grad_norm", "lr", "val_loss")
    return [tuple(row[name] for name in names) for row in rows(folder)]


def same_bits(one: Path, other: Path) -> None:
    """Both ended with the same weights, optimizer, error stores and generators."""
    name = "checkpoints/step-00000040"
    with checkpoint.open(one / name) as a, checkpoint.open(other / name) as b:
        assert list(a.manifest.tensors) == list(b.manifest.tensors)
        for tensor in a.manifest.tensors:
            assert torch.equal(a.tensor(tensor), b.tensor(tensor)), tensor
        assert a.manifest.own == b.manifest.own


def steps_done(folder: Path) -> int:
    try:
        return len(rows(folder))
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (1, ("train.loss_scale=dynamic",)),
        (2, ("compress.codec=int8", "topology.ranks_per_node=1")),
        (4, ("compress.codec=powersgd", "topology.ranks_per_node=2", "checkpoint.files=node")),
    ],
)
def test_killed_at_a_random_instant_and_resumed(
    tmp_path: Path, ranks: int, more: tuple[str, ...]
) -> None:
    more = (*more, "compress.warmup=3", "compress.min_elements=64")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(ranks, whole, *more)
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    for least in (rng.randrange(3, 15), rng.randrange(15, 35)):
        job = start(ranks, killed, *more, "--resume", "auto")
        job.wait_until(lambda job=job, least=least: steps_done(killed) >= least)  # type: ignore[misc]
        time.sleep(rng.random() * 0.05)
        job.kill()
        for name in job.wait(30, grace=0).segments_left:  # nobody was left to remove them
            (launcher.SHM / name).unlink(missing_ok=True)
    run(ranks, killed, *more, "--resume", "auto")
    assert curve(killed) == curve(whole)
    same_bits(whole, killed)
    assert not [path for path in (killed / "checkpoints").iterdir() if path.name.startswith(".")]


def test_with_a_log_no_step_is_lost_but_that_under_way(tmp_path: Path) -> None:
    more = (
        *("compress.codec=topk", "compress.ratio=0.1", "compress.warmup=3"),
        *("compress.min_elements=64", "topology.ranks_per_node=1"),
        *("checkpoint.every=25", "checkpoint.replay_log=true"),
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(2, whole, *more)
    least = random.randrange(5, 35)
    print("killed after", least)
    job = start(2, killed, *more)
    job.wait_until(lambda: steps_done(killed) >= least)
    job.kill()
    for name in job.wait(30, grace=0).segments_left:
        (launcher.SHM / name).unlink(missing_ok=True)
    done = steps_done(killed)
    run(2, killed, *more, "--resume", "auto")
    events = [json.loads(line) for line in (killed / "log.jsonl").read_text().splitlines()]
    first = [each["first_step"] for each in events if each["event"] == "started"][1]
    assert first >= done
    assert [row[:4] for row in curve(killed)] == [row[:4] for row in curve(whole)]
    same_bits(whole, killed)


OTHERS = (
    *("compress.codec=int8", "compress.warmup=3", "compress.min_elements=64"),
    *("topology.ranks_per_node=1", "checkpoint.every=2", "train.steps=12", "train.eval_every=0"),
    "checkpoint.keep=9",
)


def test_other_numbers_of_ranks_and_back(tmp_path: Path) -> None:
    """From each to fewer or more, and to the first again: the loss goes on as if nothing had
    happened."""
    before = tmp_path / "whole"
    run(4, before, *OTHERS)
    wanted = {row["step"]: float(row["loss"]) for row in rows(before)}
    for now, step in ((1, 4), (3, 6), (2, 8), (4, 10)):
        place = tmp_path / f"of-{now}"
        path = before / "checkpoints" / f"step-{step:08d}"
        told = run(now, place, *OTHERS, "--resume", str(path)).stderr
        assert f"ranks = {now} (was" in told
        found = {row["step"]: float(row["loss"]) for row in rows(place)}
        assert len(found) == 12 - step
        assert found == pytest.approx({each: wanted[each] for each in found}, rel=5e-3)
        before = place


def test_a_signal_a_file_and_the_end_save(tmp_path: Path) -> None:
    made = tmp_path / "made"
    long = ("train.steps=100000", "checkpoint.every=0", "checkpoint.keep=9", "train.eval_every=0")
    job = start(2, made, *long)
    job.wait_until(lambda: steps_done(made) >= 3)
    job.signal(signal.SIGUSR1)
    job.wait_until(lambda: (made / "checkpoints" / "latest").exists())
    (made / "stop-after-save").touch()
    outcome = job.wait(60)
    outcome.assert_clean()
    assert outcome.status == 0, outcome.describe()
    assert "stopped after a checkpoint" in outcome.stderr
    assert not (made / "stop-after-save").exists()
    done = steps_done(made)
    latest = (made / "checkpoints" / "latest").read_text()
    assert latest == f"step-{done:08d}\n"
    job = start(2, made, *long, "--resume", "auto")
    job.wait_until(lambda: steps_done(made) >= done + 3)
    # To one rank, as a batch system may: mpirun would kill them all a moment later.
    ranks = [pid for pid, line in job.processes().items() if "mpirun" not in line.split()[0]]
    os.kill(ranks[-1], signal.SIGTERM)
    outcome = job.wait(60)
    assert outcome.status == 128 + signal.SIGTERM, outcome.describe()
    with checkpoint.open(made / "checkpoints" / f"step-{steps_done(made):08d}") as found:
        assert found.verify() == []


def test_resuming_what_cannot_be(tmp_path: Path) -> None:
    outcome = run(2, tmp_path / "x", "--resume", str(tmp_path / "none"), status=2)
    assert outcome.stderr.count("hpcsync: error: --resume: ") == 1
    assert "Traceback" not in outcome.text


NAMESPACE = ("unshare", "--mount", "--map-root-user")


@pytest.fixture
def namespace() -> None:
    """Skip the test where nothing can be mounted."""
    tried = [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    if shutil.which("unshare") is None or subprocess.run(tried, capture_output=True).returncode:
        pytest.skip("unshare --mount may mount nothing here")


def mounted(folder: Path, script: str, *more: str) -> launcher.Outcome:
    """A job of two ranks in a mount namespace, after ``script``; its run folder is ``$RUN``."""
    place = folder / "disk"
    place.mkdir()
    command = [*launcher.mpirun(2), sys.executable, *words(place / "run", *more)]
    quoted = " ".join(f"'{word}'" for word in command)
    text = f"set -e; DISK={place}; RUN={place}/run; {script}\nset +e; {quoted}; S=$?; "
    text += f"cp -r $RUN {folder}/copy; exit $S"
    return launcher.Job([*NAMESPACE, "sh", "-c", text]).wait(120)


@pytest.mark.usefixtures("namespace")
def test_a_full_disk(tmp_path: Path) -> None:
    """There is room for two checkpoints: training goes on without more, and the status tells."""
    outcome = mounted(
        tmp_path, "mount -t tmpfs -o size=900k tmpfs $DISK", "train.steps=24", "checkpoint.keep=9"
    )
    assert outcome.status == 3, outcome.describe()
    assert "was NOT saved: " in outcome.stderr
    assert "No space left on device" in outcome.stderr
    assert len(rows(tmp_path / "copy")) == 24
    assert {row["checkpoints_failed"] for row in rows(tmp_path / "copy")} > {"0"}
    found = sorted((tmp_path / "copy" / "checkpoints").iterdir())
    assert found[0].name == "latest"
    assert len(found) > 1
    for path in found[1:]:
        with checkpoint.open(path) as made:
            assert made.verify() == []


@pytest.mark.usefixtures("namespace")
def test_a_folder_that_becomes_read_only(tmp_path: Path) -> None:
    # The watcher ends with the shell: one that outlives a job that never began holds its pipes.
    script = """mount -t tmpfs tmpfs $DISK
    (C=$RUN/checkpoints; while [ ! -e $C/latest ]; do kill -0 $$ || exit; sleep 0.02; done
     mount --bind $C $C; mount -o remount,bind,ro $C) &"""
    outcome = mounted(tmp_path, script, "train.steps=300", "train.eval_every=0")
    assert outcome.status == 3, outcome.describe()
    assert "Read-only file system" in outcome.stderr
    assert len(rows(tmp_path / "copy")) == 300
    latest = (tmp_path / "copy" / "checkpoints" / "latest").read_text().strip()
    with checkpoint.open(tmp_path / "copy" / "checkpoints" / latest) as made:
        assert made.verify() == []


def test_a_limit_of_the_size_of_files(tmp_path: Path) -> None:
    """As a quota: nothing larger than 50 KB can be written."""
    command = [sys.executable, *words(tmp_path / "run", "train.steps=12")]
    outcome = launcher.Job(["sh", "-c", 'ulimit -f 100; exec "$@"', "sh", *command]).wait(120)
    assert outcome.status == 3, outcome.describe()
    assert "was NOT saved: File too large" in outcome.stderr
    assert len(rows(tmp_path / "run")) == 12


def test_the_folder_of_the_run_may_vanish(tmp_path: Path) -> None:
    made = tmp_path / "made"
    job = start(2, made, "train.steps=400", "checkpoint.every=20", "train.eval_every=0")
    job.wait_until(lambda: (made / "checkpoints" / "latest").exists())
    os.rename(made, tmp_path / "away")
    outcome = job.wait(120)
    outcome.assert_clean()
    assert outcome.status in (0, 3), outcome.describe()
    assert len(rows(tmp_path / "away")) == 400
