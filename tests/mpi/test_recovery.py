"""Backward passes that fail, wrappers that are closed or copied, communication after its end."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import weakref
from collections.abc import Iterator

import pytest
import torch
from mpi4py import MPI
from torch import nn
from torch.utils.checkpoint import checkpoint

from hpcsync import launch
from hpcsync.collectives import Collectives
from hpcsync.config import CommConfig, TopologyConfig
from hpcsync.device import dtype_of
from hpcsync.errors import HpcsyncError, ModelError
from hpcsync.launch import Runtime
from hpcsync.parallel import DataParallel

pytestmark = pytest.mark.mpi


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    with launch.start(TopologyConfig(), timeout_s=30.0) as job:
        yield job


class Faulty(torch.autograd.Function):
    """The identity, whose backward pass raises while ``armed``."""

    armed = False

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, grad):
        if Faulty.armed:
            raise RuntimeError("planted")
        return grad


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.front = nn.Linear(64, 64)
        self.back = nn.Linear(64, 4)

    def forward(self, values):
        # The back layer's gradients come before the fault, the front layer's would after it.
        return self.back(Faulty.apply(self.front(values))).sum()


def _wrap(runtime: Runtime) -> DataParallel:
    # A bucket a parameter: some are on their way when the fault comes.
    comm = CommConfig(bucket_mb=0.0001, first_bucket_mb=0.0001, timeout_s=30.0)
    return DataParallel(Net(), runtime=runtime, comm=comm)


def _step(model: DataParallel, rank: int) -> list[torch.Tensor]:
    for param in model.parameters():
        param.grad = None
    model(torch.full((2, 64), float(rank + 1))).backward()
    return [param.grad.clone() for param in model.parameters()]


@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_all_ranks_fail_and_go_on(runtime: Runtime, steps_before: int) -> None:
    model = _wrap(runtime)
    for _ in range(steps_before):
        expected = _step(model, runtime.rank)
    Faulty.armed = True
    try:
        with pytest.raises(RuntimeError, match="planted"):
            _step(model, runtime.rank)
    finally:
        Faulty.armed = False
    again = _step(model, runtime.rank)
    if steps_before:
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    reference = DataParallel(Net(), runtime=runtime)
    for mine, other in zip(again, _step(reference, runtime.rank), strict=True):
        torch.testing.assert_close(mine, other)


def test_one_rank_fails_and_the_others_are_told(runtime: Runtime) -> None:
    if runtime.size == 1:
        pytest.skip("needs another rank")
    model = _wrap(runtime)
    _step(model, runtime.rank)
    last = runtime.size - 1
    Faulty.armed = runtime.rank == last
    try:
        if runtime.rank == last:
            with pytest.raises(RuntimeError, match="planted"):
                _step(model, runtime.rank)
            Faulty.armed = False
            # Going on lets the others end their step; they raise, and everyone goes on.
            good = _step(model, runtime.rank)
        else:
            with pytest.raises(HpcsyncError, match="backward pass of another rank"):
                _step(model, runtime.rank)
            good = _step(model, runtime.rank)
    finally:
        Faulty.armed = False
    total = MPI.COMM_WORLD.allreduce(float(good[0].sum()))
    assert total / runtime.size == pytest.approx(float(good[0].sum()))


@contextlib.contextmanager
def _fault_on(rank: int, runtime: Runtime) -> Iterator[None]:
    """The backward pass inside fails on that rank, and the others are told."""
    Faulty.armed = runtime.rank == rank
    try:
        yield
    finally:
        Faulty.armed = False


@pytest.mark.parametrize("then", ["closes", "saves", "restores"])
def test_who_failed_lets_the_others_go_on_whatever_it_does_next(
    runtime: Runtime, then: str
) -> None:
    if runtime.size == 1:
        pytest.skip("needs another rank")
    model = _wrap(runtime)
    for _ in range(2):
        _step(model, runtime.rank)
    state = model.reducer.state_dict()
    with (
        _fault_on(0, runtime),
        pytest.raises((RuntimeError, HpcsyncError), match=r"planted|another"),
    ):
        _step(model, runtime.rank)
    if then == "closes":
        model.close()
        return
    if then == "saves":
        assert model.reducer.state_dict()["order"] == state["order"]
    else:
        model.reducer.load_state_dict(state)
    reference = _wrap(runtime)
    for mine, other in zip(_step(model, runtime.rank), _step(reference, runtime.rank), strict=True):
        torch.testing.assert_close(mine, other)


def test_no_rank_keeps_gradients_of_a_pass_that_was_given_up(runtime: Runtime) -> None:
    if runtime.size == 1:
        pytest.skip("needs another rank")
    model = _wrap(runtime)
    expected = _step(model, runtime.rank)
    with (
        _fault_on(0, runtime),
        pytest.raises((RuntimeError, HpcsyncError), match=r"planted|another"),
    ):
        _step(model, runtime.rank)
    # Not zeroed: what is left over would be added to.
    model(torch.full((2, 64), float(runtime.rank + 1))).backward()
    for param, other in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(param.grad, other)


def test_models_that_differ_are_told_again(runtime: Runtime) -> None:
    if runtime.size == 1:
        pytest.skip("needs another rank")
    model = _wrap(runtime)
    _step(model, runtime.rank)
    model.module.more = nn.Linear(4, 3 + runtime.rank)
    for _ in range(2):
        with pytest.raises(ModelError, match="the models differ between ranks"):
            model(torch.ones(2, 64))
    del model.module.more
    _step(model, runtime.rank)


def test_a_forward_pass_within_a_backward_pass_gives_up_nothing(runtime: Runtime) -> None:
    model = _wrap(runtime)
    values = torch.ones(2, 64, requires_grad=True)
    both = checkpoint(model, values, use_reentrant=True) + model(torch.ones(2, 64))
    with pytest.raises(ModelError, match="use_reentrant=False"):
        both.backward()


def test_a_fault_of_one_rank_is_an_error_on_all(runtime: Runtime) -> None:
    if runtime.size == 1:
        pytest.skip("needs another rank")
    module = nn.Linear(4, 4, device="meta" if runtime.rank == 1 else "cpu")
    with pytest.raises(ModelError, match=r"rank 1: parameter weight is on meta"):
        DataParallel(module, runtime=runtime)


def test_rebuilding_takes_no_more_shared_memory(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    before = Collectives.buffer

    def count(self, nbytes, *args, **more):
        taken.append(nbytes)
        return before(self, nbytes, *args, **more)

    monkeypatch.setattr(Collectives, "buffer", count)
    model = _wrap(runtime)
    first = model.reducer.buckets
    for _ in range(3):
        _step(model, runtime.rank)
    assert len(taken) == 1
    assert taken[0] < 2 * sum(param.numel() * 4 for param in model.parameters()) + 4096
    assert {name for plan in first for name in plan.params} == {
        name for plan in model.reducer.buckets for name in plan.params
    }


def test_counters_are_used_again(runtime: Runtime) -> None:
    collectives = Collectives(runtime, CommConfig())
    buffer = collectives.buffer(4096)
    kind = dtype_of("float32")
    for round_ in range(300):
        collective = collectives.allreduce(buffer, kind)
        buffer.own.view("float32")[:] = round_
        collective.start()
        collective.wait()
        assert (buffer.own.view("float32") == round_ * runtime.size).all()
        collective.close()
        MPI.COMM_WORLD.Barrier()


def test_a_closed_wrapper_leaves_a_plain_module(runtime: Runtime) -> None:
    model = _wrap(runtime)
    _step(model, runtime.rank)
    model.close()
    alone = _step(model, runtime.rank)
    plain = Net()
    plain(torch.full((2, 64), float(runtime.rank + 1))).backward()
    assert torch.equal(alone[0], plain.front.weight.grad)


@pytest.mark.parametrize("closes", [True, False])
def test_a_model_that_is_dropped_leaves_nothing_behind(runtime: Runtime, closes: bool) -> None:
    collectives = Collectives(runtime, CommConfig())
    model = DataParallel(Net(), runtime=runtime, collectives=collectives)
    _step(model, runtime.rank)
    left = [weakref.ref(each) for each in (model.reducer, *model.module.parameters())]
    if closes:
        model.close()
    del model
    gc.collect()
    assert [each() for each in left] == [None] * len(left)


def test_copies_hold_the_module_and_average_nothing(runtime: Runtime) -> None:
    model = _wrap(runtime)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    values = torch.ones(2, 64)
    assert torch.equal(twin(values), model(values))
    assert torch.equal(loaded(values), model(values))
    assert twin.module.front.weight.data_ptr() != model.module.front.weight.data_ptr()


def test_no_collective_after_the_end(runtime: Runtime) -> None:
    collectives = Collectives(runtime, CommConfig())
    buffer = collectives.buffer(64)
    collective = collectives.allreduce(buffer, dtype_of("float32"))
    collective.start()
    collective.wait()
    collectives.progress.close()
    with pytest.raises(HpcsyncError, match="closed"):
        collective.start()
