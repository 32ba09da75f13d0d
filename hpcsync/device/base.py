"""The contract of a device, and the element types that it can add."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class DType:
    """An element type: how it is stored and in what it is added.

    Attributes:
        name: as torch and NumPy call it, e.g. ``bfloat16``.
        storage: the NumPy type of its bytes (``uint16`` for bfloat16, which NumPy lacks).
        accumulate: the NumPy type in which sums are made; low precision is added in float32.
        maximum: a reduction takes the largest value in place of the sum; int32 only.
    """

    name: str
    storage: np.dtype[Any]
    accumulate: np.dtype[Any]
    maximum: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return int(self.storage.itemsize)

    @property
    def floating(self) -> bool:
        return self.accumulate.kind == "f"


def _plain(name: str) -> DType:
    return DType(name, np.dtype(name), np.dtype(name))


_DTYPES = {
    "bfloat16": DType("bfloat16", np.dtype("uint16"), np.dtype("float32")),
    "float16": DType("float16", np.dtype("float16"), np.dtype("float32")),
    "int32 max": DType("int32 max", np.dtype("int32"), np.dtype("int32"), maximum=True),
    **{
        name: _plain(name)
        for name in ("float32", "float64", "int8", "uint8", "int16", "int32", "int64")
    },
}


def dtype_of(kind: object) -> DType:
    """The DType of a name, a NumPy dtype or a torch dtype.

    Raises:
        ValueError: elements of that type cannot be added here.
    """
    name = kind if isinstance(kind, str) else str(kind).removeprefix("torch.")
    if name not in _DTYPES:
        with contextlib.suppress(TypeError):
            name = np.dtype(kind).name  # type: ignore[call-overload]
    if name not in _DTYPES:
        known = ", ".join(each.name for each in _DTYPES.values() if not each.maximum)
        raise ValueError(f"dtype {name} cannot be reduced; use one of: {known}")
    return _DTYPES[name]


class Device(ABC):
    """Arithmetic on flat arrays of one device's memory."""

    name: str

    @abstractmethod
    def reduce(
        self, outs: Sequence[Array], sources: Sequence[Array], dtype: DType, divisor: int = 1
    ) -> None:
        """Write ``(sources[0] + sources[1] + ...) / divisor`` to every array of ``outs``.

        The additions are made from left to right in ``dtype.accumulate`` and rounded once; a type
        with ``maximum`` takes the largest value instead.
        Arrays are 1-D, of equal length and of ``dtype.storage``; an output may be one of the
        sources. Integers have no divisor.
        """

    @abstractmethod
    def copy(self, out: Array, source: Array) -> None:
        """Copy ``source`` to ``out``; both 1-D, of equal length and type."""
