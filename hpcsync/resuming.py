"""``--resume``: which run and which checkpoint is meant, and taking it up.

plan      on rank 0, from the command line: deck, run folder, checkpoints to try
take_up   on all ranks, when the parts of the run are built: their state
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import config as configs
from . import run_folder
from .arguments import Arguments
from .checkpoint import changes, folder, reader
from .config import Config
from .errors import CheckpointError, DamagedError

if TYPE_CHECKING:
    from .assembly import Parts
    from .engine import StepResult
    from .launch import Runtime
    from .observers import StepRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What ``--resume`` means.

    Attributes:
        folder: of the run that goes on in place; None for a new folder.
        candidates: folders of checkpoints, the newest first; none to start anew.
        allowed: keys and sections that may differ.
    """

    folder: Path | None = None
    candidates: tuple[Path, ...] = ()
    allowed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenUp:
    """What a run goes on from.

    Attributes:
        step: of the checkpoint.
        run: what ``saving`` put beside the state.
        place: the run folder that it goes on in; None for a new one.
    """

    step: int
    run: dict[str, Any]
    place: Path | None


def plan(arguments: Arguments) -> tuple[Config, Plan]:
    """Deck and plan of a command line.

    Raises:
        UserError: the deck is wrong, or there is nothing to resume where a path was given.
    """
    if arguments.resume is None:
        return configs.load(arguments.deck, arguments.overrides), Plan()
    changes.check_allowed(arguments.allow_change)
    if arguments.resume == "auto":
        config = configs.load(arguments.deck, arguments.overrides)
        place = run_folder.find(config, arguments)
        candidates = reader.find(place / folder.FOLDER) if place else []
        if not candidates:
            _say(f"--resume auto: no checkpoint in {place or 'a folder of this run'}; starts anew")
    else:
        place, candidates = _named(Path(arguments.resume), arguments)
    found = Plan(folder=place, candidates=tuple(candidates), allowed=arguments.allow_change)
    if arguments.deck is None and candidates:
        return _saved_config(found, arguments.overrides), found
    return configs.load(arguments.deck, arguments.overrides), found


def take_up(runtime: Runtime, config: Config, parts: Parts, plan: Plan) -> TakenUp:
    """Load the newest whole checkpoint into the parts; collective.

    Raises:
        AgreedError: there is none, it is of another model, or the deck has changed too much.
    """
    from .assembly import State
    from .checkpoint import resume

    loaded = resume.load(runtime, plan.candidates)
    manifest, where = loaded.manifest, loaded.checkpoint.folder
    problem: CheckpointError | None = None
    if runtime.rank == 0:
        # Before the comparison: without a deck that is the newest one's, and the next run, which
        # does not find it any more, takes the deck of the one before.
        _pass_over(loaded.damaged, plan)
        try:
            _compare(manifest, config, plan, where, runtime)
        except CheckpointError as error:
            problem = error
    runtime.agree(problem)
    own: dict[str, Any] = {}
    if loaded.own is not None:
        own["held"] = loaded.own["held"]
    if loaded.generators is not None:
        own["random"] = loaded.generators
    anew = any(changes.permits(plan.allowed, key) for key in changes.DATA)
    anew = anew or any(key.startswith("data.") for key in plan.allowed)
    if not parts.load(State(loaded.common, own), anew=anew) or loaded.own is None:
        parts.parallel.reducer.deal(loaded.held)
        _tell_of_loss(runtime, loaded.held, parts)
    if runtime.rank == 0:
        _say(f"goes on after step {manifest.step}, from {where}")
    loaded.checkpoint.close()
    return TakenUp(step=manifest.step, run=loaded.common.get("run", {}), place=plan.folder)


def _tell_of_loss(runtime: Runtime, held: Sequence[Mapping[str, Any]], parts: Parts) -> None:
    """Warn where what codecs held back has nobody to go to; collective."""
    given, taken = runtime.allreduce_scalar([any(held), bool(parts.parallel.reducer.held)])
    if given and not taken and runtime.rank == 0:
        _say(
            "warning: these ranks code no gradients, so what codecs held back is dropped: as if "
            "the last steps had been coded without error feedback"
        )


def _named(path: Path, arguments: Arguments) -> tuple[Path | None, list[Path]]:
    """The run folder, if it goes on in place, and the checkpoints that a path names."""
    if not path.is_dir():
        raise CheckpointError(
            f"--resume: {path}: no such folder; name a run folder, or a checkpoint in one"
        )
    if (path / folder.MANIFEST).exists() or folder.step_of(path.name) is not None:
        return None, [path]
    place = path.parent if path.name == folder.FOLDER else path
    found = reader.find(place / folder.FOLDER)
    if not found:
        raise CheckpointError(
            f"--resume: {path}: holds no whole checkpoint; start a new run, or name another folder"
        )
    return (None if arguments.out else place), found


def _saved_config(plan: Plan, overrides: Sequence[str]) -> Config:
    """The configuration of the newest checkpoint whose manifest is whole, and overrides.

    A stranger's must neither choose code to run nor files to write.
    """
    problems: list[str] = []
    for path in plan.candidates:
        try:
            with reader.open(path) as found:
                text = found.manifest.config
        except DamagedError as error:
            problems += error.problems
            continue
        mine = configs.load(None, overrides)
        config = configs.loads(text, f"{path / folder.MANIFEST}: config", overrides)
        for key in ("model.name", "data.name", "compress.codec"):
            section, leaf = key.split(".")
            value = getattr(getattr(config, section), leaf)
            if ":" in value and value != getattr(getattr(mine, section), leaf):
                raise CheckpointError(
                    f"--resume: {path} names code of a module, {key} = {value!r}; to run it, give "
                    f"the deck, or {key}={value}"
                )
        run = replace(config.run, dir=mine.run.dir, name=mine.run.name)
        return replace(config, run=run, metrics=mine.metrics)
    raise CheckpointError(f"--resume: no checkpoint is whole: {'; '.join(problems)}")


def _compare(manifest: Any, config: Config, plan: Plan, where: Path, runtime: Runtime) -> None:
    """Tell how the run differs from the saved one; CheckpointError if it must not."""
    before = configs.loads(manifest.config, f"{where / folder.MANIFEST}: config")
    found = changes.between(before, config)
    changes.refuse(found, plan.allowed, where)
    told = [str(each) for each in found]
    if manifest.ranks != runtime.size:
        told.append(f"ranks = {runtime.size} (was {manifest.ranks})")
    elif manifest.nodes != runtime.topology.nodes:
        told.append(f"nodes = {runtime.topology.node_count} (was {len(manifest.nodes)})")
    if told:
        _say(f"resumes with changes: {', '.join(told)}")


def _pass_over(damaged: dict[Path, tuple[str, ...]], plan: Plan) -> None:
    """Name damaged checkpoints, and set them aside where the run goes on in their folder."""
    for path, problems in damaged.items():
        moved = ""
        if plan.folder is not None:
            try:
                moved = f"; set aside as {folder.set_aside(path).name}"
            except OSError as error:
                moved = f"; it could not be set aside ({error.strerror})"
        for problem in problems:
            _say(f"WARNING: damaged checkpoint: {problem}")
        _say(f"WARNING: {path.name} is passed over{moved}")


def records(runtime: Runtime, config: Config, results: Sequence[StepResult]) -> list[StepRecord]:
    """Records of steps that were replayed, with what a log knows of them; collective."""
    import math

    from .observers import StepRecord

    if not results:
        return []
    losses = runtime.allreduce_scalar([each.loss for each in results])
    return [
        StepRecord(
            step=result.step,
            loss=loss / runtime.size,
            lr=result.lr,
            grad_norm=result.grad_norm,
            loss_scale=result.loss_scale,
            skipped=result.skipped,
            codec=config.compress.codec,
            step_ms=math.nan,
            compute_ms=math.nan,
            comm_ms=math.nan,
            exposed_comm_ms=math.nan,
            wait_ms=math.nan,
            tokens_per_s=math.nan,
            internode_bytes=math.nan,
        )
        for result, loss in zip(results, losses, strict=True)
    ]


def say(runtime: Runtime, text: str) -> None:
    """Tell it once, on stderr."""
    if runtime.rank == 0:
        _say(text)


def _say(text: str) -> None:
    print(f"hpcsync: {text}", file=sys.stderr, flush=True)
