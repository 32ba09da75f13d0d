"""Collective algorithms as data: `build` one by name, or one for `everyone` in a group.

Pure Python: no MPI, no torch; NumPy only in `verify`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

from hpcsync.schedules import direct, doubling, halving, native, ring
from hpcsync.schedules.base import Action, Kind, Schedule, Step, Transfer, chunk_bounds
from hpcsync.schedules.cost import Link, choose, cost

__all__ = [
    "NAMES",
    "Action",
    "Kind",
    "Link",
    "Schedule",
    "Step",
    "Transfer",
    "build",
    "choose",
    "chunk_bounds",
    "cost",
    "everyone",
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


def everyone(name: str, kind: Kind, size: int, owners: int | None = None) -> Sequence[Schedule]:
    """The schedules of all ranks of a group, each built when it is asked for and then kept: a rank
    among 1,024 should not build what it never looks at. Arguments and errors as for `build`."""
    return _Everyone(name, kind, size, owners)


class _Everyone(Sequence[Schedule]):
    def __init__(self, name: str, kind: Kind, size: int, owners: int | None) -> None:
        # The first at once: bad arguments show here, not on first use.
        self._made = {0: build(name, kind, 0, size, owners)}
        self._name, self._kind, self._size, self._owners = name, kind, size, owners

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> Schedule: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Schedule]: ...
    def __getitem__(self, index: int | slice) -> Schedule | Sequence[Schedule]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(self._size))]
        rank = range(self._size)[index]
        if rank not in self._made:
            self._made[rank] = build(self._name, self._kind, rank, self._size, self._owners)
        return self._made[rank]
