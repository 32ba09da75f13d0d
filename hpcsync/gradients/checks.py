"""What a model must be for its gradients to be exchanged."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..device import dtype_of
from ..errors import ModelError
from ..launch import Runtime


def check_same(runtime: Runtime, named: Sequence[tuple[str, Tensor]]) -> None:
    """All ranks must have the same tensors, or an exchange would mix them up; collective.

    Raises:
        ModelError: on every rank, if names, shapes, dtypes or their order differ on any, or a
            lazy module has not made its parameters yet.
    """
    for name, each in named:
        if nn.parameter.is_lazy(each):
            raise ModelError(f"{name} has no shape yet; pass a batch through the model first")
    mine = [
        f"{name} {tuple(each.shape)} {each.dtype}{'' if each.requires_grad else ' (no gradient)'}"
        for name, each in named
    ]
    reference = runtime.bcast(mine)
    problem: ModelError | None = None
    if mine != reference:
        pairs = zip([*mine, "nothing"], [*reference, "nothing"], strict=False)
        here, there = next(pair for pair in pairs if pair[0] != pair[1])
        problem = ModelError(
            f"the models differ between ranks: {here} here, {there} on rank 0; build the same "
            "model on every rank"
        )
    runtime.agree(problem)


def check_usable(name: str, param: nn.Parameter) -> None:
    """Gradients of the parameter must be in host memory and of a dtype that can be added.

    Raises:
        ModelError: they are not.
    """
    if param.device.type != "cpu":
        raise ModelError(
            f"parameter {name} is on {param.device}; this version trains in host memory: "
            "move the model with model.cpu()"
        )
    try:
        dtype_of(param.dtype)
    except ValueError as error:
        raise ModelError(f"parameter {name}: {error}") from None
