"""One step of training against a plain torch loop, on one rank."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from hpcsync.config import TrainConfig
from hpcsync.engine import Engine
from hpcsync.errors import NonFiniteError, UserError
from hpcsync.exhausted import ExhaustedError, is_out_of_memory, memory_errors
from hpcsync.models import compile_model
from hpcsync.optimizers import make_optimizer
from hpcsync.rules import LossScale, learning_rate
from tests import alone


class Net(alone.Net):
    """``poison`` multiplies the loss."""

    poison = 1.0

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return super().forward(inputs, targets) * self.poison


def make(**settings: object) -> Engine:
    torch.manual_seed(1)
    net = Net()
    config = TrainConfig(**{"steps": 20, "warmup": 2, "lr": 1e-2, **settings})  # type: ignore[arg-type]
    return Engine(net, make_optimizer(net, config), alone.Alone(net), config)


def batches(steps: int, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    inputs = [torch.randn(size, 6, generator=generator) for _ in range(steps)]
    return [(x, x.sum(1, keepdim=True)) for x in inputs]


def weights(engine: Engine) -> Tensor:
    return torch.cat([p.detach().flatten() for p in engine.model.parameters()])


def test_steps_are_those_of_a_plain_loop() -> None:
    engine = make(clip_norm=0.5)
    torch.manual_seed(1)
    plain = Net()
    matrices = [p for p in plain.parameters() if p.ndim > 1]
    vectors = [p for p in plain.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for step, batch in enumerate(batches(10)):
        result = engine.step([batch])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(engine.config, step)
        optimizer.zero_grad()
        loss = plain(*batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        assert result.loss == pytest.approx(loss.item(), rel=1e-6)
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-5)
        assert result.step == step + 1
    expected = torch.cat([p.detach().flatten() for p in plain.parameters()])
    torch.testing.assert_close(weights(engine), expected, rtol=1e-5, atol=1e-6)


def test_accumulated_micro_batches_make_the_same_step() -> None:
    whole, parts = make(), make()
    for inputs, targets in batches(5):
        one = whole.step([(inputs, targets)])
        two = parts.step(list(zip(inputs.split(2), targets.split(2), strict=True)))
        assert two.loss == pytest.approx(one.loss, rel=1e-5)
        assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-5, atol=1e-6)
    assert whole.data_parallel.quiet == 0  # type: ignore[attr-defined]
    assert parts.data_parallel.quiet == 5 * 3  # type: ignore[attr-defined]


def test_a_power_of_two_on_the_loss_changes_nothing() -> None:
    plain, scaled = make(), make(loss_scale=1024.0)
    for batch in batches(5):
        one, two = plain.step([batch]), scaled.step([batch])
        assert (two.loss, two.grad_norm) == (one.loss, one.grad_norm)
        assert two.loss_scale == 1024
    assert torch.equal(weights(scaled), weights(plain))


def test_bf16_computes_in_bf16_and_keeps_weights_in_fp32() -> None:
    seen: list[torch.dtype] = []
    engine = make(precision="bf16")
    engine.model.inner.register_forward_hook(  # type: ignore[union-attr,operator]
        lambda module, inputs, output: seen.append(output.dtype)
    )
    first, *_, last = [engine.step([batch]).loss for batch in batches(20)]
    assert last < first
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in engine.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_gradients_that_are_not_finite_skip_the_step(value: float) -> None:
    engine = make(max_skipped=2, loss_scale="dynamic")
    engine.step([batches(1)[0]])
    before, scale = weights(engine), engine.scale.value
    engine.model.inner.weight.register_hook(lambda grad: grad * value)  # type: ignore[union-attr,operator]
    result = engine.step([batches(1)[0]])
    assert result.skipped
    assert math.isfinite(result.loss)
    assert not math.isfinite(result.grad_norm)
    assert torch.equal(weights(engine), before)
    assert engine.scale.value == scale / 2
    engine.step([batches(1)[0]])
    engine.check_skipped()
    engine.step([batches(1)[0]])
    with pytest.raises(NonFiniteError, match=r"step 4: .* 3 steps in a row"):
        engine.check_skipped()
    assert engine.skipped == 3


def test_a_good_step_starts_the_count_anew() -> None:
    engine = make(max_skipped=1)
    good = batches(1)[0]
    for poison in (1.0, math.inf, 1.0, math.inf, 1.0):
        hook = engine.model.inner.weight.register_hook(lambda grad, by=poison: grad * by)  # type: ignore[union-attr,operator]
        engine.step([good])
        engine.check_skipped()
        hook.remove()
    assert (engine.skipped, engine.skipped_in_row) == (2, 0)


def test_a_loss_of_nan_is_given_back_to_be_agreed_on() -> None:
    engine = make(max_skipped=0)
    engine.model.poison = math.nan  # type: ignore[assignment]
    result = engine.step([batches(1)[0]])
    assert math.isnan(result.loss)
    assert result.skipped


def test_a_restored_engine_goes_on_with_the_same_bits() -> None:
    data = batches(8)
    through = make(loss_scale="dynamic")
    losses = [through.step([batch]).loss for batch in data]
    first = make(loss_scale="dynamic")
    for batch in data[:4]:
        first.step([batch])
    second = make(loss_scale="dynamic")
    torch.manual_seed(99)
    nn.init.normal_(second.model.inner.weight)  # type: ignore[union-attr,arg-type]
    second.load_state_dict(first.state_dict())
    assert [second.step([batch]).loss for batch in data[4:]] == losses[4:]
    assert torch.equal(weights(second), weights(through))


def test_evaluation_weighs_samples_alike_and_changes_nothing() -> None:
    engine = make()
    inputs, targets = batches(1)[0]
    before = weights(engine)
    total, count = engine.evaluate([(inputs[:5], targets[:5]), (inputs[5:], targets[5:])])
    expected = engine.model(inputs, targets).item()
    assert count == 8
    assert total / count == pytest.approx(expected, rel=1e-6)
    assert torch.equal(weights(engine), before)
    assert engine.model.training


def test_evaluation_of_an_empty_share() -> None:
    assert make().evaluate([]) == (0.0, 0)


def test_frozen_parameters_stay() -> None:
    torch.manual_seed(1)
    net = Net()
    net.inner.weight.requires_grad_(False)
    config = TrainConfig(warmup=0)
    engine = Engine(net, make_optimizer(net, config), alone.Alone(net), config)
    before = net.inner.weight.clone()
    engine.step([batches(1)[0]])
    assert torch.equal(net.inner.weight, before)


def test_nothing_to_train_is_the_users_error() -> None:
    net = Net().requires_grad_(False)
    with pytest.raises(UserError, match="nothing to train"):
        make_optimizer(net, TrainConfig())


def test_learning_rate_warms_up_and_falls() -> None:
    config = TrainConfig(steps=100, warmup=10, lr=1.0, min_lr=0.1)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert all(b > a for a, b in itertools.pairwise(rates[:10]))


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 20), (2, 1), (5, 5), (3, 100)])
def test_learning_rate_of_short_runs(steps: int, warmup: int) -> None:
    config = TrainConfig(steps=steps, warmup=warmup, lr=1.0)
    assert all(0 < learning_rate(config, step) <= 1 for step in range(steps + 2))


def test_dynamic_scale_grows_after_many_good_steps() -> None:
    scale = LossScale("dynamic")
    start = scale.value
    for _ in range(2000):
        scale.update(True)
    assert scale.value == 2 * start
    for _ in range(100):
        scale.update(False)
    assert scale.value > 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
)
def test_out_of_memory_is_one_line(error: Exception) -> None:
    assert is_out_of_memory(error)
    said = r"step 3: out of memory .*train\.accumulate"
    with pytest.raises(ExhaustedError, match=said) as caught, memory_errors("step 3"):
        raise error
    assert "\n" not in str(caught.value)


def test_real_exhaustion_is_recognised() -> None:
    with pytest.raises(ExhaustedError, match="out of memory"), memory_errors("model"):
        torch.empty(1 << 60)


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_errors("step 1"):
        raise RuntimeError("shapes differ")


def test_compiling_is_by_blocks_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *a, **k: compiled.append(self))
    net = Net()
    compile_model(net)
    assert compiled == [net]
    net.blocks = lambda: [net.inner]  # type: ignore[method-assign,assignment]
    compile_model(net)
    assert compiled == [net, net.inner]


def test_a_new_loss_scale_is_told_to_what_codecs_hold_back() -> None:
    engine = make(loss_scale="dynamic")
    engine.model.poison = math.inf
    engine.step(batches(1))
    assert engine.data_parallel.factors == [0.5]
    engine.model.poison = 1.0
    engine.step(batches(1))
    assert engine.data_parallel.factors == [0.5]
