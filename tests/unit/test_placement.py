"""Where a module's gradients are exchanged: on one device, that of when it was wrapped."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcsync import assembly, binding
from hpcsync import config as configs
from hpcsync.device import CpuDevice, Device
from hpcsync.errors import ModelError, UserError
from hpcsync.gradients.checks import check_same
from hpcsync.gradients.norms import total_norm
from hpcsync.parallel.placement import device_of, get


class Alone:
    """A job of one rank."""

    def bcast(self, value: Any) -> Any:
        return value

    def allreduce_scalar(self, values: list[float], op: str = "sum") -> list[float]:
        return values

    def agree(self, problem: Exception | None) -> None:
        if problem is not None:
            raise problem


def on(place: str) -> Any:
    """A parameter that says where it is."""
    return SimpleNamespace(
        device=torch.device(place), requires_grad=True, shape=(2,), dtype=torch.float32
    )


def refused(*places: str, device: Device | None = None) -> str:
    named = [(f"p{index}", on(place)) for index, place in enumerate(places)]
    with pytest.raises(ModelError) as told:
        check_same(Alone(), named, device)  # type: ignore[arg-type]
    return str(told.value)


def test_all_on_one_device() -> None:
    check_same(Alone(), [("p", on("cuda:1")), ("q", on("cuda:1"))])  # type: ignore[arg-type]
    assert "p1 is on cuda:1, but p0 on cuda:0; move the whole model" in refused("cuda:0", "cuda:1")
    assert "p1 is on cpu, but p0 on cuda:0" in refused("cuda:0", "cpu")
    assert "p0 is on meta, where gradients cannot be exchanged" in refused("meta")


def test_a_model_that_moves_after_it_was_wrapped() -> None:
    assert "in the memory of cpu when the model was wrapped" in refused("cuda:0", device=get("cpu"))
    gpu: Any = SimpleNamespace(name="cuda")
    assert "is in host memory, but was on cuda" in refused("cpu", device=gpu)
    check_same(Alone(), [("p", on("cuda:0"))], gpu)  # type: ignore[arg-type]


def test_the_device_of_a_module() -> None:
    assert isinstance(device_of(nn.Linear(2, 2).parameters()), CpuDevice)
    assert isinstance(device_of([]), CpuDevice)
    assert isinstance(device_of([torch.empty(2, device="meta")]), CpuDevice)
    assert device_of([torch.ones(1)]) is get("cpu")


@pytest.mark.parametrize("kinds", [("float32",), ("float32", "float64"), ("float16", "float32")])
def test_a_norm_is_that_of_norms_in_order(kinds: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    grads: list[Tensor] = [
        torch.randn(17 * (n + 1), 3).t().to(getattr(torch, kinds[n % len(kinds)])) for n in range(6)
    ]
    wide = [each.float() if each.dtype == torch.float16 else each for each in grads]
    expected = torch.linalg.vector_norm(torch.cat([each.norm().view(1) for each in wide]))
    found = total_norm(grads)
    assert found.dtype == expected.dtype
    assert torch.allclose(found, expected, rtol=1e-6)
    assert total_norm([]) == 0


def test_what_a_run_on_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="cuda", queued=True, profiled=False)
    asked = []

    def choose(runtime: Any, wanted: str, *, share: bool) -> tuple[str, int]:
        asked.append((wanted, share))
        return "cuda", 3

    monkeypatch.setattr(binding, "choose", choose)
    monkeypatch.setattr(assembly.placement, "get", lambda name, index: gpu)
    signals: Any = SimpleNamespace(received=0)
    runtime: Any = Alone()
    config = configs.load(None, ["train.device=cuda", "trace.nvtx=true"])
    assert assembly._device(runtime, config, signals) is gpu
    assert asked == [("cuda", False)]
    assert gpu.profiled
    logged = configs.load(None, ["checkpoint.replay_log=true"])
    with pytest.raises(UserError, match=r"^checkpoint\.replay_log: .* train\.device=cpu$"):
        assembly._device(runtime, logged, signals)
    assert not gpu.profiled
