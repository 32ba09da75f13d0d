"""Replay logs that are torn, flipped, of another state, or on disks that fail or are slow."""

from __future__ import annotations

import copy
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from hpcsync.checkpoint.replay import chain
from hpcsync.checkpoint.replay import log as log_module
from hpcsync.checkpoint.replay.background import Background
from hpcsync.checkpoint.replay.records import scan
from tests.replayed import KIB, LARGE, RANK, SIZE, STEPS, WORLD, Run, logged, mine, recovered, same

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("codec", ["none", "int8"])
def test_the_step_that_all_ranks_have(folder: Path, codec: str) -> None:
    """The last rank died while it wrote the last step."""
    states = logged(folder, codec)
    if RANK == SIZE - 1:
        os.truncate(mine(folder), mine(folder).stat().st_size - 1)
    WORLD.Barrier()
    state = states[0]
    assert recovered(folder, state, codec) == STEPS - 1
    same(state, states[STEPS - 1])


@pytest.mark.parametrize("codec", ["none", "int8"])
def test_a_flipped_bit_in_the_middle(
    folder: Path, codec: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Small states of a rank stand in every record; large ones are there for the newest steps."""
    settings = LARGE | {"warmup": 0}
    states = logged(folder, codec, **settings)
    if RANK == 0:
        third = [each for each in scan(mine(folder))[0] if each.meta["kind"] == "step"][2]
        content = bytearray(mine(folder).read_bytes())
        content[third.start + 100] ^= 4
        mine(folder).write_bytes(content)
    WORLD.Barrier()
    state = states[0]
    large = codec == "int8" and SIZE > 1
    last = recovered(folder, state, codec, **settings)
    assert last == (0 if large else 2)
    same(state, states[last])
    if RANK == 0:
        told = capfd.readouterr().err
        assert "the record of step 3 has another checksum than its content" in told
        assert ("resuming from the checkpoint of step 0 alone" in told) == large


def test_one_slot_is_torn(folder: Path) -> None:
    states = logged(folder, "int8", **LARGE)
    if SIZE > 1 and RANK == 0:
        path = chain.slot_paths(folder, 0)[STEPS % 2]
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    WORLD.Barrier()
    state = states[0]
    last = recovered(folder, state, "int8", **LARGE)
    assert last == (STEPS - 1 if SIZE > 1 else STEPS)
    same(state, states[last])


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"lineage": "other"}, "run"),
        ({"codec": "bf16"}, "section"),
        ({"comm": {"bucket_mb": 3 * KIB}}, "section"),
        ({"train": {"optimizer": "onebit_adam"}}, "section"),
        ({"train": {"beta2": 0.9}}, "section"),
        ({"train": {"weight_decay": 0.3}}, "section"),
        ({"step": 4}, "begins at step 0, not at step 4"),
    ],
)
def test_a_log_that_is_not_of_this_state(
    folder: Path, changed: dict[str, Any], word: str, capfd: pytest.CaptureFixture[str]
) -> None:
    state = logged(folder, "none", steps=2)[0]
    assert recovered(folder, state, **{"codec": "none"} | changed) == changed.get("step", 0)
    told = [line for line in capfd.readouterr().err.splitlines() if "replay log" in line]
    assert [word in line for line in told] == [True] * (RANK == 0)
    # What is logged from here on follows the checkpoint.
    assert list(chain.logs(folder, RANK)) == [changed.get("step", 0)]


def test_checkpoints_on_the_way(folder: Path) -> None:
    """Files follow each other; those before a published checkpoint go."""
    lost = Run(1, "topk")
    states = [lost.state()]
    log = lost.log(folder)
    log.start(0)
    for number in range(1, 8):
        lost.step(number, log)
        states.append(lost.state())
        if number in (2, 5):
            log.start(number)
    state = copy.deepcopy(states[0])
    assert recovered(folder, state, "topk") == 7
    same(state, states[7])
    state = copy.deepcopy(states[2])
    assert recovered(folder, state, "topk", step=2) == 7
    same(state, states[7])
    log.published(5)
    log.close()
    lost.close()
    assert list(chain.logs(folder, RANK)) == [5]
    state = states[5]
    assert recovered(folder, state, "topk", step=5) == 7
    same(state, states[7])


def test_what_the_replay_leaves_behind_goes_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a checkpoint begins a file of the same name."""
    lost = Run(1, "none")
    states = [lost.state()]
    log = lost.log(folder)
    log.start(0)
    for number in range(1, 6):
        lost.step(number, log)
        states.append(lost.state())
        if number == 4:
            log.start(4)
    log.close()
    lost.close()
    if RANK == 0:
        os.truncate(mine(folder), mine(folder).stat().st_size - 1)
    WORLD.Barrier()
    monkeypatch.setattr(Background, "remove", lambda *_: None)
    assert recovered(folder, states[0], "none") == 3
    same(states[0], states[3])
    assert list(chain.logs(folder, RANK)) == [0]


def test_a_disk_that_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Training goes on, the space is given back, and the next checkpoint begins anew."""
    lost = Run(1, "int8")
    log = lost.log(folder)
    log.start(0)
    lost.step(1, log)
    real = os.pwritev

    def fail(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    if RANK == 0:
        monkeypatch.setattr(os, "pwritev", fail)
    lost.step(2, log)
    assert bool(log.problem) == (RANK == 0)
    monkeypatch.setattr(os, "pwritev", real)
    lost.step(3, log)
    if RANK == 0:
        assert log.problem in capfd.readouterr().err
    log.start(3)
    assert not log.problem
    state = lost.state()
    lost.step(4, log)
    expected = lost.state()
    log.close()
    lost.close()
    assert recovered(folder, state, "int8", step=3) == 4
    same(state, expected)


def test_a_disk_that_is_slow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training is not held up for good."""
    monkeypatch.setattr(log_module, "_WATCH_S", 0.0)
    monkeypatch.setattr(log_module, "_MOST", 0.0)
    lost = Run(1, "none")
    log = lost.log(folder)
    log.start(0)
    lost.step(1, log)
    assert "the disk is slow" in log.problem
    lost.step(2, log)
    log.start(2)
    assert not log.problem
    log.close()
    lost.close()
