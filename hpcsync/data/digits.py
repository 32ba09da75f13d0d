"""The handwritten digits that scikit-learn ships: 1,797 grey pictures of 8 by 8."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hpcsync.data.base import Indices, Source, Unit
from hpcsync.errors import DataError

if TYPE_CHECKING:
    from hpcsync.config import DataConfig


def build(config: DataConfig, *, context: int, seed: int) -> Source:
    """Pictures as float32 (1, 8, 8) in [0, 1], targets 0 to 9; ``context`` is of no account.

    Raises ``DataError`` when scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as exc:
        raise DataError(
            "data.name = 'digits' needs scikit-learn: pip install hpcsync[digits]"
        ) from exc
    pixels, labels = load_digits(return_X_y=True)
    return Digits(
        torch.from_numpy(np.asarray(pixels, dtype=np.float32).reshape(-1, 1, 8, 8) / 16),
        torch.from_numpy(np.asarray(labels, dtype=np.int64)),
        config.val_fraction,
    )


class Digits:
    """Pictures and their labels in memory; evenly spread ones are held out, whatever the seed."""

    vocab = 0
    classes = 10
    sample_shape: tuple[int, ...] = (1, 8, 8)
    unit: Unit = "sample"
    tokens_per_sample = 1

    def __init__(self, pictures: Tensor, labels: Tensor, val_fraction: float) -> None:
        count = len(labels)
        held_out = min(max(1, round(count * val_fraction)), count - 1)
        # Neighbours in the set come from one writer: spread them over training and held-out.
        val = torch.arange(held_out) * count // held_out
        mask = torch.ones(count, dtype=torch.bool)
        mask[val] = False
        self._train = pictures[mask], labels[mask]
        self._val = pictures[val], labels[val]
        self.train_size = count - held_out
        self.val_size = held_out
        self.fingerprint = f"{zlib.crc32(pictures.numpy().tobytes()):08x}"
        self.description = f"handwritten digits: {count:,} pictures, {held_out} of them held out"

    def train_batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        return _take(self._train, indices)

    def val_batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        return _take(self._val, indices)


def _take(part: tuple[Tensor, Tensor], indices: Indices) -> tuple[Tensor, Tensor]:
    pictures, labels = part
    rows = torch.from_numpy(indices)
    return pictures[rows], labels[rows]
