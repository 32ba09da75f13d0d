"""A module's tensors by name, those of several names once; and whether given ones fit it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .errors import CheckpointError


def untied(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A module's state without tensors that are another one's memory, and these: name -> the
    first's name."""
    found: dict[str, Any] = {}
    ties: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, value in state.items():
        found[name] = value
        if isinstance(value, Tensor) and value.numel():
            key = (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device)
            if (first := seen.setdefault(key, name)) != name:
                ties[name] = first
                del found[name]
    return found, ties


def check_weights(given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """CheckpointError unless both have the same names and shapes, telling the first that differ."""
    faults = [f"{name} is missing" for name in wanted if name not in given]
    faults += [f"{name} is not in this model" for name in given if name not in wanted]
    faults += [
        f"{name} has shape {_shape(given[name])}, not {_shape(value)}"
        for name, value in wanted.items()
        if name in given and _shape(given[name]) != _shape(value)
    ]
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(
            f"checkpoint: it is of another model: {'; '.join(faults[:3])}{more}; resume with the "
            "model of before, or take its weights by model.init_from"
        )


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None
