"""``python -m hpcsync.train``: the training loop and its wiring.

    arguments -> rank 0 reads the deck -> parts -> run folder -> observers
              -> [ data, step, agreement, held-out loss, observers ]* -> summary

Nothing heavy is imported before the arguments are understood.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import secrets
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from . import config as configs
from .arguments import Arguments, parse
from .config import Config, TopologyConfig
from .errors import CollectiveTimeout, HpcsyncError, NonFiniteError, UserError
from .stopping import StoppedError, StopSignals

if TYPE_CHECKING:
    from .assembly import Parts
    from .engine import Batch, StepResult
    from .launch import Runtime
    from .observers import Observers, RunInfo, StepRecord
    from .trace.recorder import Ring


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
            try:
                print(_answer(arguments))
            except UserError:
                if _launched_as() == 0:
                    raise
                return 2
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
    if _launched_as() == 0:
        return contextlib.nullcontext()
    return contextlib.redirect_stdout(io.StringIO())


def _launched_as() -> int:
    """This process's rank as its launcher tells it, before there is an MPI to ask."""
    names = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
    told = next((os.environ[name] for name in names if name in os.environ), "0")
    return int(told) if told.isdigit() else 0


def run(argv: Sequence[str]) -> int:
    """Train on all ranks of this job; returns the exit status."""
    from . import launch, observers

    with launch.start(TopologyConfig()) as job:
        arguments, config = _read(job, argv)
    with launch.start(config.topology, config.comm.timeout_s) as runtime:
        watchers = observers.standard(runtime.rank, config.metrics)

        def give_up(status: int) -> None:
            _say(runtime, "the step did not end in time after the signal; ending without it")
            if runtime.size == 1:  # nobody else to end, and MPI_Abort would be loud
                os._exit(status)
            launch.abort(status)

        with StopSignals(watchers.interrupted, give_up) as signals:
            return train(runtime, config, arguments, watchers, signals)


def _read(runtime: Runtime, argv: Sequence[str]) -> tuple[Arguments, Config]:
    """Rank 0 reads command line and deck, and tells the others."""
    from .launch import AgreedError

    outcome: tuple[Arguments, Config] | str = ""
    if runtime.rank == 0:
        try:
            arguments = parse(argv)
            config = configs.load(arguments.deck, arguments.overrides)
            configs.check_ranks(config, runtime.size)
            outcome = (arguments, config)
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
    observers: Observers,
    signals: StopSignals,
) -> int:
    """Build everything, train, and tell the observers how it ended."""
    from . import assembly, banner, run_folder
    from .hangs import Hangs

    hangs: Hangs | None = None

    try:
        parts = assembly.assemble(runtime, config, signals)
        made = assembly.together(
            runtime,
            signals,
            "run folder",
            lambda: run_folder.make(config, arguments) if runtime.rank == 0 else None,
        )
        folder, run_id = runtime.bcast((made, secrets.token_hex(4)))
        info = _info(runtime, config, parts, folder, run_id)
        observers.join(assembly.traces(config, parts, info.run_id))
        hangs = Hangs(parts.parallel.collectives, folder / "trace", run_id)
        signals.on_quit = hangs.signalled
        observers.started(info)
        if runtime.rank == 0:
            rows = [*assembly.describe(runtime, config, parts), ("run", str(info.folder))]
            print(banner.render(rows), flush=True)
        Loop(
            runtime=runtime,
            config=config,
            parts=parts,
            info=info,
            observers=observers,
            signals=signals,
            ring=parts.engine.recorder.ring() if observers.wants_detail() else None,
        ).run()
    except CollectiveTimeout as error:
        if hangs is not None:
            with contextlib.suppress(Exception):  # the error must be told all the same
                hangs.timed_out(error)
        _ended(observers, "failed", "a collective is stuck")
        raise
    except StoppedError as stop:
        _ended(observers, "interrupted", str(stop))
        _say(runtime, str(stop))
        return stop.status
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
    observers.ended("done", "")
    return 0


def _ended(observers: Observers, status: str, detail: str) -> None:
    """Tell that the run ended badly; what fails in that must not hide why it did."""
    try:
        observers.ended(status, detail)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        print(f"hpcsync: warning: the run's files are not complete: {text}", file=sys.stderr)


def _info(runtime: Runtime, config: Config, parts: Parts, folder: Path, run_id: str) -> RunInfo:
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
        run_id=run_id,
        node=runtime.topology.node_of(runtime.rank),
        local_rank=runtime.local_rank,
    )


def _say(runtime: Runtime, text: str) -> None:
    if runtime.rank == 0:
        print(f"hpcsync: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """Steps, agreements and evaluations, until the last step or a signal."""

    runtime: Runtime
    config: Config
    parts: Parts
    info: RunInfo
    observers: Observers
    signals: StopSignals
    ring: Ring | None = None  # of this rank's spans, where somebody wants details of steps

    def run(self) -> None:
        """Train to the end.

        Raises:
            StoppedError: a rank received a signal.
            NonFiniteError: a loss was NaN or Inf, or too many gradients in a row were.
        """
        train, engine = self.config.train, self.parts.engine
        if train.eval_every and engine.step_count == 0:
            self.observers.evaluated(0, self.held_out())
        while engine.step_count < train.steps:
            record, number = self.step()
            due = train.eval_every and record.step % train.eval_every == 0
            if not number and (due or record.step == train.steps):
                self.observers.evaluated(record.step, self.held_out())
            self.measure(record)
            self.observers.stepped(record)
            engine.check_skipped()
            if number:
                raise StoppedError(number)

    def step(self) -> tuple[StepRecord, int]:
        """One step on all ranks; also the signal that any of them received, or 0."""
        import torch

        from . import data
        from .engine import memory_errors
        from .trace.recorder import DATA, now

        runtime, parts, step = self.runtime, self.parts, self.parts.sampler.step
        start = now()
        recorder = parts.engine.recorder
        recorder.begin_step(step + 1)
        torch.manual_seed(data.step_seed(self.config.run.seed, step, runtime.rank))
        count = self.config.train.accumulate
        codec = parts.parallel.reducer.codec
        with memory_errors(f"step {step + 1}"):
            batches: list[Batch] = [
                parts.source.train_batch(
                    parts.sampler.shard(step, runtime.rank, runtime.size, micro, count)
                )
                for micro in range(count)
            ]
            recorder.add(DATA, start, now())
            result = parts.engine.step(batches)
        parts.sampler.advance()
        return self.agree(result, start, codec)

    def agree(self, result: StepResult, start: int, codec: str) -> tuple[StepRecord, int]:
        """Means over the ranks, and whether to go on: one small allreduce after the optimizer.

        Its time is that of waiting for the slowest rank's optimizer, and told apart.

        Raises:
            NonFiniteError: the loss of any rank is NaN or Inf; on all ranks.
        """
        from .observers import StepRecord
        from .trace.recorder import AGREEMENT, now

        size, comm = self.runtime.size, self.parts.parallel.reducer.stats
        received = self.signals.received
        values = [
            *(result.loss, not math.isfinite(result.loss)),
            *(comm.comm_ms, comm.exposed_comm_ms + comm.driven_ms, comm.internode_bytes),
            *(received == number for number in (signal.SIGINT, signal.SIGTERM)),
        ]
        before = now()
        if size > 1:
            values = self.runtime.allreduce_scalar(values)
        ended = now()
        recorder = self.parts.engine.recorder
        recorder.add(AGREEMENT, before, ended)
        recorder.end_step(start)
        loss, bad, comm_ms, exposed_ms, internode, interrupted, terminated = values
        if bad:
            self._refuse(result)
        step_ms = (ended - start) / 1e6
        waited_ms = (ended - before) / 1e6 if size > 1 else 0.0
        exposed_ms /= size
        record = StepRecord(
            step=result.step,
            loss=loss / size,
            lr=result.lr,
            grad_norm=result.grad_norm,
            step_ms=step_ms,
            compute_ms=step_ms - exposed_ms - waited_ms,
            comm_ms=comm_ms / size,
            exposed_comm_ms=exposed_ms,
            wait_ms=waited_ms,
            tokens_per_s=self.info.tokens_per_step / step_ms * 1e3,
            internode_bytes=internode,
            loss_scale=result.loss_scale,
            skipped=result.skipped,
            codec=codec,
        )
        number = signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0
        return record, int(number)

    def measure(self, record: StepRecord) -> None:
        """Tell the observers what this rank's spans say of the step."""
        if self.ring is None:
            return
        from .observers.detail import of_step

        found = self.ring.take()
        plain = self.parts.parallel.reducer.plain_bytes()
        codecs = dict.fromkeys(plain, "none") | {
            level: record.codec for level in plain if level in ("rail", "world")
        }
        self.observers.measured(of_step(found[found["step"] == record.step], codecs, plain))

    def held_out(self) -> float:
        """Held-out loss in ``RunInfo.val_unit``, the same on every rank; collective.

        The samples do not depend on the number of ranks.
        """
        from . import data
        from .engine import memory_errors
        from .parallel.data_parallel import broadcast_tensors

        runtime, train, source = self.runtime, self.config.train, self.parts.source
        # Running means differ between ranks until the next step begins.
        broadcast_tensors(runtime, list(self.parts.model.buffers()))
        wanted = data.spread(source.val_size, train.eval_batches * train.global_batch)
        mine = wanted[runtime.rank :: runtime.size]
        micro = configs.micro_batch(self.config, runtime.size)
        with memory_errors("held-out loss"):
            sums = self.parts.engine.evaluate(
                source.val_batch(mine[at : at + micro]) for at in range(0, len(mine), micro)
            )
        total, count = runtime.allreduce_scalar(sums)
        return total / count / (math.log(2) if source.unit == "byte" else 1.0)

    def _refuse(self, result: StepResult) -> NoReturn:
        from .wording import ranges

        losses = self.runtime.allgather_object(result.loss)
        ranks = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        where = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranges(ranks)}"
        raise NonFiniteError(
            f"step {result.step}: the loss is {losses[ranks[0]]} on {where}; lower train.lr, set "
            "train.clip_norm, or look for bad samples"
        )


if __name__ == "__main__":
    main()
