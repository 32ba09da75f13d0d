"""Host memory that pieces of a state are copied into while training stands still.

The memory is taken and touched once, and reused, so that a snapshot is a plain copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .layout import Piece, TensorMeta
from .state import meta

_ALIGN = 64


class Filled(NamedTuple):
    """A piece and its bytes.

    Attributes:
        data: 1-D uint8, contiguous, of ``piece.nbytes``.
    """

    piece: Piece
    data: NDArray[np.uint8]


class HostBuffer:
    """Memory for one snapshot; it grows when more is asked for.

    Args:
        pinned: page-locked, for copies from a GPU.
    """

    def __init__(self, pinned: bool = False) -> None:
        self._pinned = pinned
        self._memory = torch.empty(0, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        return int(self._memory.shape[0])

    def reserve(self, pieces: Sequence[Piece]) -> None:
        """Take what these need, so that the first snapshot is as quick as the others."""
        size = sum(_padded(piece.nbytes) for piece in pieces)
        if size > self.nbytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old goes before the new comes
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned).zero_()

    def fill(self, tensors: Mapping[str, Tensor], pieces: Sequence[Piece]) -> list[Filled]:
        """Copy pieces of tensors; they stay as they are until the next call."""
        self.reserve(pieces)
        at, found, devices = 0, [], set()
        with torch.no_grad():
            for piece in pieces:
                source = tensors[piece.name]
                bytes_ = self._memory[at : at + piece.nbytes]
                _copy(source, meta(piece.name, source), piece, bytes_)
                devices.add(source.device)
                found.append(Filled(piece, bytes_.numpy()))
                at += _padded(piece.nbytes)
        for device in devices:
            if device.type != "cpu":
                torch.accelerator.current_stream(device).synchronize()
        return found


def view(tensor: Tensor) -> NDArray[np.uint8]:
    """The bytes of a contiguous tensor in host memory, 1-D; they share its memory."""
    flat: Any = tensor.reshape(-1).view(torch.uint8)
    found: NDArray[np.uint8] = flat.numpy()
    return found


def _copy(source: Tensor, of: TensorMeta, piece: Piece, bytes_: Tensor) -> None:
    part = source.narrow(of.axis, piece.start, piece.rows) if of.shape else source
    target = bytes_.view(source.dtype).view(of.part(piece.rows))
    target.copy_(part, non_blocking=True)


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN
