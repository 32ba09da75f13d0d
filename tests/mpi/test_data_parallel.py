"""DataParallel under an unchanged torch loop: the gradients that torch's own DDP gives, those that
one process with the whole batch gives, and every way in which models and loops are odd."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hpcsync.collectives import Collectives
from hpcsync.config import CommConfig
from hpcsync.errors import ModelError
from hpcsync.launch import AgreedError, Runtime
from hpcsync.models.convnet import ConvNet
from hpcsync.models.gpt import GPT
from hpcsync.parallel import DataParallel
from hpcsync.topology import Topology

pytestmark = pytest.mark.mpi

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
LAST = SIZE - 1
KIB = 1 / 1024
MINE = 3  # samples a rank and step

Wrap = Callable[..., DataParallel]
Batch = tuple[Tensor, Tensor]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def wrap() -> Iterator[Wrap]:
    """Wraps a module on a placement of the ranks, small buckets by default."""
    runtimes: list[Runtime] = []

    def make(module: nn.Module, width: int = 0, buffers: bool = True, **comm: Any) -> DataParallel:
        runtime = Runtime(WORLD.Dup(), Topology.group(["host"] * SIZE, width), 60.0)
        runtimes.append(runtime)
        sizes = {"bucket_mb": KIB, "first_bucket_mb": KIB, "timeout_s": 60.0}
        config = CommConfig(**{**sizes, **comm})
        return DataParallel(module, runtime=runtime, comm=config, broadcast_buffers=buffers)

    yield make
    for runtime in runtimes:
        runtime.close()


@pytest.fixture(scope="module")
def gloo() -> Iterator[None]:
    """torch.distributed over Gloo between the same processes."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = (
        dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if not RANK else None
    )
    port = WORLD.bcast(store.port if store is not None else 0)
    if store is None:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=SIZE)
    yield
    dist.barrier()
    dist.destroy_process_group()


class Mixture(nn.Module):
    """A trunk and four branches; which branch a sample takes is up to the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(6, 10)
        self.branches = nn.ModuleList(nn.Linear(10, 4) for _ in range(4))
        self.never = nn.Linear(3, 3)

    def forward(self, inputs: Tensor, branch: int) -> Tensor:
        out: Tensor = self.branches[branch](torch.tanh(self.trunk(inputs)))
        return out


class Perceptron(nn.Module):
    def __init__(self, sizes: tuple[int, ...] = (6, 40, 30, 4)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(one, other) for one, other in itertools.pairwise(sizes)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.layers:
            inputs = torch.tanh(layer(inputs))
        return inputs


def made(build: Callable[[], nn.Module], seed: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def gpt() -> nn.Module:
    return made(lambda: GPT(vocab=40, context=8, layers=2, width=16, heads=2, hidden=32))


def convnet() -> nn.Module:
    return made(lambda: ConvNet(channels=1, classes=5, layers=3, width=8))


def tokens(step: int, rank: int) -> Batch:
    drawn = torch.Generator().manual_seed(1000 * step + rank)
    text = torch.randint(0, 40, (MINE, 9), generator=drawn)
    return text[:, :-1], text[:, 1:]


def pictures(step: int, rank: int) -> Batch:
    drawn = torch.Generator().manual_seed(1000 * step + rank)
    images = torch.randn(MINE, 1, 8, 8, generator=drawn)
    return images, torch.randint(0, 5, (MINE,), generator=drawn)


def vectors(step: int, rank: int) -> Tensor:
    drawn = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(MINE, 6, generator=drawn)


Loss = Callable[[nn.Module, int, int], Tensor]


def gpt_loss(model: nn.Module, step: int, rank: int) -> Tensor:
    loss: Tensor = model(*tokens(step, rank))
    return loss


def convnet_loss(model: nn.Module, step: int, rank: int) -> Tensor:
    loss: Tensor = model(*pictures(step, rank))
    return loss


def mixture_loss(model: nn.Module, step: int, rank: int) -> Tensor:
    """Branch 0 is used by all ranks, 1 by odd ones, 2 by rank 0 in odd steps, 3 by nobody."""
    inputs = vectors(step, rank)
    loss: Tensor = model(inputs, 0).square().mean()
    if rank % 2:
        loss = loss + model(inputs, 1).abs().mean()
    if rank == 0 and step % 2:
        loss = loss + model(inputs, 2).sum()
    return loss


def square_loss(model: nn.Module, step: int, rank: int) -> Tensor:
    loss: Tensor = model(vectors(step, rank).to(next(model.parameters()).dtype)).square().mean()
    return loss


CASES: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "gpt": (gpt, gpt_loss),
    "convnet": (convnet, convnet_loss),
    "mixture": (lambda: made(Mixture), mixture_loss),
    "perceptron": (lambda: made(Perceptron), square_loss),
}


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Copies, by the name in the wrapped module."""
    return {
        name.removeprefix("module."): None if param.grad is None else param.grad.detach().clone()
        for name, param in model.named_parameters()
    }


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): value.detach().clone()
        for name, value in model.state_dict().items()
    }


def close(
    ours: dict[str, Any], theirs: dict[str, Any], rtol: float = 1e-5, atol: float = 1e-7
) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        other = theirs[name]
        assert (value is None) == (other is None), name
        if value is not None:
            torch.testing.assert_close(
                value, other, rtol=rtol, atol=atol, msg=f"{name}\n{value}\n{other}"
            )


def same_bits(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        other = theirs[name]
        assert (value is None) == (other is None), name
        if value is not None and other is not None:
            assert torch.equal(value, other), name


def same_on_all_ranks(found: dict[str, Tensor | None]) -> None:
    everyone = WORLD.allgather(found)
    for other in everyone:
        same_bits(found, other)


def mean_of_ranks(model: nn.Module, loss: Loss, step: int) -> dict[str, Tensor | None]:
    """What the gradients should be: every rank's share in turn, in this one process."""
    sums: dict[str, Tensor | None] = {}
    for rank in range(SIZE):
        alone = copy.deepcopy(model)
        alone.zero_grad()
        loss(alone, step, rank).backward()
        for name, grad in gradients(alone).items():
            old = sums.get(name)
            sums[name] = grad if old is None else old if grad is None else old + grad
    return {name: None if grad is None else grad / SIZE for name, grad in sums.items()}


# -- against torch ------------------------------------------------------------------------


@pytest.mark.parametrize("width", [0, 3])
@pytest.mark.parametrize("case", ["gpt", "convnet", "mixture"])
def test_gradients_are_those_of_ddp(wrap: Wrap, gloo: None, case: str, width: int) -> None:
    build, loss = CASES[case]
    ours = wrap(build(), width)
    theirs = nn.parallel.DistributedDataParallel(
        build(), bucket_cap_mb=0.001, find_unused_parameters=case == "mixture"
    )
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (ours, theirs)]
    for step in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            if case == "mixture":  # DDP sees one forward pass a step
                _mixture_once(model, step)
            else:
                loss(model, step, RANK).backward()
        close(gradients(ours), gradients(theirs))
        same_on_all_ranks(gradients(ours))
        for optimizer in optimizers:
            optimizer.step()
    close(weights(ours), weights(theirs), rtol=1e-4, atol=1e-6)


def _mixture_once(model: nn.Module, step: int) -> None:
    branch = 1 if RANK % 2 else 2 if step % 2 else 0
    model(vectors(step, RANK), branch).square().mean().backward()


def test_one_process_with_the_whole_batch_gives_the_same(wrap: Wrap) -> None:
    ours, alone = wrap(gpt(), 2), gpt()
    for step in range(3):
        ours.zero_grad()
        alone.zero_grad()
        gpt_loss(ours, step, RANK).backward()
        batches = [tokens(step, rank) for rank in range(SIZE)]
        alone(*(torch.cat(parts) for parts in zip(*batches, strict=True))).backward()
        close(gradients(ours), gradients(alone), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Adagrad"])
def test_optimizers_step_to_the_weights_of_one_process(wrap: Wrap, kind: str) -> None:
    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        if kind == "SGD":
            return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        if kind == "AdamW":
            return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
        return torch.optim.Adagrad(model.parameters(), lr=1e-2)

    ours, alone = wrap(made(Perceptron)), made(Perceptron)
    optimizers = optimizer_of(ours), optimizer_of(alone)
    for step in range(6):
        for optimizer in optimizers:
            optimizer.zero_grad()
        square_loss(ours, step, RANK).backward()
        everything = torch.cat([vectors(step, rank) for rank in range(SIZE)])
        alone(everything).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    close(weights(ours), weights(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["auto", "ring", "halving", "doubling", "native"])
def test_every_algorithm_gives_the_mean(wrap: Wrap, algorithm: str) -> None:
    for width in (0, 3):
        ours = wrap(made(Perceptron), width, algorithm=algorithm, segment_mb=KIB)
        for step in range(2):
            ours.zero_grad()
            square_loss(ours, step, RANK).backward()
            close(gradients(ours), mean_of_ranks(ours.module, square_loss, step))


# -- the same bits ------------------------------------------------------------------------


def trained(wrap: Wrap, case: str, steps: int = 3, width: int = 0, **comm: Any) -> list[Any]:
    """Gradients of each step, and the weights at the end."""
    build, loss = CASES[case]
    ours = wrap(build(), width, **comm)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    found: list[Any] = []
    for step in range(steps):
        optimizer.zero_grad()
        loss(ours, step, RANK).backward()
        found.append(gradients(ours))
        optimizer.step()
    return [*found, weights(ours)]


@pytest.mark.parametrize("case", ["gpt", "mixture"])
def test_timing_does_not_change_a_bit(wrap: Wrap, case: str) -> None:
    for width in (0, 2):
        first = trained(wrap, case, width=width)
        for change in (
            {},
            {"overlap": False},
            {"priority": False},
            {"credit_mb": 1e-6},
            {"overlap": False, "priority": False},
        ):
            for one, other in zip(first, trained(wrap, case, width=width, **change), strict=True):
                same_bits(one, other)


def test_reproducible_changes_no_bit_with_buckets_or_placement(wrap: Wrap) -> None:
    first = trained(wrap, "gpt", reproducible=True)
    for width, bucket, segment in (
        (0, 25.0, 2.0),
        (1, 4 * KIB, KIB),
        (2, KIB, KIB),
        (3, 0.01, 2.0),
    ):
        again = trained(
            wrap, "gpt", 3, width, reproducible=True, bucket_mb=bucket, segment_mb=segment
        )
        for one, other in zip(first, again, strict=True):
            same_bits(one, other)


# -- parameters that are odd --------------------------------------------------------------


@pytest.mark.parametrize("to_none", [True, False])
def test_parameters_that_some_or_all_ranks_leave_out(wrap: Wrap, to_none: bool) -> None:
    ours = wrap(made(Mixture))
    seen: set[str] = set()
    for step in range(4):
        ours.zero_grad(set_to_none=to_none)
        mixture_loss(ours, step, RANK).backward()
        found, wanted = gradients(ours), mean_of_ranks(ours.module, mixture_loss, step)
        if not to_none:  # what once had a gradient has zeros, as on one rank
            seen |= {name for name, grad in wanted.items() if grad is not None}
            for name in seen:
                if wanted[name] is None:
                    wanted[name] = torch.zeros_like(dict(ours.module.named_parameters())[name])
        close(found, wanted)
        assert found["never.weight"] is None
        assert found["branches.3.weight"] is None


def test_a_rank_that_uses_nothing_but_one_parameter(wrap: Wrap) -> None:
    ours = wrap(made(Perceptron))
    for step in range(3):
        ours.zero_grad()
        loss = square_loss(ours, step, RANK)
        if RANK == LAST:
            loss = ours.module.layers[0].bias.sum()
        loss.backward()
        same_on_all_ranks(gradients(ours))
        assert all(grad is not None for grad in gradients(ours).values()) == (SIZE > 1)


def test_tied_parameters(wrap: Wrap) -> None:
    model = gpt()
    assert model.head.weight is model.embedding.weight
    ours = wrap(model)
    gpt_loss(ours, 0, RANK).backward()
    close(gradients(ours), mean_of_ranks(ours.module, gpt_loss, 0))
    assert sum(len(plan.params) for plan in ours.reducer.buckets) == len(list(model.parameters()))


def test_parameters_may_be_unfrozen_later(wrap: Wrap) -> None:
    ours = wrap(made(Perceptron))
    first, last = ours.module.layers[0], ours.module.layers[-1]
    for stage in range(4):
        first.requires_grad_(stage in (1, 3))
        last.requires_grad_(stage in (0, 1, 2))
        for step in range(3):
            ours.zero_grad()
            square_loss(ours, step, RANK).backward()
            close(gradients(ours), mean_of_ranks(ours.module, square_loss, step))
            assert (first.weight.grad is None) == (stage not in (1, 3))


def test_a_parameter_may_take_the_place_of_one_of_the_same_shape(wrap: Wrap) -> None:
    ours = wrap(made(lambda: Perceptron((6, 6, 6, 6))), bucket_mb=25.0, first_bucket_mb=25.0)
    for stage in range(4):
        if stage in (1, 3):  # the next layer joins as this one leaves
            for index, layer in enumerate(ours.module.layers):
                layer.requires_grad_(index == stage % 3)
        if stage == 2:
            torch.manual_seed(stage)
            ours.module.layers[1] = nn.Linear(6, 6)
        for step in range(2):
            ours.zero_grad()
            square_loss(ours, step, RANK).backward()
            close(gradients(ours), mean_of_ranks(ours.module, square_loss, step))
            same_on_all_ranks(gradients(ours))


def test_modules_may_be_added_later(wrap: Wrap) -> None:
    ours = wrap(made(Perceptron))
    for stage in range(2):
        for step in range(3):
            ours.zero_grad()
            square_loss(ours, step, RANK).backward()
            close(gradients(ours), mean_of_ranks(ours.module, square_loss, step))
        torch.manual_seed(stage)
        ours.module.layers.append(nn.Linear(4, 4))
    assert len(gradients(ours)) == 10


def test_a_joining_parameter_keeps_gradients_that_are_there(wrap: Wrap) -> None:
    """Joining in the middle of an accumulation loses nothing."""
    ours = wrap(made(Perceptron))
    ours.module.layers[0].requires_grad_(False)
    with ours.no_sync():
        square_loss(ours, 0, RANK).backward()
    ours.module.layers[0].requires_grad_(True)
    square_loss(ours, 1, RANK).backward()
    first = mean_of_ranks(ours.module, square_loss, 0)
    wanted = mean_of_ranks(ours.module, square_loss, 1)
    for name, grad in wanted.items():
        if not name.startswith("layers.0"):
            assert grad is not None
            grad += first[name]
    close(gradients(ours), wanted)


def test_frozen_parameters_have_no_part(wrap: Wrap) -> None:
    model = made(Perceptron)
    model.layers[1].requires_grad_(False)
    ours = wrap(model)
    square_loss(ours, 0, RANK).backward()
    found = gradients(ours)
    assert found["layers.1.weight"] is None
    close(found, mean_of_ranks(ours.module, square_loss, 0))


def test_a_model_without_trainable_parameters(wrap: Wrap) -> None:
    model = made(Perceptron).requires_grad_(False)
    ours = wrap(model)
    assert not ours(vectors(0, RANK)).requires_grad
    assert ours.reducer.buckets_description() == "none (no parameter wants a gradient)"
    assert float(ours.norm()) == 0
    assert ours.finite()


class Odd(nn.Module):
    """A scalar, an empty one, one of five axes, and one that is not dense in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.deep = nn.Parameter(torch.randn(2, 1, 3, 1, 2))
        self.columns = nn.Parameter(torch.randn(6, 8)[:, ::2])
        self.across = nn.Parameter(torch.randn(5, 7).t())

    def forward(self, inputs: Tensor) -> Tensor:
        out = self.scalar * (inputs @ self.columns).sum() + self.deep.square().sum()
        return out * self.across.mean() + self.empty.sum()


def test_shapes_and_strides_of_all_kinds(wrap: Wrap) -> None:
    ours = wrap(made(Odd))
    for step in range(3):
        ours.zero_grad(set_to_none=step != 2)
        square_loss(ours, step, RANK).backward()
        close(gradients(ours), mean_of_ranks(ours.module, square_loss, step), 1e-4, 1e-5)


# -- types --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_of_another_dtype(wrap: Wrap, dtype: torch.dtype) -> None:
    ours = wrap(made(Perceptron).to(dtype), 2)
    tolerance = 3e-2 if dtype is torch.bfloat16 else 1e-12
    for step in range(3):
        ours.zero_grad()
        square_loss(ours, step, RANK).backward()
        found = gradients(ours)
        assert {grad.dtype for grad in found.values() if grad is not None} == {dtype}
        close(found, mean_of_ranks(ours.module, square_loss, step), tolerance, tolerance * 0.1)
        same_on_all_ranks(found)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Linear(6, 20).bfloat16()
        self.high = nn.Linear(20, 20)
        self.higher = nn.Linear(20, 4).double()

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.higher(self.high(self.low(inputs.bfloat16()).float()).double())
        return out


def test_mixed_dtypes(wrap: Wrap) -> None:
    ours = wrap(made(Mixed))
    for step in range(3):
        ours.zero_grad()
        square_loss(ours, step, RANK).backward()
        close(gradients(ours), mean_of_ranks(ours.module, square_loss, step), 3e-2, 3e-3)
    assert {plan.dtype for plan in ours.reducer.buckets} == {"bfloat16", "float32", "float64"}
    assert ours.finite()


def test_a_model_that_changes_its_dtype(wrap: Wrap) -> None:
    ours = wrap(made(Perceptron))
    square_loss(ours, 0, RANK).backward()
    ours.zero_grad()
    ours.double()
    square_loss(ours, 1, RANK).backward()
    close(gradients(ours), mean_of_ranks(ours.module, square_loss, 1))


def test_channels_last(wrap: Wrap) -> None:
    model = convnet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ours = wrap(model)

    def loss(model: nn.Module, step: int, rank: int) -> Tensor:
        images, targets = pictures(step, rank)
        out: Tensor = model(images.to(memory_format=torch.channels_last), targets)
        return out

    for step in range(3):
        ours.zero_grad()
        loss(ours, step, RANK).backward()
        close(gradients(ours), mean_of_ranks(ours.module, loss, step), 1e-4, 1e-6)
        for param in ours.parameters():
            assert param.grad is not None
            assert param.grad.stride() == param.stride()


def test_autocast(wrap: Wrap) -> None:
    def loss(model: nn.Module, step: int, rank: int) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gpt_loss(model, step, rank)

    ours = wrap(gpt())
    for step in range(2):
        ours.zero_grad()
        loss(ours, step, RANK).backward()
        close(gradients(ours), mean_of_ranks(ours.module, loss, step), 1e-4, 1e-5)


def test_a_loss_scale_finds_inf_on_every_rank(wrap: Wrap) -> None:
    ours = wrap(made(Perceptron))
    for step in range(3):
        ours.zero_grad()
        scale = 2.0**10
        loss = square_loss(ours, step, RANK) * scale
        if step == 1 and RANK == LAST:
            loss = loss * float("inf")
        loss.backward()
        assert ours.finite() == (step != 1)
        if step != 1:
            for param in ours.parameters():
                assert param.grad is not None
                param.grad /= scale
            close(gradients(ours), mean_of_ranks(ours.module, square_loss, step))


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_one_bad_number_reaches_every_rank_and_goes_again(wrap: Wrap, bad: str) -> None:
    ours = wrap(made(Perceptron), 3)
    for step in range(2):
        ours.zero_grad()
        loss = square_loss(ours, step, RANK)
        if step == 0 and RANK == LAST:
            loss = loss + ours.module.layers[1].bias[3] * float(bad)
        loss.backward()
        assert ours.finite() == (step == 1)
        grad = ours.module.layers[1].bias.grad
        assert bool(torch.isfinite(grad[3])) == (step == 1)
        assert bool(torch.isfinite(grad[4:]).all())


def test_torchs_own_scaler(wrap: Wrap) -> None:
    ours = wrap(made(Perceptron))
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1)
    for step in range(3):
        before = weights(ours)
        optimizer.zero_grad()
        loss = square_loss(ours, step, RANK)
        if step == 1 and RANK == 0:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        changed = any(not torch.equal(before[name], value) for name, value in weights(ours).items())
        assert changed == (step != 1)
    assert scaler.get_scale() == 2.0**9
    same_on_all_ranks(weights(ours))  # type: ignore[arg-type]


# -- norms --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norm(wrap: Wrap, dtype: torch.dtype) -> None:
    ours = wrap(made(Perceptron).to(dtype))
    square_loss(ours, 0, RANK).backward()
    grads = [param.grad.double() for param in ours.parameters() if param.grad is not None]
    truth = torch.cat([grad.flatten() for grad in grads]).norm()
    assert ours.norm().dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(ours.norm().double(), truth, rtol=1e-5, atol=0)
    assert WORLD.allgather(float(ours.norm())) == [float(ours.norm())] * SIZE


def test_norm_of_float16_does_not_overflow(wrap: Wrap) -> None:
    model = nn.Linear(50, 50).half()
    ours = wrap(model)
    (model.weight.float().sum() * 30000 + model.bias.float().sum()).backward()
    assert ours.finite()
    torch.testing.assert_close(float(ours.norm()), 30000 * 50.0, rtol=1e-3, atol=0)


def test_clipping(wrap: Wrap) -> None:
    ours, alone = wrap(gpt()), gpt()
    gpt_loss(ours, 0, RANK).backward()
    batches = [tokens(0, rank) for rank in range(SIZE)]
    alone(*(torch.cat(parts) for parts in zip(*batches, strict=True))).backward()
    norm = nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
    torch.testing.assert_close(ours.norm(), norm, rtol=1e-4, atol=0)
    nn.utils.clip_grads_with_norm_(ours.parameters(), 0.1, ours.norm())
    close(gradients(ours), gradients(alone), rtol=1e-3, atol=1e-6)


def test_norm_does_not_depend_on_buckets(wrap: Wrap) -> None:
    norms = []
    for bucket in (KIB, 25.0):
        ours = wrap(gpt(), reproducible=True, bucket_mb=bucket, first_bucket_mb=bucket)
        for step in range(2):
            ours.zero_grad()
            gpt_loss(ours, step, RANK).backward()
            norms.append(float(ours.norm()))
    assert norms[:2] == norms[2:]


# -- loops that are odd -------------------------------------------------------------------


@pytest.mark.parametrize("to_none", [True, False])
def test_accumulation(wrap: Wrap, to_none: bool) -> None:
    ours = wrap(made(Perceptron), 2)
    for step in range(3):
        ours.zero_grad(set_to_none=to_none)
        for micro in range(3):
            with ours.no_sync() if micro < 2 else contextlib.nullcontext():
                (square_loss(ours, 10 * step + micro, RANK) / 3).backward()
        parts = [mean_of_ranks(ours.module, square_loss, 10 * step + m) for m in range(3)]
        close(gradients(ours), {name: sum(p[name] for p in parts) / 3 for name in parts[0]})


def test_gradients_stay_local_in_no_sync(wrap: Wrap) -> None:
    ours = wrap(made(Perceptron))
    with ours.no_sync():
        assert not ours.reducer.syncing
        square_loss(ours, 0, RANK).backward()
        with ours.no_sync():
            square_loss(ours, 1, RANK).backward()
        assert not ours.reducer.syncing
    assert ours.reducer.syncing
    alone = copy.deepcopy(ours.module)
    alone.zero_grad()
    (square_loss(alone, 0, RANK) + square_loss(alone, 1, RANK)).backward()
    close(gradients(ours), gradients(alone))


def test_accumulation_over_branches_that_differ(wrap: Wrap) -> None:
    """What only an earlier micro-batch used, on any rank, counts; what was thrown away does not."""
    ours = wrap(made(Mixture))

    def loss(model: nn.Module, step: int, rank: int) -> Tensor:
        first = model(vectors(0, rank), 1 if rank == 0 else 2).square().sum()
        total: Tensor = first + model(vectors(1, rank), 0).square().sum()
        return total

    for round_ in range(5):
        dropped = round_ % 2 == 1
        ours.zero_grad()
        with ours.no_sync():
            ours(vectors(0, RANK), 1 if RANK == 0 else 2).square().sum().backward()
        if dropped:
            ours.zero_grad()
        ours(vectors(1, RANK), 0).square().sum().backward()
        if dropped:
            wanted = mean_of_ranks(
                ours.module, lambda m, s, r: m(vectors(1, r), 0).square().sum(), 0
            )
        else:
            wanted = mean_of_ranks(ours.module, loss, 0)
        close(gradients(ours), wanted)


def test_gradients_may_add_up_over_exchanges(wrap: Wrap) -> None:
    """Two backward passes without no_sync or zero_grad: the sum of the two means."""
    ours = wrap(made(Perceptron))
    wanted = [mean_of_ranks(ours.module, square_loss, step) for step in range(3)]
    for step in range(3):  # the buckets are rebuilt between the first two
        square_loss(ours, step, RANK).backward()
        total = {name: sum(each[name] for each in wanted[: step + 1]) for name in wanted[0]}
        close(gradients(ours), total)


def test_several_backward_passes_of_one_forward_pass(wrap: Wrap) -> None:
    ours = wrap(made(Perceptron))
    out = ours(vectors(0, RANK))
    out.square().mean().backward(retain_graph=True)
    out.abs().mean().backward()

    def loss(model: nn.Module, step: int, rank: int) -> Tensor:
        out = model(vectors(0, rank))
        both: Tensor = out.square().mean() + out.abs().mean()
        return both

    close(gradients(ours), mean_of_ranks(ours.module, loss, 0))


def test_several_forward_passes_of_one_backward_pass(wrap: Wrap) -> None:
    """As in a GAN, batch normalisation included: buffers are set between the two."""

    def loss(model: nn.Module, step: int, rank: int) -> Tensor:
        return convnet_loss(model, step, rank) + convnet_loss(model, step + 50, rank)

    ours = wrap(convnet())
    for step in range(3):
        ours.zero_grad()
        loss(ours, step, RANK).backward()
        close(gradients(ours), mean_of_ranks(ours.module, loss, step), 1e-4, 1e-6)


def test_forward_passes_without_a_backward_pass(wrap: Wrap) -> None:
    ours = wrap(made(Perceptron))
    for step in range(3):
        ours.zero_grad()
        ours(vectors(9, RANK))
        ours.eval()
        with torch.no_grad():
            for _ in range(RANK):  # any number, other on each rank
                ours(vectors(9, RANK))
        ours.train()
        square_loss(ours, step, RANK).backward()
        ours(vectors(9, RANK))
        close(gradients(ours), mean_of_ranks(ours.module, square_loss, step))


def test_gradients_asked_for_apart_are_left_alone(wrap: Wrap) -> None:
    ours = wrap(made(Perceptron))
    (grad,) = torch.autograd.grad(square_loss(ours, 0, RANK), [ours.module.layers[0].weight])
    alone = copy.deepcopy(ours.module)
    square_loss(alone, 0, RANK).backward()
    torch.testing.assert_close(grad, alone.layers[0].weight.grad)
    assert all(each is None for each in gradients(ours).values())


def test_two_models_of_one_loss(wrap: Wrap) -> None:
    front = wrap(made(lambda: Perceptron((6, 20, 6))))
    back = DataParallel(
        made(Perceptron),
        runtime=front.collectives.runtime,
        comm=CommConfig(bucket_mb=KIB, first_bucket_mb=KIB),
        collectives=front.collectives,
    )
    both = nn.Sequential(front.module, back.module)
    for step in range(3):
        front.zero_grad()
        back.zero_grad()
        back(front(vectors(step, RANK))).square().mean().backward()
        wanted = mean_of_ranks(both, square_loss, step)
        found = {f"0.{name}": grad for name, grad in gradients(front).items()}
        found |= {f"1.{name}": grad for name, grad in gradients(back).items()}
        close(found, wanted)


class Checkpointed(Perceptron):
    reentrant = False

    def forward(self, inputs: Tensor) -> Tensor:
        middle = torch.tanh(self.layers[0](inputs))
        for layer in (self.layers[1], self.layers[1]):  # the same weights twice
            middle = checkpoint(layer, middle, use_reentrant=self.reentrant)
        out: Tensor = self.layers[2](middle)
        return out


def test_activation_checkpoints(wrap: Wrap) -> None:
    ours = wrap(made(lambda: Checkpointed((6, 30, 30, 4))))
    for step in range(3):
        ours.zero_grad()
        square_loss(ours, step, RANK).backward()
        close(gradients(ours), mean_of_ranks(ours.module, square_loss, step))


@pytest.mark.parametrize("overlap", [True, False])
def test_reentrant_checkpoints_of_shared_weights_are_refused(wrap: Wrap, overlap: bool) -> None:
    model = made(lambda: Checkpointed((6, 30, 30, 4)))
    model.reentrant = True  # type: ignore[assignment]
    ours = wrap(model, overlap=overlap)
    with pytest.raises(
        ModelError, match=r"layers\.1\.\w+ got a gradient twice.*use_reentrant=False"
    ):
        square_loss(ours, 0, RANK).backward()


# -- buffers and values -------------------------------------------------------------------


def test_rank_0_gives_everyone_its_values(wrap: Wrap) -> None:
    torch.manual_seed(RANK)
    model = ConvNet(channels=1, classes=5, layers=3, width=8)
    for buffer in model.buffers():
        buffer.fill_(RANK)
    ours = wrap(model)
    found = weights(ours)
    same_on_all_ranks(found)  # type: ignore[arg-type]
    torch.manual_seed(0)
    close(
        {
            name: value
            for name, value in found.items()
            if "running" not in name and "num" not in name
        },
        {
            name: value
            for name, value in weights(ConvNet(channels=1, classes=5, layers=3, width=8)).items()
            if "running" not in name and "num" not in name
        },
    )
    assert float(found["layers.0.1.running_mean"].abs().sum()) == 0


@pytest.mark.parametrize("buffers", [True, False])
def test_buffers_follow_rank_0_in_training(wrap: Wrap, buffers: bool) -> None:
    ours = wrap(convnet(), buffers=buffers)
    for step in range(3):
        ours.zero_grad()
        convnet_loss(ours, step, RANK).backward()
    alone = convnet()
    shown = 0 if buffers else RANK
    for step in range(2):
        convnet_loss(alone, step, shown)
    first = "layers.0.1.running_mean"  # the first layer's: it has seen no weights but its own
    ours.eval()
    with torch.no_grad():
        ours(*pictures(9, RANK))
    counted = weights(ours)["layers.0.1.num_batches_tracked"]
    assert int(counted) == 3
    # The last forward pass began with rank 0's, and added this rank's own batch.
    convnet_loss(alone, 2, RANK)
    torch.testing.assert_close(weights(ours)[first], weights(alone)[first], rtol=1e-4, atol=1e-5)


def test_buffers_of_any_dtype(wrap: Wrap) -> None:
    class Buffered(Perceptron):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("flag", torch.tensor([RANK == 0]))
            self.register_buffer("count", torch.tensor(RANK + 7))
            self.register_buffer("none", torch.zeros(0))
            self.register_buffer("low", torch.full((3,), float(RANK)).bfloat16())
            self.register_buffer("complex", torch.full((2,), complex(RANK, 1)))
            self.register_buffer("across", torch.full((3, 2), float(RANK)).t())
            self.register_buffer("hidden", torch.full((2,), RANK), persistent=False)

    model = made(Buffered)
    wrap(model)
    for name, buffer in model.named_buffers():
        wanted = torch.as_tensor({"flag": True, "count": 7, "complex": 1j}.get(name, 0))
        assert bool((buffer == wanted).all()), name


def test_state_of_the_wrapper_is_that_of_ddp(wrap: Wrap) -> None:
    model = made(Perceptron)
    ours = wrap(model)
    assert list(ours.state_dict()) == [f"module.{name}" for name in model.state_dict()]
    ours.load_state_dict({name: torch.zeros_like(v) for name, v in ours.state_dict().items()})
    assert not any(param.detach().any() for param in model.parameters())


def test_gradients_are_views_of_the_buckets(wrap: Wrap) -> None:
    ours = wrap(made(Perceptron))
    places = []
    for step in range(4):
        ours.zero_grad(set_to_none=step % 2 == 0)
        square_loss(ours, step, RANK).backward()
        places.append(
            [param.grad.data_ptr() for param in ours.parameters() if param.grad is not None]
        )
    assert places[1] == places[2] == places[3]
    for bucket in ours.reducer.layout.buckets:
        assert all(bucket.holds(slot) for slot in range(len(bucket.params)))


def test_buckets_are_rebuilt_once_in_the_order_of_readiness(wrap: Wrap) -> None:
    class Backwards(Perceptron):
        def forward(self, inputs: Tensor) -> Tensor:
            for layer in (self.layers[2], self.layers[0], self.layers[1]):
                inputs = torch.tanh(layer(inputs))
            return inputs

    ours = wrap(made(lambda: Backwards((30, 30, 6, 30))))
    model = ours.module
    model.layers[0], model.layers[1], model.layers[2] = (
        nn.Linear(30, 30),
        nn.Linear(30, 4),
        nn.Linear(6, 30),
    )
    orders = []
    for step in range(4):
        square_loss(ours, step, RANK).backward()  # gradients add up, over the rebuilding too
        orders.append([index for plan in ours.reducer.buckets for index in plan.params])
    assert orders[0] == [5, 4, 3, 2, 1, 0]
    assert {index // 2 for index in orders[1][:2]} == {1}
    assert {index // 2 for index in orders[1][-2:]} == {2}
    assert orders[1] == orders[2] == orders[3]
    wanted = [mean_of_ranks(model, square_loss, step) for step in range(4)]
    close(gradients(ours), {n: sum(each[n] for each in wanted) for n in wanted[0]})


def test_statistics(wrap: Wrap) -> None:
    ours = wrap(made(Perceptron), 1)
    square_loss(ours, 0, RANK).backward()
    stats = ours.reducer.stats
    if SIZE == 1:
        assert stats.bytes == stats.internode_bytes == 0
        return
    assert stats.bytes == sum(plan.nbytes for plan in ours.reducer.buckets)
    assert stats.internode_bytes > 0
    assert stats.comm_ms > 0
    assert stats.exposed_comm_ms >= 0
    assert ours.reducer.algorithm == "hierarchical"
    assert "buckets" in ours.reducer.buckets_description()


# -- what cannot be -----------------------------------------------------------------------


def _wider() -> nn.Module:
    return Perceptron((6, 40, 31, 4) if RANK == LAST else (6, 40, 30, 4))


def _longer() -> nn.Module:
    return Perceptron((6, 40, 30, 4, 4) if RANK == LAST else (6, 40, 30, 4))


def _lower() -> nn.Module:
    model = Perceptron()
    return model.bfloat16() if RANK == LAST else model


def _frozen() -> nn.Module:
    model = Perceptron()
    model.layers[1].requires_grad_(RANK != LAST)
    return model


def _other_frozen() -> nn.Module:
    model = Perceptron()
    model.add_module("frozen", nn.Linear(3, 3 + (RANK == LAST)).requires_grad_(False))
    return model


def _other_buffers() -> nn.Module:
    model = Perceptron()
    model.register_buffer("seen", torch.zeros(2 + (RANK == LAST)))
    return model


@pytest.mark.parametrize("build", [_wider, _longer, _lower, _frozen, _other_frozen, _other_buffers])
def test_models_that_differ_are_told_on_all_ranks(
    wrap: Wrap, build: Callable[[], nn.Module]
) -> None:
    if SIZE == 1:
        pytest.skip("a rank alone agrees with itself")
    with pytest.raises(ModelError) as told:
        wrap(made(build))
    text = str(told.value)
    assert isinstance(told.value, AgreedError)
    assert text.startswith(f"rank {LAST}: the models differ between ranks: ")
    assert "build the same model on every rank" in text
    assert "\n" not in text
    assert WORLD.allgather(text) == [text] * SIZE


def test_parameters_that_cannot_be_added_are_named(wrap: Wrap) -> None:
    model = Perceptron()
    model.register_parameter("wave", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))
    with pytest.raises(ModelError, match=r"parameter wave: dtype complex64 cannot be reduced; use"):
        wrap(model)


def test_parameters_elsewhere_are_named(wrap: Wrap) -> None:
    with pytest.raises(ModelError, match=r"parameter layers\.0\.weight is on meta.*model\.cpu\(\)"):
        wrap(Perceptron().to("meta"))


def test_parameters_without_a_shape_are_named(wrap: Wrap) -> None:
    with pytest.raises(ModelError, match=r"weight has no shape yet; pass a batch"):
        wrap(nn.LazyLinear(3))


def test_sparse_gradients_become_dense(wrap: Wrap) -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(40, 5, sparse=True)

        def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
            out: Tensor = self.table(inputs).square().mean()
            return out

    ours = wrap(made(Sparse))
    for step in range(2):
        ours.zero_grad()
        gpt_loss(ours, step, RANK).backward()
        wanted = mean_of_ranks(ours.module, gpt_loss, step)
        close(gradients(ours), {n: g.to_dense() for n, g in wanted.items() if g is not None})


def test_collectives_may_be_shared_with_other_work(wrap: Wrap) -> None:
    ours = wrap(made(Perceptron))
    assert isinstance(ours.collectives, Collectives)
    ours.collectives.runtime.barrier()
    square_loss(ours, 0, RANK).backward()
    assert F.mse_loss(ours.norm(), ours.norm()) == 0
