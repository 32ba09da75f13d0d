"""A step on the test double: nothing waits for the device, and the bits are the host's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpcsync.collectives.eager import Eager
from hpcsync.collectives.routes import Facts
from hpcsync.config import CommConfig, TrainConfig
from hpcsync.engine import Engine, StepResult
from hpcsync.optimizers import make_optimizer
from hpcsync.parallel import DataParallel
from hpcsync.trace.events import NAMES
from hpcsync.trace.recorder import Recorder
from tests.alone import Alone, Net
from tests.double.device import DoubleDevice, machine
from tests.double.job import Rank, job
from tests.double.queued import Queued, placed, to_device

STEPS, SKIPPED = 6, 3


def batches() -> list[list[tuple[Tensor, Tensor]]]:
    drawn = torch.Generator().manual_seed(1)
    found = [
        [(torch.randn(8, 6, generator=drawn), torch.randn(8, 1, generator=drawn)) for _ in range(2)]
        for _ in range(STEPS)
    ]
    found[SKIPPED - 1][1][0][0, 0] = torch.inf
    return found


def engine(device: DoubleDevice | None = None) -> Engine:
    model = Net() if device is None else to_device(Net(), device)
    return engine_of(model, Alone(model), device)


def engine_of(
    model: nn.Module,
    parallel: nn.Module,
    device: DoubleDevice | None,
    recorder: Recorder | None = None,
) -> Engine:
    config = TrainConfig(steps=STEPS, lr=0.1, warmup=2, clip_norm=0.1, loss_scale=128.0)
    optimizer = make_optimizer(model, config)
    if device is not None:  # as a fused optimizer makes its state on a GPU
        for param in model.parameters():
            optimizer.state[param] = {
                "step": placed(torch.zeros(()), device),
                "exp_avg": placed(torch.zeros(param.shape), device),
                "exp_avg_sq": placed(torch.zeros(param.shape), device),
            }
    return Engine(model, optimizer, parallel, config, recorder, streams=device)


def told(results: list[StepResult | None]) -> list[str]:
    return [repr(each) for each in results if each is not None]


@pytest.mark.parametrize("seed", range(6))
def test_a_step_waits_for_nothing(seed: int) -> None:
    plain = engine()
    expected = told([plain.step(each) for each in batches()])
    with machine(seed) as made:
        device = made.device()
        late = engine(device)
        assert late.lag == 1
        found: list[StepResult | None] = []
        with Queued(device) as mode:
            for each in batches():
                late.recorder.begin_step(late.step_count + 1)
                found.append(late.step([(placed(x, device), placed(y, device)) for x, y in each]))
            found.append(late.flush())
        assert not mode.asked, mode.asked[0]
        assert told(found) == expected
        weights = [device.read(each) for each in late.model.parameters()]
    assert all(map(np.array_equal, weights, (p.detach().numpy() for p in plain.model.parameters())))
    spans = late.recorder.last()
    for name in ("step", "forward", "backward", "optimizer"):
        kinds = [index for index, (text, _) in enumerate(NAMES) if text == name]
        mine = spans[np.isin(spans["name"], kinds)]
        assert sorted(set(mine["step"].tolist())) == list(range(1, STEPS + 1)), name
        assert (mine["end"] >= mine["start"]).all()
    steps = spans[spans["name"] == NAMES.index(("step", "step"))]
    assert (steps["parent"] == 0).all()


def test_a_step_that_waits_has_its_spans_at_its_end() -> None:
    with machine(1) as made:
        device = made.device()
        model = to_device(Net(), device)
        plain = engine_of(model, Alone(model), device)
        waits = Engine(
            *(model, plain.optimizer, plain.data_parallel, plain.config), streams=device, lag=0
        )
        with Queued(device):
            for step, each in enumerate(batches()[:2], start=1):
                waits.recorder.begin_step(step)
                waits.step([(placed(x, device), placed(y, device)) for x, y in each])
                spans = waits.recorder.last()
                names = {NAMES[each["name"]][0] for each in spans[spans["step"] == step]}
                assert {"forward", "backward", "optimizer"} <= names


Told = tuple[list[str], list[np.ndarray], dict[str, int]]
COMM = {"bucket_mb": 0.0005, "first_bucket_mb": 0.0002}
WAYS = {"ipc": Facts(), "staged": Facts(cuda_ipc="not here")}


def on_host(rank: Rank, model: nn.Module) -> Told:
    comm = CommConfig(**COMM)
    collectives = rank.collectives(comm, device=False)
    parallel = DataParallel(model, runtime=rank.runtime, comm=comm, collectives=collectives)
    made = engine_of(model, parallel, None)
    found = told([made.step(mine(each, rank.rank)) for each in batches()])
    return found, [p.detach().numpy().copy() for p in model.parameters()], {}


def on_double(rank: Rank, model: nn.Module, facts: Facts) -> Told:
    comm, device = CommConfig(**COMM), rank.device
    found: list[StepResult | None] = []
    with Queued(device) as mode:
        to_device(model, device)
        collectives = rank.collectives(comm, facts=facts)
        parallel = DataParallel(model, runtime=rank.runtime, comm=comm, collectives=collectives)
        made = engine_of(model, parallel, device, collectives.recorder)
        mode.asked.clear()
        for step, each in enumerate(batches(), start=1):
            collectives.recorder.begin_step(step)
            given = [(placed(x, device), placed(y, device)) for x, y in mine(each, rank.rank)]
            found.append(made.step(given))
        found.append(made.flush())
        assert not mode.asked, mode.asked[0]
    comm_ms = parallel.reducer.stats.comm_ms
    assert comm_ms > 0
    assert parallel.reducer.stats.exposed_comm_ms >= 0
    spans = collectives.recorder.last()
    texts = [NAMES[each][0] for each in spans["name"]]
    counts = {text: texts.count(text) for text in ("exposed", "bucket", "transfer", "backward")}
    return told(found), [device.read(each) for each in model.parameters()], counts


def mine(pairs: list[tuple[Tensor, Tensor]], rank: int) -> list[tuple[Tensor, Tensor]]:
    return [(x[4 * rank : 4 * rank + 4], y[4 * rank : 4 * rank + 4]) for x, y in pairs]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(3))
def test_two_ranks_wait_for_nothing_but_each_other(seed: int, way: str) -> None:
    models = [Net() for _ in range(4)]
    with job(2, seed, per_node=2) as made:
        expected = made.run(lambda rank: on_host(rank, models[rank.rank]))
    with job(2, seed, per_node=2) as made:
        found = made.run(lambda rank: on_double(rank, models[2 + rank.rank], WAYS[way]))
    for one, two in zip(expected, found, strict=True):
        assert one[0] == two[0]
        assert all(map(np.array_equal, one[1], two[1]))
        assert two[2]["exposed"] == STEPS
        assert two[2]["backward"] == 2 * STEPS
        assert two[2]["bucket"] >= 2 * STEPS
        assert two[2]["transfer"] >= 2 * STEPS


@pytest.mark.parametrize("count", [1, 3000, 1_100_000])
def test_any_tensor_of_a_device_is_averaged(count: int) -> None:
    def body(rank: Rank) -> np.ndarray:
        eager = Eager(rank.collectives())
        values = (torch.arange(count) % 512).float() + rank.rank
        with Queued(rank.device) as mode:
            mine = placed(values, rank.device)
            for _ in range(2):
                eager.allreduce(mine.view(torch.uint8), "float32", average=True)
            assert not mode.asked
        read: np.ndarray = rank.device.read(mine)
        return read

    with job(2, count, per_node=2) as made:
        for found in made.run(body):
            assert np.array_equal(found, np.arange(count) % 512 + 0.5)


def test_spans_of_allreduces_are_stored_as_they_end() -> None:
    """No step of a reducer or an engine does it, where a script exchanges nothing else."""

    def body(rank: Rank) -> list[int]:
        collectives = rank.collectives()
        eager = Eager(collectives)
        mine = placed(torch.ones(3000), rank.device)
        waiting = []
        for _ in range(5):
            with Queued(rank.device):
                eager.allreduce(mine.view(torch.uint8), "float32", average=True)
            rank.device.read(mine)  # all streams are at their end
            waiting.append(len(collectives.recorder.later._waiting))
        return waiting

    with job(2, per_node=2) as made:
        for waiting in made.run(body):
            assert waiting[-1] < 5  # each call makes more than one
