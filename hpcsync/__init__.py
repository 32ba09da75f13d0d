"""hpcsync: training PyTorch models on the ranks of an MPI job.

    import hpcsync

    hpcsync.init()
    model = hpcsync.DataParallel(model)      # gradients are averaged over ranks in backward

Importing this package imports neither torch nor MPI; the first use of a name does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from . import interpreter

__version__ = "0.1.0"

_LIBRARY = (
    "Average",
    "DataParallel",
    "Max",
    "Min",
    "Op",
    "Sum",
    "allgather_object",
    "allreduce",
    "allreduce_",
    "barrier",
    "broadcast",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "cross_rank",
    "cross_size",
    "init",
    "is_initialized",
    "local_rank",
    "local_size",
    "rank",
    "shutdown",
    "size",
)
__all__ = ["__version__", *_LIBRARY]

if TYPE_CHECKING:
    from .library import (  # noqa: F401
        Average,
        DataParallel,
        Max,
        Min,
        Op,
        Sum,
        allgather_object,
        allreduce,
        allreduce_,
        barrier,
        broadcast,
        broadcast_object,
        broadcast_optimizer_state,
        broadcast_parameters,
        cross_rank,
        cross_size,
        init,
        is_initialized,
        local_rank,
        local_size,
        rank,
        shutdown,
        size,
    )


def __getattr__(name: str) -> object:
    if name in _LIBRARY:
        told = interpreter.too_old()
        if told:
            raise ImportError(told)
        return getattr(importlib.import_module(".library", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LIBRARY])
