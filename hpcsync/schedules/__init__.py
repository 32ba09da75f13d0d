"""Collective algorithms as data: `build` one by name; `verify`, `cost` and `hierarchical` use them.

Pure Python: no MPI, no torch, no NumPy (but for verify.py).
"""

from __future__ import annotations

from collections.abc import Callable

from hpcsync.schedules import direct, doubling, halving, native, ring
from hpcsync.schedules.base import Action, Kind, Schedule, Step, Transfer, chunk_bounds

__all__ = [
    "NAMES",
    "Action",
    "Kind",
    "Schedule",
    "Step",
    "Transfer",
    "build",
    "chunk_bounds",
]

_BUILDERS: dict[str, Callable[[Kind, int, int], Schedule]] = {
    direct.NAME: direct.build,
    ring.NAME: ring.build,
    halving.NAME: halving.build,
    doubling.NAME: doubling.build,
    native.NAME: native.build,
}

NAMES: tuple[str, ...] = tuple(_BUILDERS)


def build(name: str, kind: Kind, rank: int, size: int, owners: int | None = None) -> Schedule:
    """The schedule of `rank` in a group of `size` ranks by the algorithm `name` (see NAMES).

    `owners`: only the first so many ranks own a chunk; the direct algorithm only, unless all own.
    Raises ValueError.
    """
    if name not in _BUILDERS:
        raise ValueError(f"no algorithm {name!r}; there are {', '.join(NAMES)}")
    if name == direct.NAME:
        return direct.build(kind, rank, size, owners)
    if owners not in (None, size):
        raise ValueError(f"{name} cannot leave {size} ranks with {owners} owners; direct can")
    return _BUILDERS[name](kind, rank, size)
