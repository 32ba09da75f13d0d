"""What the reduced gradients do not tell of a rank's state: what its codecs hold back, buffers such
as running means, random generators. As arrays of bytes, and put back from them to the same bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ...gradients.reducer import Reducer
from .. import state
from .generators import Generators
from .records import Bytes


class Own(NamedTuple):
    """A rank's own state.

    Attributes:
        arrays: 1-D uint8; of stores and buffers the memory itself, not copies.
        meta: what they are, for JSON.
    """

    arrays: list[Bytes]
    meta: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


class OwnState:
    """Takes and puts back the state of one rank.

    Args:
        model: whose buffers count, as far as they are part of its ``state_dict``.
    """

    def __init__(self, model: nn.Module, reducer: Reducer) -> None:
        self._reducer = reducer
        self._generators = Generators()
        saved = model.state_dict()
        # The modules' own tables: a buffer may be replaced by another tensor.
        self._buffers = [
            (f"{prefix}.{key}" if prefix else key, module._buffers, key)
            for prefix, module in model.named_modules()
            for key in module._buffers
            if (f"{prefix}.{key}" if prefix else key) in saved
        ]

    def capture(self) -> Own:
        """The state as it is now."""
        stores = _stores(self._reducer)
        buffers = self._values()
        described = [
            [name, state.dtype_name(buffer.dtype), list(buffer.shape)]
            for name, buffer in buffers.items()
        ]
        random, plain = self._generators.capture()
        sizes = [[name, array.nbytes] for name, array in stores.items()]
        arrays = [*stores.values(), *map(_bytes, buffers.values()), *random]
        return Own(arrays, {"stores": sizes, "buffers": described, "random": plain})

    def fits(self, meta: Mapping[str, Any]) -> bool:
        """Whether the buckets, as they are now, have the stores of this state."""
        mine = [[name, array.nbytes] for name, array in _stores(self._reducer).items()]
        return bool(meta["stores"] == mine)

    def restore_stores(self, meta: Mapping[str, Any], data: Bytes) -> None:
        """Put back what codecs held back, if ``fits``."""
        at = 0
        fields: dict[str, Bytes] = {}
        for name, nbytes in meta["stores"]:
            fields[name] = data[at : at + nbytes]
            at += nbytes
        for number, (bucket, held) in enumerate(self._reducer.held):
            memory = held.store.memory()
            for field, array in memory.items():
                array.view(np.uint8)[:] = fields[_name(bucket, number, field)]
            for field in () if memory else held.store.fields:
                values = fields[_name(bucket, number, field)].copy()
                held.store.write(field, values.view(np.float32))

    def restore_rest(self, meta: Mapping[str, Any], data: Bytes) -> None:
        """Put back buffers and random generators.

        Raises:
            CheckpointError: buffers of other names or shapes.
        """
        at = sum(nbytes for _, nbytes in meta["stores"])
        tensors: dict[str, Tensor] = {}
        for name, dtype, shape in meta["buffers"]:
            kind = state.torch_dtype(dtype)
            nbytes = math.prod(shape) * kind.itemsize
            tensors[name] = (
                torch.from_numpy(data[at : at + nbytes].copy()).view(kind).reshape(shape)
            )
            at += nbytes
        here = self._values()
        if {n: b.shape for n, b in here.items()} != {n: b.shape for n, b in tensors.items()}:
            raise CheckpointError("replay log: this model has other buffers than the one logged")
        for name, buffer in here.items():
            buffer.copy_(tensors[name])
        self._generators.restore(meta["random"], data[at:])

    def _values(self) -> dict[str, Tensor]:
        found = ((name, table[key]) for name, table, key in self._buffers)
        return {name: tensor.detach() for name, tensor in found if tensor is not None}


def _stores(reducer: Reducer) -> dict[str, Bytes]:
    """The memory of all stores, or what they tell where it is not to be had."""
    found: dict[str, Bytes] = {}
    for number, (bucket, held) in enumerate(reducer.held):
        store = held.store
        fields = store.memory() or {field: store.read(field) for field in store.fields}
        for field, array in fields.items():
            found[_name(bucket, number, field)] = array.view(np.uint8)
    return found


def _name(bucket: int, number: int, field: str) -> str:
    return f"{bucket}/{number}/{field}"


def _bytes(tensor: Tensor) -> Bytes:
    plain = tensor.contiguous().cpu().reshape(-1)
    found: Bytes = plain.view(torch.uint8).numpy() if plain.numel() else np.empty(0, np.uint8)
    return found
