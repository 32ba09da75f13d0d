"""Lost runs, put together again from their first state and their log.

For tests that run on the ranks of an MPI job.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor, nn

from hpcsync.checkpoint import random_state, state
from hpcsync.checkpoint.replay import ReplayLog, chain
from hpcsync.config import CommConfig, CompressConfig, TrainConfig
from hpcsync.engine import Engine
from hpcsync.launch import Runtime
from hpcsync.onebit_adam import OneBitAdam
from hpcsync.optimizers import make_optimizer
from hpcsync.parallel import DataParallel
from hpcsync.topology import Topology

WORLD = MPI.COMM_WORLD
SIZE, RANK = WORLD.size, WORLD.rank
KIB = 1 / 1024
STEPS, MORE = 6, 5
# Own state that goes to the slots.
LARGE = {"size": 300}


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
