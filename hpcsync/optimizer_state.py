"""An optimizer's state by field and parameter's name, in place of torch's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import CheckpointError
from .onebit_adam import OneBitAdam


def by_name(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """The state of each parameter of the model, by field and name; the tensors are its own."""
    found: dict[str, dict[str, Any]] = {}
    names = _names(model)
    for param, fields in optimizer.state.items():
        for field, value in fields.items():
            found.setdefault(field, {})[names[param]] = value
    return found


def by_number(
    model: nn.Module, optimizer: Optimizer, fields: Mapping[str, Mapping[str, Any]]
) -> dict[int, dict[str, Any]]:
    """The same as torch counts the optimizer's parameters.

    Raises:
        CheckpointError: it belongs to another model or optimizer.
    """
    names = _names(model)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    places = {names[param]: (index, param) for index, param in enumerate(params)}
    kept: dict[int, dict[str, Any]] = {}
    for field, values in fields.items():
        for name, value in values.items():
            place = places.get(name)
            sized = isinstance(value, Tensor) and value.ndim
            if place is None or (sized and value.shape != place[1].shape):
                raise CheckpointError(
                    f"checkpoint: optimizer/{field}/{name} is of no parameter that is trained "
                    "here; resume with the model of before"
                )
            kept.setdefault(place[0], {})[field] = value
    if "exp_avg_sq" not in fields and not isinstance(optimizer, OneBitAdam) and fields:
        raise CheckpointError(
            "checkpoint: its optimizer is onebit_adam, past the freeze, whose variance AdamW "
            "cannot take up; resume with train.optimizer=onebit_adam"
        )
    return kept


def _names(model: nn.Module) -> dict[Tensor, str]:
    return {param: name for name, param in model.named_parameters()}
