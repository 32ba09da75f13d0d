"""Files of tensors that other programs read and write, by their suffix."""

from __future__ import annotations

import importlib
from pathlib import Path

from hpcsync.formats.base import Format, aside

__all__ = ["SUFFIXES", "Format", "aside", "of"]

SUFFIXES = {
    ".pt": "hpcsync.formats.pt",
    ".pth": "hpcsync.formats.pt",
    ".safetensors": "hpcsync.formats.safetensors",
}


def of(path: Path) -> Format | None:
    """The format of a file, by its name; None if there is no such."""
    name = SUFFIXES.get(path.suffix.lower())
    if name is None:
        return None
    found: Format = importlib.import_module(name)
    return found
