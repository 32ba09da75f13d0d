"""What a model must be for its gradients to be exchanged."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..device import DEVICES, Device, dtype_of
from ..errors import ModelError
from ..launch import Runtime


def check_same(
    runtime: Runtime, named: Sequence[tuple[str, Tensor]], device: Device | None = None
) -> None:
    """All ranks must have the same tensors, or an exchange would mix them up; collective.

    Args:
        device: that they have to be on; any if not given.

    Raises:
        ModelError: on every rank, if names, shapes, dtypes or their order differ on any, if a
            lazy module has not made its parameters yet, or if a gradient could not be exchanged.
    """
    # A rank that finds a fault of its own goes on to where all ranks meet.
    problem = next((fault for name, each in named if (fault := _fault(name, each))), None)
    problem = problem or _misplaced(named, device)
    mine = [_describe(name, each) for name, each in named]
    reference = runtime.bcast(mine)
    if problem is None and mine != reference:
        pairs = zip([*mine, "nothing"], [*reference, "nothing"], strict=False)
        here, there = next(pair for pair in pairs if pair[0] != pair[1])
        problem = ModelError(
            f"the models differ between ranks: {here} here, {there} on rank 0; build the same "
            "model on every rank"
        )
    runtime.agree(problem)


def _describe(name: str, each: Tensor) -> str:
    shape = "lazy" if nn.parameter.is_lazy(each) else tuple(each.shape)
    return f"{name} {shape} {each.dtype}{'' if each.requires_grad else ' (no gradient)'}"


def _fault(name: str, each: Tensor) -> ModelError | None:
    """Why the tensor's gradient cannot be exchanged, if it is to have one."""
    if nn.parameter.is_lazy(each):
        return ModelError(f"{name} has no shape yet; pass a batch through the model first")
    if not each.requires_grad:
        return None
    try:
        dtype_of(each.dtype)
    except ValueError as error:
        return ModelError(f"parameter {name}: {error}")
    return None


def _misplaced(named: Sequence[tuple[str, Tensor]], device: Device | None) -> ModelError | None:
    """Why gradients cannot be exchanged where the tensors are."""
    trained = [(name, each.device) for name, each in named if each.requires_grad]
    for name, place in trained:
        first, where = trained[0]
        if place.type != "cpu" and place.type not in DEVICES:
            return ModelError(
                f"parameter {name} is on {place}, where gradients cannot be exchanged; move the "
                "model with model.cpu() or model.cuda()"
            )
        if place != where:
            return ModelError(
                f"parameter {name} is on {place}, but {first} on {where}; move the whole model to "
                "one device"
            )
        if device is not None and place.type != "cpu" and place.type != device.name:
            return ModelError(
                f"parameter {name} is on {place}, but was in the memory of {device.name} when the "
                "model was wrapped; move the model first, and wrap it then"
            )
        if device is not None and place.type == "cpu" and device.name in DEVICES:
            return ModelError(
                f"parameter {name} is in host memory, but was on {device.name} when the model was "
                "wrapped; move the model first, and wrap it then"
            )
    return None
