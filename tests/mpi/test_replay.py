"""A lost run, put together again from its first state and its log, against the run itself."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import Tensor, nn

from hpcsync import launch
from hpcsync.checkpoint import random_state, state
from hpcsync.checkpoint.replay import ReplayLog, chain
from hpcsync.config import CommConfig, CompressConfig, TrainConfig
from hpcsync.engine import Engine, make_optimizer
from hpcsync.launch import Runtime
from hpcsync.onebit_adam import OneBitAdam
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
PLACES = [("rail", 1), ("rail", 2), ("all", 0)]


class Net(nn.Module):
    """Linear layers, running means, and a parameter that only some steps use."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.front = nn.Linear(40, 70, dtype=dtype)
        self.norm = nn.BatchNorm1d(70)
        self.back = nn.Linear(70, 33)
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
        model = Net(dtype)
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


@pytest.mark.parametrize(("where", "width"), PLACES)
@pytest.mark.parametrize("codec", CODECS)
def test_the_bits_of_the_lost_run(folder: Path, codec: str, where: str, width: int) -> None:
    lose_and_recover(folder, codec, width=width, where=where)


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
@pytest.mark.parametrize("codec", ["none", "int8", "topk", "int8_shared", "powersgd"])
def test_dtypes(folder: Path, codec: str, dtype: torch.dtype) -> None:
    lose_and_recover(folder, codec, dtype=dtype)


@pytest.mark.parametrize(
    "settings",
    [
        *({"algorithm": name} for name in ("direct", "ring", "halving", "doubling", "native")),
        {"rail_algorithm": "ring"},
        {"reproducible": True},
        {"overlap": False},
        {"node_transport": "mpi_host"},
    ],
    ids=str,
)
@pytest.mark.parametrize("codec", ["none", "randomk"])
def test_algorithms(folder: Path, codec: str, settings: dict[str, Any]) -> None:
    lose_and_recover(folder, codec, comm=settings, width=2 if SIZE > 2 else 1)


@pytest.mark.parametrize("loss_scale", ["none", 64.0])
@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
def test_scales(folder: Path, loss_scale: float | str, clip_norm: float) -> None:
    lose_and_recover(folder, "int8", train={"loss_scale": loss_scale, "clip_norm": clip_norm})
