"""``python -m hpcsync.train``: the command and the wiring of a run.

    arguments -> rank 0 reads the deck -> parts -> their state, if a run goes on -> run folder
              -> observers -> checkpoints -> loop -> summary

Nothing heavy is imported before the arguments are understood.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from . import interpreter

if not interpreter.fits():
    sys.exit(2)

from . import config as configs
from .arguments import Arguments, parse
from .config import Config, TopologyConfig
from .errors import CollectiveTimeout, HpcsyncError, NonFiniteError, UserError
from .stopping import LEFT, StoppedError, StopSignals

if TYPE_CHECKING:
    from .assembly import Parts
    from .launch import Runtime
    from .observers import Observers, RunInfo
    from .resuming import Plan
    from .saving import Saving

UNSAVED = 3  # exit status: all went well, but the last checkpoint was not saved


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command: ends the process, and with it the job."""
    words = list(sys.argv[1:] if argv is None else argv)
    from . import launch

    launch.guard(lambda: command(words))


def command(argv: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    with _quiet_unless_first():
        try:
            arguments = parse(argv)
        except UserError:
            arguments = None
        if arguments is not None and (arguments.explain is not None or arguments.dry_run):
            # The others have nothing to add, and a status that they fail with would have the
            # launcher end rank 0, perhaps before it has told why.
            if interpreter.first(os.environ):
                print(_answer(arguments))
            return 0
    # What cannot be understood is told there, by rank 0 once the ranks know who that is.
    return run(argv)


def _answer(arguments: Arguments) -> str:
    """What is asked for without training."""
    if arguments.explain is not None:
        return configs.explain(arguments.explain)
    from . import dryrun

    config = configs.load(arguments.deck, arguments.overrides)
    return dryrun.report(config, max(1, arguments.ranks), arguments.nodes)


def _quiet_unless_first() -> contextlib.AbstractContextManager[object]:
    """Drop what this process prints if it is one of several, and not the first."""
    if interpreter.first(os.environ):
        return contextlib.nullcontext()
    return contextlib.redirect_stdout(io.StringIO())


def run(argv: Sequence[str]) -> int:
    """Train on all ranks of this job; returns the exit status."""
    if not interpreter.fits("mpi4py", "numpy", "torch"):
        return 2
    from . import launch, observers

    with launch.start(TopologyConfig()) as job:
        config, arguments, plan = _read(job, argv)
    with launch.start(config.topology, config.comm.timeout_s) as runtime:
        watchers = observers.standard(runtime.rank, config.metrics)

        def give_up(status: int) -> None:
            _say(runtime, "the step did not end in time after the signal; ending without it")
            if runtime.size == 1:  # nobody else to end, and MPI_Abort would be loud
                os._exit(status)
            launch.abort(status)

        with StopSignals(watchers.interrupted, give_up) as signals:
            return train(runtime, config, arguments, plan, watchers, signals)


def _read(runtime: Runtime, argv: Sequence[str]) -> tuple[Config, Arguments, Plan]:
    """Rank 0 reads command line, deck and what is to be resumed, and tells the others."""
    from . import resuming
    from .launch import AgreedError

    outcome: tuple[Config, Arguments, Plan] | str = ""
    if runtime.rank == 0:
        try:
            arguments = parse(argv)
            config, plan = resuming.plan(arguments)
            configs.check_ranks(config, runtime.size)
            outcome = (config, arguments, plan)
        except UserError as error:
            outcome = str(error)
    outcome = runtime.bcast(outcome)
    if isinstance(outcome, str):
        raise AgreedError(outcome)
    return outcome


def train(
    runtime: Runtime,
    config: Config,
    arguments: Arguments,
    plan: Plan,
    observers: Observers,
    signals: StopSignals,
) -> int:
    """Build everything, train, and tell the observers how it ended; the exit status."""
    from . import late_dynamo

    late_dynamo.postpone()
    from . import assembly, banner, peak, resuming, saving
    from .hangs import Hangs
    from .loop import Loop

    hangs: Hangs | None = None
    saved: Saving | None = None
    try:
        parts = assembly.assemble(runtime, config, signals, fresh=not plan.candidates)
        taken = resuming.take_up(runtime, config, parts, plan) if plan.candidates else None
        folder, run_id = _folder(runtime, config, arguments, plan, signals)
        saved = saving.Saving.make(runtime, config, parts, observers, folder, run_id, taken)
        info = _info(runtime, config, parts, folder, run_id, taken.step if taken else None)
        observers.join(assembly.traces(config, parts, info.run_id))
        hangs = Hangs(parts.parallel.collectives, folder / "trace", run_id)
        signals.on_quit = hangs.signalled
        signals.asks_to_save(saved.saver.ask)
        observers.started(info)
        if runtime.rank == 0:
            rows = [*assembly.describe(runtime, config, parts), ("run", str(info.folder))]
            print(banner.render(rows), flush=True)
        reason = Loop(
            runtime=runtime,
            config=config,
            parts=parts,
            info=info,
            observers=observers,
            signals=signals,
            ring=parts.engine.recorder.ring() if observers.wants_detail() else None,
            saver=saved.saver,
            log=saved.log,
            replayed=saved.replayed,
        ).run()
        peak.check(runtime, config, parts)
    except CollectiveTimeout as error:
        if hangs is not None:
            with contextlib.suppress(Exception):  # the error must be told all the same
                hangs.timed_out(error)
        _ended(observers, "failed", "a collective is stuck")
        raise
    except StoppedError as stop:
        unsaved = _unsaved(saved)
        text = "; ".join(filter(None, (str(stop), unsaved)))
        _ended(observers, "interrupted", text)
        _say(runtime, text)
        return UNSAVED if unsaved and stop.status == LEFT else stop.status
    except NonFiniteError as error:  # on all ranks alike, so one line tells it
        _ended(observers, "failed", str(error))
        _say(runtime, f"error: {error}")
        return 1
    except BaseException as error:
        told = isinstance(error, HpcsyncError)
        reason = str(error) if told else f"{type(error).__name__}: {error}"
        _ended(observers, "failed", reason.partition("\n")[0])
        raise
    finally:
        if hangs is not None:
            hangs.close()
        if saved is not None:
            saved.close()
    unsaved = _unsaved(saved)
    observers.ended("interrupted" if reason else "done", "; ".join(filter(None, (reason, unsaved))))
    for text in filter(None, (reason, unsaved)):
        _say(runtime, text)
    return UNSAVED if unsaved else 0


def _folder(
    runtime: Runtime, config: Config, arguments: Arguments, plan: Plan, signals: StopSignals
) -> tuple[Path, str]:
    """The run folder, made or taken over by rank 0, and a new id of the run; collective."""
    from . import assembly, run_folder

    def make() -> Path | None:
        if runtime.rank != 0:
            return None
        if plan.folder is None:
            return run_folder.make(config, arguments)
        return run_folder.reuse(plan.folder, config)

    made = assembly.together(runtime, signals, "run folder", make)
    folder, run_id = runtime.bcast((made, secrets.token_hex(4)))
    return folder, run_id


def _unsaved(saved: Saving | None) -> str:
    """What is to be told if the last checkpoint was not saved."""
    failed = saved is not None and saved.saver.failed
    return "the last checkpoint was not saved" if failed else ""


def _ended(observers: Observers, status: str, detail: str) -> None:
    """Tell that the run ended badly; what fails in that must not hide why it did."""
    try:
        observers.ended(status, detail)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        print(f"hpcsync: warning: the run's files are not complete: {text}", file=sys.stderr)


def _info(
    runtime: Runtime,
    config: Config,
    parts: Parts,
    folder: Path,
    run_id: str,
    checkpoint_step: int | None = None,
) -> RunInfo:
    from .observers import RunInfo

    source = parts.source
    return RunInfo(
        folder=folder,
        rank=runtime.rank,
        ranks=runtime.size,
        nodes=runtime.topology.node_count,
        host=runtime.host,
        steps=config.train.steps,
        tokens_per_step=config.train.global_batch * source.tokens_per_sample,
        unit=source.unit,
        val_unit="bits/byte" if source.unit == "byte" else "nats",
        codec=config.compress.codec,
        algorithm=parts.parallel.reducer.algorithm,
        every_s=config.log.every_s,
        first_step=parts.engine.step_count,
        checkpoint_step=checkpoint_step,
        run_id=run_id,
        node=runtime.topology.node_of(runtime.rank),
        local_rank=runtime.local_rank,
    )


def _say(runtime: Runtime, text: str) -> None:
    if runtime.rank == 0:
        print(f"hpcsync: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
