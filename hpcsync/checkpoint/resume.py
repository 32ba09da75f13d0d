"""Taking up a checkpoint on all ranks of a job: read, verified and handed out in one pass.

    each rank reads its share of the pieces and checks them -> broadcast -> every rank has all that
    is common; what belongs to a rank is read by one rank, that of the same number if there is one,
    and so is what is outside the pieces of a file, index.h5 among them

Each byte of all files is read and checked once across the job. Nothing is taken over before all
ranks have found all of it whole; else the next older checkpoint is tried.
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
        held: what codecs held back on some of the ranks of then, each of them on one rank of now.
        damaged: problems of newer ones that were passed over, by folder.
    """

    checkpoint: Checkpoint
    common: dict[str, Any]
    own: dict[str, Any] | None
    generators: dict[str, Any] | None
    held: tuple[dict[str, Any], ...]
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


def _read(
    runtime: Runtime, checkpoint: Checkpoint, damaged: dict[Path, tuple[str, ...]]
) -> Loaded | None:
    """All of a checkpoint that this rank needs; None, on all ranks, if it is damaged."""
    manifest, path = checkpoint.manifest, checkpoint.folder
    tensors, errors = _gather(runtime, checkpoint)

    def build() -> Loaded:
        _check_rest(runtime, checkpoint, errors)
        _refuse(errors)
        common = state.unflatten(manifest.common, tensors)
        ranks = range(runtime.rank, manifest.ranks, runtime.size)
        owns = {rank: checkpoint.own(rank) for rank in ranks}
        mine = owns.get(runtime.rank)
        return Loaded(
            checkpoint=checkpoint,
            common=common,
            own=mine if manifest.nodes == runtime.topology.nodes else None,
            generators=None if mine is None else mine["random"],
            held=tuple(own["held"] for own in owns.values()),
            damaged=damaged,
        )

    return _agreed(runtime, build, damaged, path)


def _check_rest(runtime: Runtime, checkpoint: Checkpoint, errors: list[CheckpointError]) -> None:
    """Check this rank's share of what is outside the pieces of the files; errors are noted."""
    units = [unit for unit in checkpoint.units() if unit.piece is None]
    for unit in units[runtime.rank :: runtime.size]:
        try:
            checkpoint.check(unit)
        except CheckpointError as error:
            errors.append(error)


def _refuse(errors: Sequence[CheckpointError]) -> None:
    """Raise what was noted; an error that may pass goes before damage."""
    damage = [error for error in errors if isinstance(error, DamagedError)]
    for error in errors:
        if error not in damage:
            raise error
    if damage:
        raise DamagedError([problem for error in damage for problem in error.problems])


def _gather(
    runtime: Runtime, checkpoint: Checkpoint
) -> tuple[dict[str, Tensor], list[CheckpointError]]:
    """All common tensors, and what went wrong on this rank, which others must not wait for."""
    manifest = checkpoint.manifest
    names = state.names(manifest.common)
    made = {
        name: torch.empty(
            manifest.tensors[name].meta.shape,
            dtype=state.torch_dtype(manifest.tensors[name].meta.dtype),
        )
        for name in names
    }
    errors: list[CheckpointError] = []
    for jobs in _batches(_jobs(manifest, names, runtime.size)):
        buffer = np.empty(sum(job.piece.nbytes for job in jobs), np.uint8)
        if jobs[0].rank == runtime.rank:
            for job, data in _parts(jobs, buffer):
                try:
                    checkpoint.read(job.name, job.piece, data)
                except CheckpointError as error:
                    errors.append(error)
        runtime.broadcast_array(buffer, jobs[0].rank)
        for job, data in _parts(jobs, buffer):
            at = job.piece.start * manifest.tensors[job.name].meta.row_nbytes
            view(made[job.name])[at : at + job.piece.nbytes] = data
    return made, errors


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
