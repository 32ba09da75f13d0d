"""Values and buffers follow rank 0."""

from __future__ import annotations

import pytest
import torch

from hpcsync.models.convnet import ConvNet
from tests.replicas import (
    RANK,
    Perceptron,
    Wrap,
    close,
    convnet,
    convnet_loss,
    made,
    pictures,
    same_on_all_ranks,
    weights,
)

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("one_thread")]


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
