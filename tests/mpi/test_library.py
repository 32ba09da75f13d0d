"""The names that a user's own script calls, as it calls them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch import Tensor, nn

import hpcsync
from hpcsync import binding, library
from hpcsync.errors import ConfigError, LaunchError, ModelError
from hpcsync.runtime import AgreedError

pytestmark = pytest.mark.mpi

RANK, SIZE = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
LAST = SIZE - 1
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


@pytest.fixture
def started() -> Iterator[None]:
    hpcsync.init()
    yield
    hpcsync.shutdown()


def model(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 20), nn.Tanh(), nn.BatchNorm1d(20), nn.Linear(20, 3))


CALLS: dict[str, Callable[[], Any]] = {
    "rank": lambda: hpcsync.rank(),
    "size": lambda: hpcsync.size(),
    "local_rank": lambda: hpcsync.local_rank(),
    "local_size": lambda: hpcsync.local_size(),
    "cross_rank": lambda: hpcsync.cross_rank(),
    "cross_size": lambda: hpcsync.cross_size(),
    "allreduce": lambda: hpcsync.allreduce(torch.zeros(2)),
    "allreduce_": lambda: hpcsync.allreduce_(torch.zeros(2)),
    "broadcast": lambda: hpcsync.broadcast(torch.zeros(2)),
    "broadcast_parameters": lambda: hpcsync.broadcast_parameters(model()),
    "broadcast_optimizer_state": lambda: hpcsync.broadcast_optimizer_state(
        torch.optim.SGD(model().parameters(), lr=0.1)
    ),
    "broadcast_object": lambda: hpcsync.broadcast_object(1),
    "allgather_object": lambda: hpcsync.allgather_object(1),
    "barrier": lambda: hpcsync.barrier(),
    "DataParallel": lambda: hpcsync.DataParallel(model()),
}
NO_CALLS = {
    "Op",
    "Average",
    "Sum",
    "Min",
    "Max",
    "init",
    "is_initialized",
    "shutdown",
    "__version__",
}


def test_all_names_are_tested() -> None:
    assert set(CALLS) | NO_CALLS == set(hpcsync.__all__)
    assert set(hpcsync.__all__) <= set(dir(hpcsync))
    with pytest.raises(AttributeError, match="no attribute 'allreduces'"):
        hpcsync.allreduces  # noqa: B018


@pytest.mark.parametrize("name", CALLS)
def test_nothing_works_before_init(name: str) -> None:
    assert not hpcsync.is_initialized()
    with pytest.raises(LaunchError, match=r"hpcsync\.init\(\) has not been called; call it first"):
        CALLS[name]()


@pytest.mark.parametrize("name", CALLS)
def test_everything_works_after_init(started: None, name: str) -> None:
    CALLS[name]()


def test_init_twice_and_again_after_shutdown() -> None:
    before = sys.excepthook, threading.excepthook, sys.exit
    for _ in range(3):
        hpcsync.init()
        hpcsync.init(overrides=["topology.ranks_per_node=1"])  # does nothing
        assert hpcsync.is_initialized()
        assert hpcsync.cross_size() == 1
        assert sys.excepthook is not before[0]
        hpcsync.shutdown()
        hpcsync.shutdown()
        assert not hpcsync.is_initialized()
        assert (sys.excepthook, threading.excepthook, sys.exit) == before


@pytest.mark.parametrize("width", [0, 1, 2, 3])
def test_places(width: int) -> None:
    hpcsync.init(overrides=[f"topology.ranks_per_node={width}"])
    wide = min(width or SIZE, SIZE)
    assert (hpcsync.rank(), hpcsync.size()) == (RANK, SIZE)
    assert hpcsync.local_rank() == RANK % wide
    assert hpcsync.local_size() == min(wide, SIZE - RANK // wide * wide)
    assert hpcsync.cross_rank() == RANK // wide
    assert hpcsync.cross_size() == -(-SIZE // wide)
    hpcsync.shutdown()


def test_decks_and_overrides(tmp_path: Path) -> None:
    deck = tmp_path / "deck.toml"
    deck.write_text("[comm]\nbucket_mb = 3.0\n[topology]\nranks_per_node = 1\n")
    hpcsync.init(deck, ["comm.first_bucket_mb=0.5"])
    assert hpcsync.cross_size() == SIZE
    wrapped = hpcsync.DataParallel(model())
    assert wrapped.reducer.layout.config.bucket_mb == 3.0
    assert wrapped.reducer.layout.config.first_bucket_mb == 0.5
    assert hpcsync.DataParallel(model(), bucket_cap_mb=7).reducer.layout.config.bucket_mb == 7
    hpcsync.shutdown()
    for wrong in (["comm.bucket_mbs=1"], ["comm.bucket_mb=-1"], ["comm.bucket_mb=yes"]):
        with pytest.raises(ConfigError, match=r"comm\.bucket_mb"):
            hpcsync.init(overrides=wrong)
        assert not hpcsync.is_initialized()


# -- tensors ------------------------------------------------------------------------------


def drawn(rank: int, dtype: torch.dtype, shape: tuple[int, ...] = (3, 50)) -> Tensor:
    """Whole numbers of both signs where there are signs; sums of few are exact."""
    numbers = torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(rank))
    return numbers.to(dtype) if dtype is torch.uint8 else (numbers - 4).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
def test_allreduce(started: None, dtype: torch.dtype) -> None:
    everyone = torch.stack([drawn(rank, dtype).double() for rank in range(SIZE)])
    wanted = {
        hpcsync.Sum: everyone.sum(0),
        hpcsync.Min: everyone.amin(0),
        hpcsync.Max: everyone.amax(0),
    }
    if dtype.is_floating_point:
        wanted[hpcsync.Average] = everyone.mean(0)
    mine = drawn(RANK, dtype)
    for op, truth in wanted.items():
        found = hpcsync.allreduce(mine, op)
        assert found.dtype is dtype
        assert found.shape == mine.shape
        torch.testing.assert_close(found.double(), truth, rtol=0, atol=0 if SIZE != 3 else 1e-2)
        assert torch.equal(mine, drawn(RANK, dtype)), "the argument is left alone"
        again = mine.clone()
        assert hpcsync.allreduce_(again, op) is again
        assert torch.equal(again, found)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (7, 1, 5), (70_000,), (1_100_000,)])
def test_allreduce_of_any_shape(started: None, shape: tuple[int, ...]) -> None:
    for op in (hpcsync.Average, hpcsync.Max):
        found = hpcsync.allreduce(torch.full(shape, float(RANK)), op)
        truth = LAST if op is hpcsync.Max else LAST / 2
        assert found.shape == shape
        assert bool((found == truth).all())


def test_allreduce_averages_by_default_and_takes_odd_tensors(started: None) -> None:
    across = torch.arange(12.0).view(3, 4).t() * (RANK + 1)
    for op, factor in ((hpcsync.Average, (SIZE + 1) / 2), (hpcsync.Max, SIZE)):
        torch.testing.assert_close(
            hpcsync.allreduce(across, op), torch.arange(12.0).view(3, 4).t() * factor
        )
    leaf = torch.ones(3, requires_grad=True)
    found = hpcsync.allreduce(leaf)
    assert not found.requires_grad
    assert torch.equal(found, torch.ones(3))
    strided = torch.ones(10)[::2]
    assert torch.equal(hpcsync.allreduce(strided), torch.ones(5))


def test_allreduce_refuses_what_it_cannot_do(started: None) -> None:
    for op in (hpcsync.Average, hpcsync.Sum, hpcsync.Max):
        for dtype in (torch.bool, torch.complex64):
            with pytest.raises(ValueError, match=r"dtype \w+ cannot be reduced; use one of"):
                hpcsync.allreduce(torch.zeros(2, dtype=dtype), op)
        with pytest.raises(ValueError, match="must be contiguous, and on one of: cpu, cuda"):
            hpcsync.allreduce_(torch.zeros(4, 4).t()[:2], op)
    with pytest.raises(ValueError, match=r"average of int64 is not whole; use op=hpcsync\.Sum"):
        hpcsync.allreduce(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"op='sum' is none of Average, Sum, Min, Max"):
        hpcsync.allreduce(torch.zeros(2), "sum")  # type: ignore[arg-type]


def test_nan_and_inf_survive(started: None) -> None:
    mine = torch.zeros(4)
    if RANK == LAST:
        mine[1], mine[2] = float("nan"), float("inf")
    for op in (hpcsync.Average, hpcsync.Sum):
        found = hpcsync.allreduce(mine, op)
        assert found.isnan().tolist() == [False, True, False, False]
        assert found.isinf().tolist() == [False, False, True, False]


@pytest.mark.parametrize("root", [0, LAST])
def test_broadcast(started: None, root: int) -> None:
    for dtype in (*FLOATS, *INTEGERS, torch.bool, torch.complex64):
        mine = torch.full((3, 4), RANK % 2).to(dtype)
        assert hpcsync.broadcast(mine, root) is mine
        assert bool((mine == torch.tensor(root % 2).to(dtype)).all())
    across = torch.full((3, 4), float(RANK)).t()
    hpcsync.broadcast(across, root)
    assert bool((across == root).all())
    for shape in ((), (0,)):
        hpcsync.broadcast(torch.full(shape, RANK), root)


@pytest.mark.parametrize("root", [0, LAST])
def test_broadcast_parameters(started: None, root: int) -> None:
    wanted = model(seed=root)
    wanted[2].running_mean += root
    for source in (
        lambda mine: mine,
        lambda mine: mine.state_dict(),
        lambda mine: [*mine.named_parameters(), *mine.named_buffers()],
    ):
        mine = model(seed=RANK)
        mine[2].running_mean += RANK
        hpcsync.broadcast_parameters(source(mine), root)
        for name, value in mine.state_dict().items():
            assert torch.equal(value, wanted.state_dict()[name]), name
        assert all(param.requires_grad and param.is_leaf for param in mine.parameters())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_broadcast_optimizer_state(started: None, kind: type[torch.optim.Optimizer]) -> None:
    mine = model()
    optimizer = kind(mine.parameters(), lr=0.1 + RANK)
    if RANK == LAST:  # the others have no state yet
        mine(torch.randn(4, 5)).sum().backward()
        optimizer.step()
    hpcsync.broadcast_optimizer_state(optimizer, LAST)
    states = hpcsync.allgather_object(optimizer.state_dict())
    assert states[RANK]["param_groups"][0]["lr"] == 0.1 + LAST
    for state in states:
        assert state["state"].keys() == states[LAST]["state"].keys()
        for index, values in state["state"].items():
            for key, value in values.items():
                assert torch.equal(torch.as_tensor(value), states[LAST]["state"][index][key])


def test_objects(started: None) -> None:
    value = {"rank": RANK, "text": "é" * RANK * 1000, "tensor": torch.full((3,), RANK)}
    for root in (0, LAST):
        found = hpcsync.broadcast_object(value, root)
        assert found["rank"] == root
        assert len(found["text"]) == root * 1000
        assert bool((found["tensor"] == root).all())
    assert [each["rank"] for each in hpcsync.allgather_object(value)] == list(range(SIZE))
    assert hpcsync.allgather_object(None) == [None] * SIZE
    hpcsync.barrier()


# -- training -----------------------------------------------------------------------------


@pytest.mark.parametrize("width", [0, 1, 3])
def test_an_unchanged_torch_loop(width: int) -> None:
    hpcsync.init(overrides=[f"topology.ranks_per_node={width}"])
    torch.manual_seed(RANK)  # the wrapper takes rank 0's weights
    layers = [nn.Linear(5, 20), nn.Tanh(), nn.Linear(20, 3)]
    ours = hpcsync.DataParallel(nn.Sequential(*layers), bucket_cap_mb=0.001)
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Linear(5, 20), nn.Tanh(), nn.Linear(20, 3))
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.01, eps=1e-4) for each in (ours, alone)]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizers[0], 2)
    other = torch.optim.lr_scheduler.StepLR(optimizers[1], 2)
    for step in range(5):
        torch.manual_seed(step)
        inputs, targets = torch.randn(4 * SIZE, 5), torch.randint(0, 3, (4 * SIZE,))
        share = slice(4 * RANK, 4 * RANK + 4)
        optimizers[0].zero_grad()
        loss = nn.functional.cross_entropy(ours(inputs[share]), targets[share])
        loss.backward()
        nn.utils.clip_grad_norm_(ours.parameters(), 0.5)
        optimizers[0].step()
        scheduler.step()
        optimizers[1].zero_grad()
        whole = nn.functional.cross_entropy(alone(inputs), targets)
        whole.backward()
        nn.utils.clip_grad_norm_(alone.parameters(), 0.5)
        optimizers[1].step()
        other.step()
        torch.testing.assert_close(
            hpcsync.allreduce(loss.detach()), whole.detach(), rtol=1e-5, atol=1e-6
        )
    for mine, theirs in zip(ours.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    steps = ours.collectives.recorder.step
    with ours.no_sync():
        ours(inputs[:1]).sum().backward()
    assert ours.collectives.recorder.step == steps > 0
    assert ours.finite()
    hpcsync.shutdown()


def test_wrappers_share_one_way_to_the_other_ranks(started: None) -> None:
    one, other = hpcsync.DataParallel(model()), hpcsync.DataParallel(model())
    assert one.collectives is other.collectives
    (one(torch.ones(2, 5)) + other(torch.ones(2, 5))).sum().backward()
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_wrapping_with_wrong_values(started: None) -> None:
    with pytest.raises(ConfigError, match=r"^codec: .*int9"):
        hpcsync.DataParallel(model(), codec="int9")
    for size in (0, -1, "wide"):
        with pytest.raises(ConfigError, match=r"^bucket_cap_mb: ") as told:
            hpcsync.DataParallel(model(), bucket_cap_mb=size)  # type: ignore[arg-type]
        assert "command line" not in str(told.value)
    with pytest.raises(ModelError, match="on meta"):
        hpcsync.DataParallel(nn.Linear(2, 2, device="meta"))


@pytest.mark.skipif(SIZE < 2, reason="one rank has one kind of device")
def test_ranks_on_two_kinds_of_device(started: None, monkeypatch: pytest.MonkeyPatch) -> None:
    words = f"rank 0 computes on cpu, but rank {LAST} on {{}}, and "
    odd = [torch.empty(1, device="meta" if RANK == LAST else "cpu")]
    with pytest.raises(LaunchError, match=words.format("meta")):
        library._current().reach(odd)
    here = binding.Place(frozenset({0}), kind="cuda" if RANK == LAST else "cpu")
    monkeypatch.setattr(binding, "here", lambda device: here)
    with pytest.raises(LaunchError, match=words.format("cuda")):
        hpcsync.DataParallel(model())
    monkeypatch.undo()
    assert hpcsync.allreduce(torch.ones(2), hpcsync.Sum).tolist() == [SIZE, SIZE]


def test_transports_of_gpus_for_a_module_of_the_host() -> None:
    hpcsync.init(overrides=["comm.transport.node=nccl"])
    with pytest.raises(AgreedError, match="nccl joins the memory of GPUs"):
        hpcsync.DataParallel(model())
    hpcsync.shutdown()


@pytest.mark.skipif(SIZE < 2, reason="one rank has its device to itself")
def test_two_ranks_on_one_device(started: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "_device_name", lambda device: "GPU a")
    with pytest.raises(LaunchError, match=r"ranks 0.* share GPU a: "):
        hpcsync.DataParallel(nn.Linear(2, 2))
