"""Writing a node's trace file: appended to aside, and copied into place when it is whole.

    .node0.h5.part   what is appended to, in one HDF5 file
    node0.h5         a copy of it from when it was last closed: it always opens

HDF5 files that are open for writing may be unreadable after a kill, so nobody is given one. A copy
costs a read and a write of the file, so the time between copies grows with it, and a file that has
grown to ``PART_BYTES`` is followed by another, node0-001.h5.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from .events import BINS, CLOCK, EVENT, FORMAT, LANES, MEMORY, NAMES, VERSION, Events

PART_BYTES = 64 << 20
_ROWS = 4096  # of a chunk
_UNITS = "times in ns of the rank's own clock; bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What a file says of its run; texts as they stand in the file.

    Attributes:
        node: of this file; ``nodes`` and ``ranks`` are those of the job.
        every: each so many steps one is written.
        ring: events that a rank remembers.
        run: texts of the group ``run``: config, topology, codec, algorithm, buckets, links.
    """

    run_id: str
    node: int
    nodes: int
    ranks: int
    every: int
    ring: int
    hpcsync: str
    event_cost_ns: float = 0.0
    run: Mapping[str, str]


class NodeFile:
    """The trace file of a node.

    Args:
        folder: RUN/trace; made if need be.
        ranks: attributes of each rank of the node: host, local_rank, pid.
        part: least number of the first part, where several processes write for one node. Parts
            that are there already, of the run that is resumed, stay.
    """

    def __init__(
        self, folder: Path, head: Head, ranks: Mapping[int, Mapping[str, Any]], part: int = 0
    ) -> None:
        self._folder, self._head, self._ranks = folder, head, ranks
        self._part = part
        self._spent = 0.0
        self._described = False
        self._histograms = {rank: np.zeros((len(LANES), BINS), np.uint64) for rank in ranks}
        self._lost = dict.fromkeys(ranks, 0)
        self._rows: dict[tuple[int, str], list[NDArray[np.void]]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        while self.path.exists():
            self.discard()
            self._part += 1
        self._make()

    @property
    def path(self) -> Path:
        """Where the file is to be read."""
        part = f"-{self._part:03d}" if self._part else ""
        return self._folder / f"node{self._head.node}{part}.h5"

    def add(self, rank: int, events: Events) -> None:
        """Events of a rank, to be written with the next ``flush``."""
        self._keep(rank, "events", events)

    def add_clock(self, rank: int, rows: NDArray[np.void]) -> None:
        """Measurements of a rank's clock."""
        self._keep(rank, "clock", rows)

    def add_memory(self, rank: int, rows: NDArray[np.void]) -> None:
        """Sizes of a rank's memory."""
        self._keep(rank, "memory", rows)

    def describe(self, run: Mapping[str, str]) -> None:
        """Texts of the group ``run`` in place of those of the head."""
        self._head = replace(self._head, run=dict(run))
        self._described = True

    def count(self, rank: int, histogram: NDArray[np.uint64], lost: int) -> None:
        """Durations by lane and bin, and events that were lost, since the last call."""
        self._histograms[rank] += histogram
        self._lost[rank] += lost

    def flush(self, *, complete: bool = False) -> float:
        """Write what was added; after it the file on disk holds all. Seconds that it took."""
        began = time.perf_counter()
        rows, self._rows = self._rows, {}
        aside = self._aside()
        with h5py.File(aside, "a") as file:
            for (rank, name), parts in rows.items():
                _append(file["ranks"][str(rank)][name], np.concatenate(parts))
            for rank, histogram in self._histograms.items():
                group = file["ranks"][str(rank)]
                group["histogram"][...] = histogram
                group.attrs["lost"] = self._lost[rank]
            if self._described:
                del file["run"]
                _texts(file, self._head.run)
                self._described = False
            file.attrs["write_s"] = self._spent
            file.attrs["complete"] = int(complete)
        full = aside.stat().st_size > PART_BYTES
        if complete or full:
            os.replace(aside, self.path)
        else:
            copy = aside.with_name(aside.name + ".copy")
            shutil.copyfile(aside, copy)
            os.replace(copy, self.path)
        if full and not complete:
            self._part += 1
            self._forget()
            self._make()
        spent = time.perf_counter() - began
        self._spent += spent
        return spent

    def discard(self) -> None:
        """Remove what was not copied into place."""
        self._aside().unlink(missing_ok=True)

    def _forget(self) -> None:
        # What one part has counted the next does not count again.
        for histogram in self._histograms.values():
            histogram[...] = 0
        self._lost = dict.fromkeys(self._lost, 0)

    def _aside(self) -> Path:
        return self._folder / f".{self.path.name}.part"

    def _keep(self, rank: int, name: str, rows: NDArray[np.void]) -> None:
        if rows.shape[0]:
            self._rows.setdefault((rank, name), []).append(rows)

    def _make(self) -> None:
        head = self._head
        with h5py.File(self._aside(), "w") as file:
            file.attrs.update(
                format=FORMAT,
                version=VERSION,
                run_id=head.run_id,
                node=head.node,
                nodes=head.nodes,
                ranks=head.ranks,
                part=self._part,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                hpcsync=head.hpcsync,
                units=_UNITS,
                every=head.every,
                ring=head.ring,
                event_cost_ns=head.event_cost_ns,
                write_s=self._spent,
                complete=0,
            )
            _strings(file, "lanes", LANES)
            _strings(file, "names", [name for name, _ in NAMES])
            _texts(file, head.run)
            for rank, attributes in self._ranks.items():
                group = file.create_group(f"ranks/{rank}")
                group.attrs.update({**attributes, "lost": 0})
                for name, dtype in (("events", EVENT), ("clock", CLOCK), ("memory", MEMORY)):
                    _table(group, name, dtype)
                group.create_dataset("histogram", data=self._histograms[rank])


def _strings(file: h5py.File, name: str, texts: Sequence[str]) -> None:
    file.create_dataset(name, data=list(texts), dtype=h5py.string_dtype())


def _texts(file: h5py.File, texts: Mapping[str, str]) -> None:
    for key, text in texts.items():  # attributes are limited to 64 KiB
        file.create_dataset(f"run/{key}", data=text, dtype=h5py.string_dtype())


def _table(group: h5py.Group, name: str, dtype: np.dtype[np.void]) -> None:
    rows = _ROWS if dtype == EVENT else 64
    group.create_dataset(
        name,
        shape=(0,),
        maxshape=(None,),
        dtype=dtype,
        chunks=(rows,),
        compression="gzip",
        compression_opts=1,
        shuffle=True,
        fletcher32=True,
    )


def _append(table: h5py.Dataset, rows: NDArray[np.void]) -> None:
    at = table.shape[0]
    table.resize(at + rows.shape[0], axis=0)
    table[at:] = rows
