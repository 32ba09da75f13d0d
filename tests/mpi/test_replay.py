"""A lost run, put together again from its first state and its log, against the run itself."""

from __future__ import annotations

import copy
import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import Tensor, nn

from hpcsync.checkpoint import random_state, state
from hpcsync.checkpoint.replay import ReplayLog, chain
from hpcsync.checkpoint.replay import log as log_module
from hpcsync.checkpoint.replay.background import Background
from hpcsync.checkpoint.replay.records import scan
from hpcsync.config import CommConfig, CompressConfig, TrainConfig
from hpcsync.engine import Engine
from hpcsync.launch import Runtime
from hpcsync.onebit_adam import OneBitAdam
from hpcsync.optimizers import make_optimizer
from hpcsync.parallel import DataParallel
from hpcsync.topology import Topology

pytestmark = pytest.mark.mpi

WORLD = MPI.COMM_WORLD
SIZE, RANK = WORLD.size, WORLD.rank
KIB = 1 / 1024
STEPS, MORE = 6, 5
CODECS = [
    *("none", "bf16", "fp16", "fp8", "int8", "int4", "int8_shared", "onebit"),
    *("topk", "threshold", "randomk", "powersgd"),
    *("tests.replay_codecs:Halves", "tests.replay_codecs:Learning"),
]
# Own state that goes to the slots.
LARGE = {"size": 300}
PLACES = [("rail", 1), ("rail", 2), ("all", 0)]


class Net(nn.Module):
    """Linear layers, running means, and a parameter that only some steps use."""

    def __init__(self, size: int = 70, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.front = nn.Linear(40, size, dtype=dtype)
        self.norm = nn.BatchNorm1d(size)
        self.back = nn.Linear(size, 33)
        self.seldom = nn.Parameter(torch.ones(20, 33))

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        hidden = self.front(inputs.to(self.front.weight.dtype)).float()
        out = self.back(torch.relu(self.norm(hidden)))
        if int(targets[0, 0]) % 2:
            out = out + self.seldom[int(targets[0, 0])]
        noise = random.random() + float(np.random.rand()) + float(torch.rand(()))
        return ((out - noise) ** 2).mean()


class Run:
    """One wrapped model with its engine."""

    def __init__(
        self,
        seed: int,
        codec: str,
        width: int = 1,
        size: int = 70,
        dtype: torch.dtype = torch.float32,
        train: dict[str, Any] | None = None,
        comm: dict[str, Any] | None = None,
        **compress: Any,
    ) -> None:
        self.runtime = Runtime(WORLD.Dup(), Topology.group(["host"] * SIZE, width), 60.0)
        self.comm = CommConfig(
            **{"bucket_mb": 6 * KIB, "first_bucket_mb": 2 * KIB, "segment_mb": 4 * KIB}
            | {"timeout_s": 60.0}
            | (comm or {})
        )
        small = {"warmup": 2, "min_elements": 100, "ratio": 0.05, "threshold": 1e-3, "rank": 2}
        torch.manual_seed(seed)
        model = Net(size, dtype)
        self.parallel = DataParallel(
            model,
            runtime=self.runtime,
            comm=self.comm,
            compress=CompressConfig(codec=codec, **small | compress),
            seed=3,
        )
        settings = TrainConfig(
            steps=100, warmup=3, **{"clip_norm": 0.5, "loss_scale": "dynamic"} | (train or {})
        )
        optimizer = make_optimizer(model, settings)
        if isinstance(optimizer, OneBitAdam):
            self.parallel.reducer.transform = optimizer.momentum
        self.engine = Engine(model, optimizer, self.parallel, settings)

    def log(self, folder: Path, lineage: str = "abc") -> ReplayLog:
        reducer = self.parallel.reducer
        return ReplayLog(folder, self.engine, reducer, self.runtime, self.comm, lineage)

    def step(self, number: int, log: ReplayLog | None = None) -> None:
        draw = torch.Generator().manual_seed(100 * number + RANK)
        inputs = [torch.randn(8, 40, generator=draw) for _ in range(2)]
        if number == 3 and RANK == 0:
            inputs[1][0, 0] = torch.inf  # skipped, and the loss scale halves
        targets = torch.full((8, 1), number)
        result = self.engine.step([(each, targets) for each in inputs])
        assert result.skipped == (number == 3)
        if log is not None:
            log.record(result)

    def state(self) -> dict[str, Any]:
        """All of it, copied."""
        exchange = self.parallel.reducer.state_dict()
        buffers = dict(self.engine.model.named_buffers())
        tree = {
            "engine": self.engine.state_dict(),
            "exchange": exchange,
            "buffers": buffers,
            "random": random_state.capture(),
        }
        return copy.deepcopy(tree)

    def load(self, saved: dict[str, Any]) -> None:
        saved = copy.deepcopy(saved)
        self.engine.load_state_dict(saved["engine"])
        self.parallel.reducer.load_state_dict(saved["exchange"])
        random_state.restore(saved["random"])

    def close(self) -> None:
        self.runtime.close()


@pytest.fixture
def folder(comm: MPI.Intracomm, tmp_path: Path) -> Path:
    """A folder that all ranks share."""
    shared: Path = comm.bcast(tmp_path)
    return shared / "replay"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = state.flatten(one), state.flatten(other)
    assert first.skeleton == second.skeleton
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        bits = [each.contiguous().reshape(-1) for each in (tensor, second.tensors[name])]
        if bits[0].numel():
            assert torch.equal(*(each.view(torch.uint8) for each in bits)), name


def lose_and_recover(folder: Path, codec: str, **settings: Any) -> None:
    """Train with the log, and on; then again from the first state, the log, and on."""
    random.seed(RANK)
    np.random.seed(RANK)
    lost = Run(1, codec, **settings)
    first = lost.state()
    log = lost.log(folder)
    log.start(0)
    for number in range(1, STEPS + 1):
        lost.step(number, log)
    log.close()
    assert not log.problem
    expected = lost.state()
    for number in range(STEPS + 1, STEPS + 1 + MORE):
        lost.step(number)
    later = lost.state()
    lost.close()
    random.seed(0)

    found = Run(2, codec, **settings)
    found.load(first)
    told: list[int] = []
    log = found.log(folder)
    assert log.recover(0, lambda result: told.append(result.step)) == STEPS
    assert told == list(range(1, STEPS + 1))
    same(found.state(), expected)
    for number in range(STEPS + 1, STEPS + 1 + MORE):
        found.step(number, log)
    same(found.state(), later)
    log.close()
    found.close()

    # What was logged behind the replayed steps counts, too.
    again = Run(2, codec, **settings)
    again.load(first)
    log = again.log(folder)
    assert log.recover(0) == STEPS + MORE
    same(again.state(), later)
    log.close()
    again.close()


def logged(folder: Path, codec: str, steps: int = STEPS, **settings: Any) -> list[dict[str, Any]]:
    """The states before the first step and after each, of a run with the log."""
    lost = Run(1, codec, **settings)
    states = [lost.state()]
    log = lost.log(folder)
    log.start(0)
    for number in range(1, steps + 1):
        lost.step(number, log)
        states.append(lost.state())
    log.close()
    lost.close()
    return states


def recovered(
    folder: Path, first: dict[str, Any], codec: str, step: int = 0, **settings: Any
) -> int:
    """The step that a resumed run comes to, whose state is in ``first`` then."""
    lineage = settings.pop("lineage", "abc")
    found = Run(2, codec, **settings)
    found.load(first)
    log = found.log(folder, lineage)
    last = log.recover(step)
    first |= found.state()
    log.close()
    found.close()
    return last


def mine(folder: Path) -> Path:
    return chain.log_path(folder, RANK, 0)


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


def test_auto(folder: Path) -> None:
    """Its choice depends on times: what stands is that of the last step."""
    settings = {"width": 1, "warmup": 0}
    states = logged(folder, "auto", steps=9, **settings)
    state = states[0]
    found = Run(2, "auto", **settings)
    found.engine.load_state_dict(copy.deepcopy(state["engine"]))
    random_state.restore(copy.deepcopy(state["random"]))
    log = found.log(folder)
    assert log.recover(0) == 9
    same(found.state()["engine"], states[9]["engine"])
    log.close()
    found.close()


@pytest.mark.parametrize(("where", "width"), PLACES)
@pytest.mark.parametrize("codec", CODECS)
def test_the_bits_of_the_lost_run(folder: Path, codec: str, where: str, width: int) -> None:
    lose_and_recover(folder, codec, width=width, where=where)


@pytest.mark.parametrize("codec", ["none", "int8", "powersgd", "randomk"])
def test_uneven_nodes(folder: Path, codec: str) -> None:
    if SIZE != 4:
        pytest.skip("needs 4 ranks")
    lose_and_recover(folder, codec, width=3)


@pytest.mark.parametrize(
    ("codec", "compress"),
    [
        ("int8", {"rounding": "stochastic"}),
        ("int4", {"rounding": "stochastic"}),
        ("onebit", {"error_feedback": False}),
        ("randomk", {"error_feedback": False}),
        ("powersgd", {"error_feedback": False}),
        ("topk", {"momentum": 0.9, "ratio_warmup": 4}),
        ("int8_shared", {"verify": True, "rounding": "stochastic"}),
        ("int8", {"warmup": 0, "vectors": True, "min_elements": 0}),
        ("int8", {"warmup": STEPS}),
    ],
)
def test_settings_of_codecs(folder: Path, codec: str, compress: dict[str, Any]) -> None:
    lose_and_recover(folder, codec, **compress)


@pytest.mark.parametrize("codec", ["none", "int8", "onebit", "powersgd"])
def test_onebit_adam(folder: Path, codec: str) -> None:
    train = {"optimizer": "onebit_adam", "freeze": 2}
    lose_and_recover(folder, codec, train=train, warmup=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("codec", ["none", "int8", "int8_shared"])
def test_dtypes(folder: Path, codec: str, dtype: torch.dtype) -> None:
    lose_and_recover(folder, codec, dtype=dtype)


@pytest.mark.parametrize(
    ("codec", "settings"),
    [
        ("none", {"algorithm": "direct"}),
        ("none", {"algorithm": "ring"}),
        ("none", {"algorithm": "halving"}),
        ("none", {"algorithm": "doubling"}),
        ("none", {"algorithm": "native"}),
        ("none", {"reproducible": True}),
        ("none", {"node_transport": "mpi_host"}),
        ("randomk", {"rail_algorithm": "ring"}),
        ("int8", {"overlap": False}),
    ],
)
def test_algorithms(folder: Path, codec: str, settings: dict[str, Any]) -> None:
    lose_and_recover(folder, codec, comm=settings, width=2 if SIZE > 2 else 1)


@pytest.mark.parametrize("loss_scale", ["none", 64.0])
@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
def test_scales(folder: Path, loss_scale: float | str, clip_norm: float) -> None:
    lose_and_recover(folder, "int8", train={"loss_scale": loss_scale, "clip_norm": clip_norm})
