"""A checkpoint as people name it, by its own folder or its run's, and the weights in it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError
from . import folder
from .reader import Checkpoint


def locate(path: Path) -> Path:
    """The folder of a checkpoint: ``path`` itself, or the newest of the run.

    Args:
        path: of a checkpoint, a run, or a run's folder of checkpoints.

    Raises:
        CheckpointError: there is none.
    """
    if (path / folder.MANIFEST).exists():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; name a run's folder, or a checkpoint's")
    place = checkpoints_of(path)
    steps = folder.steps(place)
    if not steps:
        raise CheckpointError(f"{path}: holds no checkpoint; see checkpoint.every and at_end")
    return place / folder.step_name(steps[-1])


def checkpoints_of(path: Path) -> Path:
    """The folder of checkpoints in a run's folder, or ``path`` if that is one."""
    inside = path / folder.FOLDER
    return inside if inside.is_dir() else path


def model(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Weights and buffers of the model by name; those that are one tensor share memory.

    Raises:
        CheckpointError: it holds none, or is damaged.
    """
    absent = CheckpointError(f"{checkpoint.folder}: holds no weights of a model")
    if not isinstance(checkpoint.manifest.common, dict):
        raise absent
    tree = checkpoint.common("model", "ties")
    found, ties = tree.get("model"), tree.get("ties", {})
    if not isinstance(found, dict) or not isinstance(ties, dict) or not found:
        raise absent
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if len(tensors) != len(found) or not set(ties.values()) <= set(found):
        raise absent
    return tensors | {name: tensors[first] for name, first in ties.items()}
