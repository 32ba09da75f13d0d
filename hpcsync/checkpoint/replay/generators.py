"""Random generators as bytes, every step: what did not change is not taken anew."""

from __future__ import annotations

import ctypes
import random
from typing import Any

import numpy as np
import torch

from .. import random_state
from .records import Bytes


class Generators:
    """Those of this process: Python's, NumPy's, torch's, and those of its devices."""

    def __init__(self) -> None:
        self._marks: tuple[Any, ...] = ()
        self._state: dict[str, Any] = {}

    def capture(self) -> tuple[list[Bytes], dict[str, Any]]:
        """Where they stand: arrays of bytes, and plain values for JSON."""
        marks = (random.getstate(), _numpy_words())
        if marks != self._marks or marks[1] is None:
            self._marks, self._state = marks, random_state.capture()
            if self._state["numpy"]["has_gauss"]:  # taken without a trace in the words
                self._marks = ()
        python, numpy = self._state["python"], self._state["numpy"]
        cuda = torch.cuda.get_rng_state_all() if self._state["cuda"] else []
        tensors = [torch.get_rng_state(), *cuda]
        arrays = [
            python["words"].view(np.uint8),
            numpy["keys"].view(np.uint8),
            *(tensor.numpy() for tensor in tensors),
        ]
        plain = {
            "python": [python["version"], python["gauss"]],
            "numpy": [numpy[key] for key in ("name", "position", "has_gauss", "gauss")],
            "sizes": [array.nbytes for array in arrays],
        }
        return arrays, plain

    def restore(self, plain: dict[str, Any], data: Bytes) -> None:
        """Put them there."""
        parts, at = [], 0
        for nbytes in plain["sizes"]:
            parts.append(data[at : at + nbytes].copy())
            at += nbytes
        words, keys, own, *cuda = parts
        version, gauss = plain["python"]
        name, position, has_gauss, cached = plain["numpy"]
        self._marks = ()
        random_state.restore(
            {
                "python": {"version": version, "words": words.view(np.uint32), "gauss": gauss},
                "numpy": {
                    "name": name,
                    "keys": keys.view(np.uint32),
                    "position": position,
                    "has_gauss": has_gauss,
                    "gauss": cached,
                },
                "torch": torch.from_numpy(own),
                "cuda": [torch.from_numpy(each) for each in cuda],
            }
        )


def _numpy_words() -> bytes | None:
    """The words of NumPy's generator, straight from its memory: ``get_state`` takes a sixth of a
    millisecond. None if it is of an unknown kind."""
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if not isinstance(generator, np.random.MT19937):
        return None
    # 624 words and the position among them: the head of numpy's mt19937_state.
    return ctypes.string_at(generator.ctypes.state_address, 4 * 625)
