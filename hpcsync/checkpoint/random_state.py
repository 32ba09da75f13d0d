"""The random generators of a process: Python's, NumPy's, torch's, and those of its devices."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """Where they stand: plain values, arrays and tensors."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if _uses_cuda() else []
    return {
        "python": {"version": version, "words": np.array(words, np.uint32), "gauss": gauss},
        "numpy": {
            "name": name,
            "keys": np.array(keys, np.uint32),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def restore(state: dict[str, Any]) -> None:
    """Put them there; of devices that this process has."""
    python, numpy = state["python"], state["numpy"]
    words = tuple(map(int, np.asarray(python["words"])))
    random.setstate((python["version"], words, python["gauss"]))
    keys = np.asarray(numpy["keys"], np.uint32)
    np.random.set_state(
        (numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["gauss"])
    )
    torch.set_rng_state(state["torch"])
    if _uses_cuda():
        for device, found in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(found, device)


def seed(value: int) -> None:
    """Seed all of them by 64 bits."""
    random.seed(value)
    np.random.seed([value & 0xFFFFFFFF, value >> 32])
    torch.manual_seed(value)


def _uses_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
