"""What a data source is, and the part that all sources of tokens share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpcsync.errors import DataError

Unit = Literal["byte", "token", "sample"]
Indices = NDArray[np.int64]


class Source(Protocol):
    """Samples to train on and samples held out, by index.

    A factory ``build(config: DataConfig, *, context: int, seed: int, **options) -> Source`` makes
    one; every rank must get the same samples under the same indices.
    """

    vocab: int
    """Number of distinct tokens; 0 when samples are not tokens."""
    classes: int
    """Number of values a target takes, for tokens the vocabulary."""
    sample_shape: tuple[int, ...]
    """Shape of one sample's inputs: (context,) for tokens."""
    unit: Unit
    """What one target is: held-out loss is told in bits per this."""
    tokens_per_sample: int
    """Targets of one sample."""
    train_size: int
    """Samples to train on."""
    val_size: int
    """Samples held out."""

    def train_batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Inputs (n, *sample_shape) and int64 targets (n, context) or (n,), on the CPU."""
        ...

    def val_batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """As ``train_batch``, of the samples held out."""
        ...


class TokenSource:
    """Tokens cut into samples of ``context + 1``; those from ``split`` on are held out.

    Samples share no token, so training never sees what is held out. Inputs and targets are int64
    of shape (n, context), the targets one token ahead. ``read(lo, hi)`` returns tokens
    ``[lo, hi)`` as an array of any unsigned type. ``what`` names the stream in error messages.
    """

    def __init__(
        self,
        read: Callable[[int, int], NDArray[Any]],
        length: int,
        *,
        split: int,
        context: int,
        vocab: int,
        unit: Unit,
        what: str,
        fingerprint: str,
    ) -> None:
        self._read = read
        self._split = split
        self._window = context + 1
        self._what = what
        self.vocab = self.classes = vocab
        self.sample_shape: tuple[int, ...] = (context,)
        self.unit = unit
        self.tokens_per_sample = context
        self.train_size = split // self._window
        self.val_size = (length - split) // self._window
        self.fingerprint = fingerprint
        self.description = (
            f"{what}: {length:,} {unit}s, {length - split:,} of them held out, "
            f"samples of {context} {unit}s"
        )

    def train_batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        return self._batch(indices, 0, self.train_size)

    def val_batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        return self._batch(indices, self._split, self.val_size)

    def _batch(self, indices: Indices, start: int, size: int) -> tuple[Tensor, Tensor]:
        batch = np.empty((len(indices), self._window), dtype=np.int64)
        for row, index in zip(batch, indices.tolist(), strict=True):
            if not 0 <= index < size:
                raise IndexError(f"sample {index} of {size}")
            lo = start + index * self._window
            row[:] = self._read(lo, lo + self._window)
        if batch.size and batch.max() >= self.vocab:
            raise DataError(
                f"{self._what} holds token {batch.max()}, but its vocabulary is {self.vocab}: "
                "correct the attribute 'vocab' of the dataset"
            )
        tokens = torch.from_numpy(batch)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def split_point(length: int, *, context: int, val_fraction: float, unit: Unit, what: str) -> int:
    """Where the held-out tail of a stream begins: ``val_fraction`` of its samples, at least one.

    Raises ``DataError`` when the stream has not one sample to train on and one to hold out.
    """
    window = context + 1
    samples = length // window
    if samples < 2:
        raise DataError(
            f"{what} holds {length:,} {unit}s, but training needs at least two samples of "
            f"model.context + 1 = {window} {unit}s, one of them held out: "
            "give more data or lower model.context"
        )
    held_out = min(max(1, round(samples * val_fraction)), samples - 1)
    return (samples - held_out) * window


def fingerprint(source: Source) -> str:
    """Equal on ranks that have the same samples; a source of the user's may have an attribute
    ``fingerprint``, otherwise only its sizes are told."""
    own = getattr(source, "fingerprint", "")
    return f"{own}:{source.train_size}:{source.val_size}:{source.sample_shape}"


def describe(source: Source) -> str:
    """One line for people: a source's ``description`` if it has one, otherwise its sizes."""
    own = getattr(source, "description", "")
    return own or (
        f"{type(source).__name__}: {source.train_size:,} samples and {source.val_size:,} held out"
    )
