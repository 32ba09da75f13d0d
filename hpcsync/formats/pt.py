"""Files of ``torch.save``: a dict of tensors by name. Only tensors are read, never code."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpcsync.errors import UserError

# Where training scripts keep the weights among other things.
_PLACES = ("model", "state_dict", "model_state_dict", "module", "weights")


def read(path: Path) -> dict[str, Tensor]:
    """As ``Format.read``; of a dict that holds the weights under a usual key, the weights."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds more than tensors, and hpcsync runs no code from a file; where you "
            "trust it, save its state_dict() alone, or as safetensors"
        ) from error
    # torch tells damage by errors of many kinds.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: is damaged, or no file of torch.save: {reason}") from error
    return _tensors(loaded, path)


def write(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """As ``Format.write``; a plain dict of tensors, so there is no place for notes."""
    # A view would take the whole memory behind it along.
    whole = {
        name: each if each.untyped_storage().nbytes() == each.nbytes else each.clone()
        for name, each in tensors.items()
    }
    with path.open("wb") as file:
        torch.save(whole, file)


def _tensors(loaded: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(loaded, Mapping):
        raise UserError(
            f"{path}: holds a {type(loaded).__name__}, not tensors by name; save a state_dict()"
        )
    others = [name for name, value in loaded.items() if not isinstance(value, Tensor)]
    if others:
        places = [name for name in _PLACES if isinstance(loaded.get(name), Mapping)]
        if places:
            return _tensors(loaded[places[0]], path)
        raise UserError(
            f"{path}: {str(others[0])[:80]!r} is a {type(loaded[others[0]]).__name__}, not a "
            f"tensor; save a state_dict(), alone or under the key {_PLACES[0]!r}"
        )
    found: dict[str, Tensor] = {}
    for name, value in loaded.items():
        if not isinstance(name, str) or value.layout != torch.strided or value.is_quantized:
            raise UserError(f"{path}: {str(name)[:80]!r} is no dense tensor with a name")
        found[name] = value.detach()
    return found
