"""How ranks share the training of a model."""

from __future__ import annotations

from .data_parallel import DataParallel

__all__ = ["DataParallel"]
