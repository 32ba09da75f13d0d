"""Coded exchanges: the same bits on all ranks, near the mean, NaN seen by all, nothing forgotten
when buckets are laid out anew or a job goes on from a state."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import Tensor, nn

from hpcsync.codecs import PieceCodec
from hpcsync.codecs.base import OWNER, SENDER
from hpcsync.collectives import Collectives
from hpcsync.collectives.coding import Coding
from hpcsync.config import CODECS, CommConfig, CompressConfig
from hpcsync.device import dtype_of
from hpcsync.errors import HpcsyncError, UserError
from hpcsync.gradients import memory
from hpcsync.launch import Runtime
from hpcsync.parallel import DataParallel
from hpcsync.topology import Topology
from hpcsync.transports.base import private_buffer

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("one_thread")]

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
KIB = 1 / 1024
CODED = tuple(name for name in CODECS if name != "none")
Wrap = Callable[..., DataParallel]
Found = dict[str, Tensor]

# Largest relative error (2-norm) of the first coded mean of a random gradient.
ERRORS = {
    "bf16": 0.004,
    "fp16": 0.001,
    "fp8": 0.05,
    "int8": 0.02,
    "int8_shared": 0.03,
    "int4": 0.2,
    "onebit": 1.0,
    "topk": 1.0,
    "threshold": 1.0,
    "randomk": 1.0,
    "powersgd": 1.0,
}


@pytest.fixture
def wrap() -> Iterator[Wrap]:
    """Wraps a module on a placement of the ranks, every rank a node of its own by default."""
    runtimes: list[Runtime] = []

    def make(module: nn.Module, codec: str, width: int = 1, **settings: Any) -> DataParallel:
        runtime = Runtime(WORLD.Dup(), Topology.group(["host"] * SIZE, width), 60.0)
        runtimes.append(runtime)
        comm = {"bucket_mb": 64 * KIB, "first_bucket_mb": 16 * KIB, "timeout_s": 60.0}
        names = {field.name for field in dataclasses.fields(CommConfig)}
        comm |= {name: value for name, value in settings.items() if name in names}
        compress = {"warmup": 0, "min_elements": 0, "ratio": 0.05, "threshold": 0.5, "rank": 2}
        compress |= {name: value for name, value in settings.items() if name not in names}
        return DataParallel(
            module,
            runtime=runtime,
            comm=CommConfig(**comm),
            compress=CompressConfig(codec=codec, **compress),
            seed=3,
        )

    yield make
    for runtime in runtimes:
        runtime.close()


class Weights(nn.Module):
    """Gradients are what is asked for: the loss is the weights times given values."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        shapes = {"first": (50, 70), "bias": (70,), "second": (33, 41), "third": (129, 64)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype)))

    def forward(self, wanted: Found) -> Tensor:
        return sum((p * wanted[n]).sum() for n, p in self.named_parameters())  # type: ignore[return-value]


def draw(step: int, rank: int, dtype: torch.dtype = torch.float32) -> Found:
    """What a rank's gradients are in a step: mostly shared, as gradients of one model are."""
    shared = torch.Generator().manual_seed(1000 + step)
    own = torch.Generator().manual_seed(7 + 100 * step + rank)
    return {
        name: (
            torch.randn(param.shape, generator=shared)
            + 0.5 * torch.randn(param.shape, generator=own)
        ).to(dtype)
        for name, param in Weights().named_parameters()
    }


def mean(step: int) -> Found:
    every = [draw(step, rank) for rank in range(SIZE)]
    return {name: sum(each[name] for each in every) / SIZE for name in every[0]}  # type: ignore[misc]


def exchanged(model: DataParallel, wanted: Found) -> Found:
    """The gradients after one step."""
    for param in model.parameters():
        param.grad = None
    model(wanted).backward()
    return {
        name.removeprefix("module."): param.grad.detach().clone()
        for name, param in model.named_parameters()
        if param.grad is not None
    }


def train(model: DataParallel, steps: int, first: int = 0) -> list[Found]:
    return [exchanged(model, draw(step, RANK)) for step in range(first, first + steps)]


def same_bits(one: Found, other: Found) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert np.array_equal(value.numpy().view(np.uint32), other[name].numpy().view(np.uint32)), (
            name
        )


def same_on_all_ranks(found: Found) -> None:
    for other in WORLD.allgather(found):
        same_bits(found, other)


def relative(found: Found, wanted: Found) -> float:
    difference = sum(float(((found[n] - wanted[n]) ** 2).sum()) for n in wanted)
    return math.sqrt(difference / sum(float((wanted[n] ** 2).sum()) for n in wanted))


PLACES = [("rail", 1), ("rail", 2), ("rail", 3), ("all", 0)]


@pytest.mark.parametrize(("where", "width"), PLACES)
@pytest.mark.parametrize("codec", CODED)
def test_all_ranks_get_the_same_bits_near_the_mean(
    wrap: Wrap, codec: str, where: str, width: int
) -> None:
    model = wrap(Weights(), codec, width, where=where)
    for step, found in enumerate(train(model, 3)):
        same_on_all_ranks(found)
        # From the second step on a codec also sends what it held back.
        if step == 0:
            assert relative(found, mean(0)) <= ERRORS[codec] + 1e-6
            assert relative({"bias": found["bias"]}, {"bias": mean(0)["bias"]}) < 1e-6


@pytest.mark.parametrize("codec", CODED)
def test_timing_does_not_change_a_bit(wrap: Wrap, codec: str) -> None:
    first = train(wrap(Weights(), codec, 2), 3)
    for change in ({}, {"overlap": False}, {"priority": False}, {"credit_mb": 1e-6}):
        for one, other in zip(first, train(wrap(Weights(), codec, 2, **change), 3), strict=True):
            same_bits(one, other)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("codec", CODED)
def test_what_is_held_back_comes_in_the_end(wrap: Wrap, codec: str, rounding: str) -> None:
    """The mean over steps of decoded gradients tends to the mean of what went in."""
    model = wrap(Weights(), codec, where="all", rounding=rounding, ratio=0.2, rank=8)
    wanted = draw(0, RANK)
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in wanted.items()}
    errors = {}
    for step in range(1, 61):
        for name, value in exchanged(model, wanted).items():
            total[name] += value
        average = {name: (value / step).float() for name, value in total.items()}
        errors[step] = relative(average, mean(0))
    assert errors[60] < 0.15
    # What is held back is bounded, so its share falls with the steps.
    assert errors[60] < 0.75 * errors[30] + 1e-3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("codec", CODED)
def test_a_value_that_is_not_finite_is_seen_by_all_and_forgotten(
    wrap: Wrap, codec: str, value: float
) -> None:
    model = wrap(Weights(), codec, 2 if SIZE > 2 else 1, ratio=0.05)
    train(model, 2)
    for place in (0, 5, 3499):
        wanted = draw(2, RANK)
        if RANK == SIZE - 1:
            wanted["first"].view(-1)[place] = value
        exchanged(model, wanted)
        assert not model.finite()
        assert not math.isfinite(float(model.norm()))
    for found in train(model, 3, first=3):
        assert model.finite()
        same_on_all_ranks(found)


def test_nothing_is_coded_before_the_warm_up_is_over(wrap: Wrap) -> None:
    plain = train(wrap(Weights(), "none"), 4)
    found = train(wrap(Weights(), "int8", warmup=2), 4)
    same_bits(plain[0], found[0])
    same_bits(plain[1], found[1])
    if SIZE > 1:
        assert relative(found[2], plain[2]) > 1e-4


def test_vectors_and_small_parameters_are_left_alone(wrap: Wrap) -> None:
    plain = train(wrap(Weights(), "none"), 1)[0]
    found = train(wrap(Weights(), "onebit", min_elements=1500), 1)[0]
    for name in ("bias", "second"):  # 70 and 1353 elements
        assert relative({name: found[name]}, {name: plain[name]}) < 1e-6
    if SIZE > 1:
        assert relative(found, plain) > 0.1
        vectors = train(wrap(Weights(), "onebit", vectors=True), 1)[0]
        assert relative({"bias": vectors["bias"]}, {"bias": plain["bias"]}) > 0.01


def pending(model: DataParallel) -> dict[str, list[Any]]:
    """All that is held back on all nodes together, by field and parameter."""
    reducer = model.reducer
    where = reducer.compression.config.where
    found = memory.gather(
        model.collectives, reducer.layout.buckets, reducer.layout.described, where
    )
    topology = model.collectives.topology
    # Every rank of a node has the node's; count it once.
    weight = 1.0 if where == "all" else 1.0 / len(topology.node(RANK))
    return {
        field: [WORLD.allreduce(each.astype(np.float64) * weight) for each in values.values()]
        for field, values in found.items()
    }


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("codec", ["int8", "onebit", "topk", "int8_shared", "fp8", "int4"])
def test_a_new_layout_of_buckets_forgets_nothing(wrap: Wrap, codec: str, width: int) -> None:
    model = wrap(Weights(), codec, width)
    train(model, 3)
    before = pending(model)
    reducer = model.reducer
    reducer.layout.order = [2, 0, 3, 1]
    reducer.layout.rebuild()
    after = pending(model)
    assert before.keys() == after.keys()
    for field, values in before.items():
        scale = max(float(np.abs(each).max(initial=0)) for each in values)
        # 8-bit stores are rounded again where a block has other neighbours.
        loose = 0.02 * scale if codec == "int4" else 2e-6 * scale
        for one, other in zip(values, after[field], strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=loose + 1e-30)
    if (2 if width == 2 else 1) < SIZE:
        assert any(np.abs(each).max() > 0 for values in before.values() for each in values)
    same_on_all_ranks(train(model, 1, first=3)[0])


@pytest.mark.parametrize("where", ["rail", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_layout_keeps_what_means_lack(wrap: Wrap, where: str, dtype: torch.dtype) -> None:
    model = wrap(Weights(dtype), "onebit", 2, where=where)
    exchanged(model, draw(0, RANK, dtype))
    reducer = model.reducer
    # Low precision is divided by the ranks of a node before it is coded along a rail.
    rails = model.collectives.topology.rails
    early = rails if dtype == torch.bfloat16 and where == "rail" else 1

    def lacking() -> float:
        units = {OWNER: 1.0, SENDER: early / SIZE}
        held = [each for bucket in reducer.layout.buckets for each in bucket.collective.held]
        mine = [units[h.role] * h.store.read("error").astype(np.float64).sum() for h in held]
        return WORLD.allreduce(float(sum(mine)))

    before = lacking()
    reducer.layout.order = [2, 0, 3, 1]
    reducer.layout.rebuild()
    assert lacking() == pytest.approx(before, rel=1e-4, abs=1e-6)


def test_a_state_of_the_end_of_the_warm_up_can_be_taken_over(wrap: Wrap) -> None:
    first = wrap(Weights(), "int8", warmup=2)
    train(first, 2)
    second = wrap(Weights(), "int8", warmup=2)
    second.reducer.load_state_dict(copy.deepcopy(first.reducer.state_dict()))
    same_bits(train(first, 1, first=2)[0], train(second, 1, first=2)[0])


class Fails(torch.autograd.Function):
    """The identity; its backward pass raises."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("planted")


class Two(nn.Module):
    """Two layers; the front one's backward pass can fail after the back one's."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.back = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, values: Tensor, *, fails: bool = False) -> Tensor:
        middle = self.front(values)
        return self.back(Fails.apply(middle) if fails else middle).sum()


@pytest.mark.parametrize("first", [0, 2])
def test_a_step_given_up_counts_on_all_ranks(wrap: Wrap, first: int) -> None:
    model = wrap(Two(), "randomk", where="all", ratio=0.2)
    for step in range(first):
        torch.manual_seed(100 * step + RANK)
        model(torch.randn(4, 64)).backward()
    with contextlib.suppress(RuntimeError, HpcsyncError):
        model(torch.randn(4, 64), fails=RANK == SIZE - 1).backward()
    for param in model.parameters():
        param.grad = None
    model(torch.randn(4, 64)).backward()
    # All ranks pick the same elements by the number of the step.
    same_on_all_ranks({name: param.grad for name, param in model.named_parameters()})


@pytest.mark.parametrize("codec", CODED)
def test_a_state_goes_on_to_the_same_bits(wrap: Wrap, codec: str) -> None:
    first = wrap(Weights(), codec, 2, warmup=1, rounding="stochastic")
    train(first, 4)
    state = copy.deepcopy(first.reducer.state_dict())
    wanted = train(first, 3, first=4)
    second = wrap(Weights(), codec, 2, warmup=1, rounding="stochastic")
    second.reducer.load_state_dict(state)
    for one, other in zip(wanted, train(second, 3, first=4), strict=True):
        same_bits(one, other)


def test_a_state_of_another_placement_is_refused_by_all(wrap: Wrap) -> None:
    if SIZE < 4:
        pytest.skip("needs 4 ranks for two placements that both code")
    first = wrap(Weights(), "int8", 2)
    train(first, 2)
    second = wrap(Weights(), "int8", 1)
    with pytest.raises(HpcsyncError, match="resume with those of before"):
        second.reducer.load_state_dict(first.reducer.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_of_another_dtype_are_coded_as_float32(wrap: Wrap, dtype: torch.dtype) -> None:
    model = wrap(Weights(dtype), "int8", 2)
    found = exchanged(model, draw(0, RANK, dtype))
    every = WORLD.allgather({name: value.float() for name, value in found.items()})
    for other in every:
        same_bits(every[0], other)
    assert relative(every[0], mean(0)) < 0.03
    assert all(value.dtype == dtype for value in found.values())


def test_bytes_between_nodes_shrink(wrap: Wrap) -> None:
    if SIZE < 2:
        pytest.skip("one rank sends nothing")

    def sent(codec: str, **settings: Any) -> float:
        model = wrap(Weights(), codec, 1, vectors=True, bucket_mb=1.0, **settings)
        train(model, 1)
        return model.reducer.stats.internode_bytes

    plain = sent("none")
    for codec, most in {"bf16": 0.51, "int8": 0.27, "int4": 0.145, "onebit": 0.05}.items():
        assert sent(codec) <= most * plain + 64


def test_the_ranks_must_agree_about_the_codec(wrap: Wrap) -> None:
    if SIZE < 2:
        pytest.skip("one rank agrees with itself")
    with pytest.raises(HpcsyncError, match="compress: the ranks disagree") as caught:
        wrap(Weights(), "int8" if RANK else "bf16")
    assert "\n" not in str(caught.value)


def test_a_rank_too_large_for_powersgd_is_told_once(wrap: Wrap) -> None:
    with pytest.raises(HpcsyncError, match=r"compress\.rank") as caught:
        wrap(Weights(), "powersgd", rank=500)
    assert "\n" not in str(caught.value)


class Halves(PieceCodec):
    """A codec of a user's own."""

    name = "halves"

    def capacity(self, count: int) -> int:
        return 2 * count

    def encode(self, values: Any, out: Any, store: Any, moment: Any) -> int:
        out[: 2 * len(values)] = values.astype(np.float16).view(np.uint8)
        return 2 * len(values)

    def decode(self, data: Any, out: Any) -> None:
        out[:] = data[: 2 * len(out)].view(np.float16)

    def decode_add(self, data: Any, out: Any) -> None:
        out += data[: 2 * len(out)].view(np.float16)


def test_integers_are_not_coded(wrap: Wrap) -> None:
    model = wrap(Weights(), "none")
    coding = Coding(codec=Halves(settings()), where="all", count=4)
    with pytest.raises(UserError, match="codes floating-point gradients only, not int32"):
        model.collectives.allreduce(private_buffer(16), dtype_of("int32"), coding=coding)


def settings() -> Any:
    from hpcsync.codecs import Settings

    return Settings()


def test_the_owner_adds_in_rank_order(wrap: Wrap) -> None:
    """The reference form of ``combine``, against float32 sums in that order."""
    codec = Halves(settings())
    values = [np.float32([1e8, 1.0, -2.5]) * (rank + 1) for rank in range(4)]
    for place in range(4):
        coded = []
        for rank, each in enumerate(values):
            if rank != place:
                out = np.empty(6, np.uint8)
                codec.encode(each, out, None, None)
                coded.append(out)
        own, out = values[place].copy(), np.empty(6, np.uint8)
        with np.errstate(over="ignore", invalid="ignore"):
            codec.combine(own, place, coded, 3, out, None, None)  # type: ignore[arg-type]
            total: Any = None
            for rank, each in enumerate(values):
                part = each if rank == place else each.astype(np.float16).astype(np.float32)
                total = part if total is None else total + part
            wanted = (total / np.float32(3)).astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(own, wanted)
    assert OWNER == "owner"
    assert isinstance(wrap(Weights(), "none").collectives, Collectives)
