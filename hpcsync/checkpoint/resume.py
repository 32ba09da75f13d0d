"""Taking up a checkpoint on all ranks of a job: read, verified and handed out in one pass.

    each rank reads its share of the pieces and checks them -> broadcast -> every rank has all that
    is common; what belongs to a rank is read by that rank

Each byte is read once across the job. Nothing is taken over before all ranks have found all of it
whole; else the next older checkpoint is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, DamagedError
from ..runtime import Runtime
from . import reader, state
from .manifest import Manifest, Stored
from .reader import Checkpoint
from .snapshot import view

T = TypeVar("T")
_BATCH = 32 << 20  # bytes that are read, then broadcast


class _Job(NamedTuple):
    """A piece and the rank that reads it."""

    name: str
    piece: Stored
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A checkpoint that was found whole.

    Attributes:
        common: the tree of what all ranks hold alike; its tensors are this rank's to keep.
        own: this rank's, if the job has the ranks and nodes of then.
        generators: of the rank of this number then, if there was one: ``own["random"]``.
        damaged: problems of newer ones that were passed over, by folder.
    """

    checkpoint: Checkpoint
    common: dict[str, Any]
    own: dict[str, Any] | None
    generators: dict[str, Any] | None
    damaged: dict[Path, tuple[str, ...]]

    @property
    def manifest(self) -> Manifest:
        return self.checkpoint.manifest


def load(runtime: Runtime, candidates: Sequence[Path]) -> Loaded:
    """Read the first one that is whole; collective.

    Args:
        candidates: folders of checkpoints, the same on all ranks.

    Raises:
        AgreedError: none is whole, or one cannot be read; it is a CheckpointError, too.
    """
    damaged: dict[Path, tuple[str, ...]] = {}
    for path in candidates:
        found = _agreed(runtime, lambda path=path: reader.open(path), damaged, path)  # type: ignore[misc]
        if found is None:
            continue
        loaded = _read(runtime, found, damaged)
        if loaded is not None:
            return loaded
        found.close()
    lines = "; ".join(problems[0] for problems in damaged.values())
    runtime.agree(
        CheckpointError(
            f"--resume: no checkpoint is whole: {lines}; start a new run, or name another "
            "checkpoint"
        )
    )
    raise AssertionError("unreachable")


def helds(runtime: Runtime, loaded: Loaded) -> list[Any]:
    """What codecs held back on some of the ranks of then, each of them on one rank of now;
    collective.

    Raises:
        AgreedError: a file is damaged; it is a CheckpointError, too.
    """
    manifest = loaded.manifest
    found: list[Any] = []
    problem: CheckpointError | None = None
    try:
        for rank in range(runtime.rank, manifest.ranks, runtime.size):
            skeleton = manifest.own[rank]
            if isinstance(skeleton, dict) and "held" in skeleton:
                found.append(_tree(loaded.checkpoint, skeleton["held"]))
    except CheckpointError as error:
        problem = error
    runtime.agree(problem)
    return found


def _read(
    runtime: Runtime, checkpoint: Checkpoint, damaged: dict[Path, tuple[str, ...]]
) -> Loaded | None:
    """All of a checkpoint that this rank needs; None, on all ranks, if it is damaged."""
    manifest, path = checkpoint.manifest, checkpoint.folder
    tensors, problems = _gather(runtime, checkpoint)
    same = manifest.nodes == runtime.topology.nodes

    def build() -> Loaded:
        if problems:
            raise DamagedError(problems)
        common = state.unflatten(manifest.common, tensors)
        own = generators = None
        if runtime.rank < manifest.ranks:
            skeleton = manifest.own[runtime.rank]
            own = _tree(checkpoint, skeleton) if same else None
            generators = own["random"] if own else _tree(checkpoint, skeleton["random"])
        return Loaded(
            checkpoint=checkpoint,
            common=common,
            own=own,
            generators=generators,
            damaged=damaged,
        )

    return _agreed(runtime, build, damaged, path)


def _gather(runtime: Runtime, checkpoint: Checkpoint) -> tuple[dict[str, Tensor], list[str]]:
    """All common tensors, and what this rank found damaged."""
    manifest = checkpoint.manifest
    names = state.names(manifest.common)
    made = {
        name: torch.empty(
            manifest.tensors[name].meta.shape,
            dtype=state.torch_dtype(manifest.tensors[name].meta.dtype),
        )
        for name in names
    }
    problems: list[str] = []
    for jobs in _batches(_jobs(manifest, names, runtime.size)):
        buffer = np.empty(sum(job.piece.nbytes for job in jobs), np.uint8)
        if jobs[0].rank == runtime.rank:
            for job, data in _parts(jobs, buffer):
                try:
                    checkpoint.read(job.name, job.piece, data)
                except DamagedError as error:
                    problems += error.problems
        runtime.broadcast_array(buffer, jobs[0].rank)
        for job, data in _parts(jobs, buffer):
            at = job.piece.start * manifest.tensors[job.name].meta.row_nbytes
            view(made[job.name])[at : at + job.piece.nbytes] = data
    return made, problems


def _jobs(manifest: Manifest, names: Sequence[str], ranks: int) -> list[_Job]:
    """The pieces of these tensors in the order of files and offsets, cut into a row a rank."""
    pieces = [(name, piece) for name in names for piece in manifest.tensors[name].pieces]
    pieces.sort(key=lambda each: (each[1].file, each[1].offset))
    total = max(sum(piece.nbytes for _, piece in pieces), 1)
    found, at = [], 0
    for name, piece in pieces:
        found.append(_Job(name, piece, min(at * ranks // total, ranks - 1)))
        at += piece.nbytes
    return found


def _batches(jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    """Jobs of one rank each, of about ``_BATCH`` bytes together."""
    batch: list[_Job] = []
    size = 0
    for job in jobs:
        if batch and (job.rank != batch[0].rank or size + job.piece.nbytes > _BATCH):
            yield batch
            batch, size = [], 0
        batch.append(job)
        size += job.piece.nbytes
    if batch:
        yield batch


def _parts(jobs: Sequence[_Job], buffer: Any) -> Iterator[tuple[_Job, Any]]:
    at = 0
    for job in jobs:
        yield job, buffer[at : at + job.piece.nbytes]
        at += job.piece.nbytes


def _tree(checkpoint: Checkpoint, skeleton: Any) -> Any:
    tensors = {name: checkpoint.tensor(name) for name in state.names(skeleton)}
    return state.unflatten(skeleton, tensors)


def _agreed(
    runtime: Runtime,
    work: Callable[[], T],
    damaged: dict[Path, tuple[str, ...]],
    path: Path,
) -> T | None:
    """Do it on all ranks; None if any found damage, which is noted.

    Raises:
        AgreedError: another error came up.
    """
    made: T | None = None
    mine: tuple[str, ...] = ()
    problem: CheckpointError | None = None
    try:
        made = work()
    except DamagedError as error:
        mine = error.problems
    except CheckpointError as error:
        problem = error
    except (KeyError, TypeError) as error:  # a state that is none of ours
        problem = CheckpointError(f"{path}: holds no state of hpcsync.train ({error!r})")
    runtime.agree(problem)
    found = [text for problems in runtime.allgather_object(mine) for text in problems]
    if found:
        damaged[path] = tuple(dict.fromkeys(found))
        return None
    return made
