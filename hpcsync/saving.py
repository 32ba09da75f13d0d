"""Checkpoints and the replay log of a training run: what is saved, and who is told."""

from __future__ import annotations

import contextlib
import platform
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from . import __version__, launch, resuming
from .assembly import Parts
from .checkpoint import folder as folders
from .checkpoint.contract import About, Outcome, Taken
from .checkpoint.replay import ReplayLog
from .checkpoint.saver import Saver
from .checkpoint.state import component
from .config import Config, dump
from .engine import StepResult
from .launch import Runtime
from .observers import CheckpointRecord, Observers
from .resuming import TakenUp

REPLAY = "replay"  # folder of the replay log, among the checkpoints


@dataclass(frozen=True, slots=True)
class Saving:
    """What saves a run.

    Attributes:
        log: of steps since the last checkpoint, if the deck wants it.
        replayed: steps that were replayed from it, on this rank.
    """

    saver: Saver
    log: ReplayLog | None
    replayed: Sequence[StepResult] = ()

    @classmethod
    def make(
        cls,
        runtime: Runtime,
        config: Config,
        parts: Parts,
        observers: Observers,
        folder: Path,
        run_id: str,
        taken: TakenUp | None,
    ) -> Saving:
        """Build it, and replay what a log has after the checkpoint that was taken up; collective.

        Args:
            folder: of the run.
        """
        if runtime.rank == 0:
            with contextlib.suppress(OSError):
                folders.clean(folder / folders.FOLDER)
        here = taken is not None and taken.place == folder
        before = taken.run if taken is not None else {}
        fresh = runtime.bcast(secrets.token_hex(8))
        # Checkpoints go on with that of before only where they follow from the same log.
        lineage = fresh

        def state() -> Taken:
            common, own = parts.state()
            run = {"lineage": lineage, "observers": observers.state()}
            return Taken({**common, "run": run}, own)

        def told(outcome: Outcome) -> None:
            observers.checkpointed(CheckpointRecord(**asdict(outcome)))

        buffers = (name for name, _ in parts.model.named_buffers())
        saver = Saver(
            runtime,
            config.checkpoint,
            folder,
            state,
            About(run_id=run_id, config=dump(config), versions=_versions()),
            first_only=[f"model/{component(name)}" for name in buffers],
            told=told,
            recorder=parts.engine.recorder,
            saved_step=taken.step if taken is not None and here else -1,
            pinned=parts.engine.streams.queued,
        )
        if taken is not None:
            observers.resumed(before.get("observers", {}))
        log: ReplayLog | None = None
        replayed: list[StepResult] = []
        if config.checkpoint.replay_log:
            known = runtime.bcast(before["lineage"] if here else fresh)
            log = saver.log = _log(runtime, config, parts, folder, known)
            if taken is not None and here:
                replayed = _replay(runtime, config, parts, observers, log, taken.step)
                if replayed:
                    lineage = known
                else:
                    log.rename(fresh)
            else:
                # Until it is whole no log can be followed, and a kill would cost all steps.
                saver.require(whole=True)
        elif runtime.local_rank == 0:
            # It may be of steps that this run takes in another way.
            shutil.rmtree(folder / folders.FOLDER / REPLAY, ignore_errors=True)
        return cls(saver, log, replayed)

    def close(self) -> None:
        """Stop what runs in the background."""
        self.saver.close()
        if self.log is not None:
            self.log.close()


def _log(runtime: Runtime, config: Config, parts: Parts, folder: Path, lineage: str) -> ReplayLog:
    reducer, place = parts.parallel.reducer, folder / folders.FOLDER / REPLAY
    return ReplayLog(place, parts.engine, reducer, runtime, config.comm, lineage)


def _replay(
    runtime: Runtime,
    config: Config,
    parts: Parts,
    observers: Observers,
    log: ReplayLog,
    step: int,
) -> list[StepResult]:
    """Replay what was logged after ``step``; the steps, on this rank. Collective."""
    results: list[StepResult] = []

    def told(result: StepResult) -> None:
        parts.sampler.advance()
        results.append(result)

    last = log.recover(step, told)
    assert last == parts.engine.step_count == parts.sampler.step
    if results:
        resuming.say(runtime, f"replayed {len(results)} steps from the log, up to step {last}")
        found = resuming.records(runtime, config, results)
        observers.resumed({name: {"replayed": found} for name in ("Metrics", "Summary")})
    return results


def _versions() -> dict[str, Any]:
    return {
        "hpcsync": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "h5py": h5py.__version__,
        "mpi": launch.mpi_library()[0],
    }
