"""Files of safetensors (Hugging Face): a header of names and shapes, then plain bytes."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from hpcsync.errors import UserError

_MISSING = "safetensors is not installed: pip install 'hpcsync[safetensors]'"


def read(path: Path) -> dict[str, Tensor]:
    """As ``Format.read``."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(f"{path}: {_MISSING}") from error
    try:
        found: dict[str, Tensor] = load_file(path, device="cpu")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{path}: is damaged, or no file of safetensors: {error}") from error
    return found


def write(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """As ``Format.write``; tensors that share memory are written once each."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError as error:
        raise UserError(f"--to: {path.name}: {_MISSING}") from error
    # The format has no views: each tensor needs bytes of its own.
    alone = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    try:
        save_file(
            {name: tensor.contiguous() for name, tensor in alone.items()},
            path,
            metadata={"format": "pt", **notes},
        )
    except KeyError as error:
        raise UserError(f"--to: {path.name}: safetensors has no dtype {error}; use .pt") from error
    except SafetensorError as error:  # of writing: full disks and the like
        raise OSError(errno.EIO, str(error)) from error
