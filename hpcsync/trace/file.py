"""Reading the trace of a run, RUN/trace/node0.h5, node1.h5, ... (format: tools/README.md).

Events are read rank by rank, when they are asked for, so that large traces fit. What cannot be read
is left out and told in ``Trace.problems``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..wording import ranges
from .events import BINS, CLOCK, EVENT, FORMAT, LANES, MEMORY, VERSION, Events

FOLDER = "trace"
_FILE = re.compile(r"node(\d+)(?:-(\d+))?\.h5")


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What the files say of the run.

    Attributes:
        topology: the ranks of each node.
        buckets: index, bytes, elements and coded elements of each.
        links: what was measured or is known of them, by level; may be empty.
        every: each so many steps one was written.
        event_cost_ns: what recording one event took.
        created: when, ISO 8601; empty if it is not known.
    """

    run_id: str
    ranks: int
    nodes: int
    every: int
    config: str = ""
    codec: str = "none"
    algorithm: str = ""
    topology: tuple[tuple[int, ...], ...] = ()
    buckets: tuple[Mapping[str, Any], ...] = ()
    links: Mapping[str, Any] = field(default_factory=dict)
    event_cost_ns: float = 0.0
    created: str = ""


class Trace:
    """The trace of a run, opened for reading.

    Attributes:
        folder: of the run.
        facts: of the run, by the first file that could be read.
        ranks: those whose events are there, ascending.
        problems: what is missing or could not be read, a line each.
        complete: whether the run ended well on all nodes.
        lanes, names: what the fields ``lane`` and ``name`` of events mean.
    """

    def __init__(self, folder: Path, facts: RunFacts, names: tuple[str, ...]) -> None:
        self.folder, self.facts, self.names = folder, facts, names
        self.lanes: tuple[str, ...] = LANES
        self.problems: list[str] = []
        self.complete = True
        self._groups: dict[int, list[h5py.Group]] = {}
        self._files: list[h5py.File] = []

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted(self._groups))

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()
        self._files, self._groups = [], {}

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def node_of(self, rank: int) -> int:
        """The node of a rank."""
        for node, members in enumerate(self.facts.topology):
            if rank in members:
                return node
        return int(self._groups[rank][0].file.attrs["node"])

    def attributes(self, rank: int) -> dict[str, Any]:
        """``host``, ``local_rank``, ``pid`` and ``lost`` of a rank."""
        found = {key: _plain(value) for key, value in self._groups[rank][0].attrs.items()}
        found["lost"] = sum(int(group.attrs.get("lost", 0)) for group in self._groups[rank])
        return found

    def events(self, rank: int, steps: Sequence[int] | None = None) -> Events:
        """A rank's events in the order of their end, on its own clock.

        Args:
            steps: only of these.
        """
        found = self._read(rank, "events", EVENT)
        if steps is not None:
            found = found[np.isin(found["step"], np.asarray(steps, np.int32))]
        return found

    def aligned(self, rank: int, steps: Sequence[int] | None = None) -> Events:
        """As ``events``, with times of rank 0's clock."""
        found = self.events(rank, steps)
        for name in ("start", "end"):
            found[name] += self.offset(rank, found[name])
        return found

    def offset(self, rank: int, times: NDArray[np.int64]) -> NDArray[np.int64]:
        """What to add to times of a rank's clock to get rank 0's: linear between measurements,
        and beyond them the drift of the first and the last two goes on."""
        clock = self.clock(rank)
        if not clock.shape[0]:
            return np.zeros(times.shape, np.int64)
        local, offset = clock["local"], clock["offset"].astype(np.float64)
        if clock.shape[0] == 1:
            return np.full(times.shape, int(offset[0]), np.int64)
        at = np.clip(np.searchsorted(local, times), 1, clock.shape[0] - 1)
        low, high = at - 1, at
        share = (times - local[low]) / np.maximum(local[high] - local[low], 1)
        found: NDArray[np.int64] = np.rint(
            offset[low] + share * (offset[high] - offset[low])
        ).astype(np.int64)
        return found

    def clock(self, rank: int) -> NDArray[np.void]:
        """Measurements of a rank's clock, dtype ``events.CLOCK``, in order of time."""
        found = self._read(rank, "clock", CLOCK)
        return found[np.argsort(found["local"], kind="stable")]

    def uncertainty(self, rank: int) -> float:
        """By how many ns a time of the rank may be wrong on rank 0's clock; infinite if its clock
        was never compared."""
        clock = self.clock(rank)
        return float(clock["uncertainty"].max()) if clock.shape[0] else float("inf")

    def histogram(self, rank: int) -> NDArray[np.uint64]:
        """Durations of all steps, (lanes, bins); see ``events.BINS``."""
        parts = [group["histogram"][...] for group in self._groups[rank] if "histogram" in group]
        total = np.zeros((len(self.lanes), BINS), np.uint64)
        for part in parts:
            total[: part.shape[0]] += part.astype(np.uint64)
        return total

    def memory(self, rank: int) -> NDArray[np.void]:
        """Memory of a rank, dtype ``events.MEMORY``."""
        return self._read(rank, "memory", MEMORY)

    def steps(self, rank: int) -> NDArray[np.int64]:
        """The steps of which a rank has events, ascending."""
        return np.unique(self.events(rank)["step"]).astype(np.int64)

    def tables(self) -> Iterator[tuple[int, Events]]:
        """(rank, aligned events) for every rank, one in memory at a time."""
        for rank in self.ranks:
            yield rank, self.aligned(rank)

    def frame(self) -> Any:
        """All events as a pandas data frame, times aligned. Raises UserError without pandas."""
        try:
            import pandas as pd
        except ImportError:
            raise UserError(
                "hpcsync.trace: frame() needs pandas; pip install pandas, or use events()"
            ) from None
        parts = []
        for rank, found in self.tables():
            part = pd.DataFrame({name: found[name] for name in EVENT.names or ()})
            part.insert(0, "rank", rank)
            parts.append(part)
        whole = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
        if len(whole):
            whole["lane"] = pd.Categorical.from_codes(whole["lane"], list(self.lanes))
            whole["name"] = [self.names[index] for index in whole["name"]]
            whole = whole.drop(columns="spare")
        return whole

    def _read(self, rank: int, name: str, dtype: np.dtype[np.void]) -> NDArray[np.void]:
        if rank not in self._groups:
            known = f"{self.ranks[0]} to {self.ranks[-1]}" if self.ranks else "none"
            raise UserError(f"trace of {self.folder}: no rank {rank}; there are {known}")
        parts = []
        for group in self._groups[rank]:
            try:
                parts.append(group[name][...].astype(dtype, copy=False))
            except (KeyError, OSError, TypeError, ValueError) as error:
                problem = f"{group.file.filename}: {name} of rank {rank} cannot be read ({error})"
                if problem not in self.problems:
                    self.problems.append(problem)
        return np.concatenate(parts) if parts else np.zeros(0, dtype)


def read(run: str | Path) -> Trace:
    """Open the trace of a run.

    Args:
        run: the run's folder, its trace folder, or one file of it.

    Raises:
        UserError: there is no trace, or nothing of it can be read.
    """
    paths, folder = _find(Path(run))
    trace: Trace | None = None
    problems: list[str] = []
    files: list[tuple[Path, h5py.File]] = []
    for path in paths:
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            problems.append(f"{path}: not readable as HDF5 ({_first(error)}); left out")
            continue
        problem = _foreign(file)
        if problem:
            problems.append(f"{path}: {problem}; left out")
            file.close()
            continue
        files.append((path, file))
    # A run that was resumed has a new id, and clocks that were not compared with those of before.
    newest = max((file for _, file in files), key=_created, default=None)
    for path, file in files:
        if trace is None and newest is not None:
            names = tuple(name.decode() for name in newest["names"][...])
            trace = Trace(folder, _facts(newest), names)
        if trace is None or str(file.attrs["run_id"]) != trace.facts.run_id:
            problems.append(f"{path}: of another run ({file.attrs['run_id']}); left out")
            file.close()
            continue
        _adopt(trace, file)
    if trace is None:
        raise UserError("; ".join(problems) or f"{folder}: no trace files")
    trace.problems += problems
    _tell_missing(trace)
    return trace


def _find(given: Path) -> tuple[list[Path], Path]:
    if given.is_file():
        return [given], given.parent.parent
    for folder in (given / FOLDER, given):
        found = [
            (match, path)
            for path in folder.glob("node*.h5")
            if (match := _FILE.fullmatch(path.name))
        ]
        if found:
            found.sort(key=lambda each: (int(each[0][1]), int(each[0][2] or 0)))
            return [path for _, path in found], folder.parent if folder.name == FOLDER else folder
    if not given.exists():
        raise UserError(f"{given}: no such run folder")
    raise UserError(
        f"{given}: no trace in it (trace/node*.h5); run with trace.enabled=true, and name the "
        "run's folder"
    )


def _created(file: h5py.File) -> str:
    return str(_plain(file.attrs.get("created", "")))


def _foreign(file: h5py.File) -> str:
    """Why a file is not one of ours, or empty."""
    if _plain(file.attrs.get("format", "")) != FORMAT:
        return "HDF5, but no trace of hpcsync"
    version = int(file.attrs.get("version", 0))
    if version > VERSION:
        return f"version {version} of the format, newer than this hpcsync ({VERSION})"
    lanes = tuple(name.decode() for name in file["lanes"][...]) if "lanes" in file else ()
    if lanes[: len(LANES)] != LANES or "names" not in file or "ranks" not in file:
        return "incomplete, or of an unknown layout"
    return ""


def _facts(file: h5py.File) -> RunFacts:
    attrs = file.attrs
    run = {key: text[()].decode() for key, text in file["run"].items()} if "run" in file else {}
    return RunFacts(
        run_id=str(attrs["run_id"]),
        ranks=int(attrs["ranks"]),
        nodes=int(attrs["nodes"]),
        every=int(attrs.get("every", 1)),
        config=run.get("config", ""),
        codec=run.get("codec", "none"),
        algorithm=run.get("algorithm", ""),
        topology=tuple(tuple(ranks) for ranks in json.loads(run.get("topology", "[]"))),
        buckets=tuple(json.loads(run.get("buckets", "[]"))),
        links=json.loads(run.get("links", "{}")),
        event_cost_ns=float(attrs.get("event_cost_ns", 0.0)),
        created=_created(file),
    )


def _adopt(trace: Trace, file: h5py.File) -> None:
    trace._files.append(file)
    trace.complete &= bool(file.attrs.get("complete", 0))
    for name, group in file["ranks"].items():
        trace._groups.setdefault(int(name), []).append(group)


def _tell_missing(trace: Trace) -> None:
    absent = sorted(set(range(trace.facts.ranks)) - set(trace.ranks))
    if absent:
        trace.problems.append(
            f"ranks {ranges(absent)} of {trace.facts.ranks} have no events; files of their nodes "
            "are missing"
        )
    if not trace.complete:
        trace.problems.append("the run did not end well, or goes on: the last steps may be missing")


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return value.item() if isinstance(value, np.generic) else value


def _first(error: Exception) -> str:
    return str(error).partition("\n")[0]
