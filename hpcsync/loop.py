"""The training loop: steps, agreements, checkpoints and evaluations.

[ checkpoint of the state as it is -> data -> step -> agreement -> held-out loss -> observers ]*
"""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import torch

from . import config as configs
from . import data
from .assembly import Parts
from .checkpoint.saver import Saver
from .config import Config
from .engine import Batch, StepResult, memory_errors
from .errors import NonFiniteError
from .launch import Runtime
from .observers import Observers, RunInfo, StepRecord
from .observers.detail import of_step
from .parallel.data_parallel import broadcast_tensors
from .stopping import StoppedError, StopSignals
from .trace.recorder import AGREEMENT, DATA, Ring, now
from .wording import ranges

if TYPE_CHECKING:
    from .checkpoint.replay import ReplayLog

_SAVE_S = 25.0  # for a last checkpoint after a signal; batch systems kill after 30 s or more


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """Steps, agreements and evaluations, until the last step or a signal.

    Attributes:
        ring: of this rank's spans, where somebody wants details of steps.
        saver: of checkpoints, if there are to be any.
        log: of steps, to be replayed by a resumed run.
        replayed: steps that were replayed from the log, on this rank.
    """

    runtime: Runtime
    config: Config
    parts: Parts
    info: RunInfo
    observers: Observers
    signals: StopSignals
    ring: Ring | None = None
    saver: Saver | None = None
    log: ReplayLog | None = None
    replayed: Sequence[StepResult] = ()

    def run(self) -> str:
        """Train to the end; why it ended before the last step, if it was asked to.

        Raises:
            StoppedError: a rank received a signal.
            NonFiniteError: a loss was NaN or Inf, or too many gradients in a row were.
        """
        train, engine, saver = self.config.train, self.parts.engine, self.saver
        if train.eval_every and engine.step_count == 0:
            self.observers.evaluated(0, self.held_out())
        if self.replayed:
            self.catch_up()
        told: tuple[int, ...] = ()
        stopping = False
        while engine.step_count < train.steps and not told and not stopping:
            record, told = self.step()
            if told:
                self.signals.allow(_SAVE_S)
            # Who leaves in time leaves what a run that was not told to stop would have done.
            if told in ((), (signal.SIGUSR2,)) and self.due(record.step):
                self.observers.evaluated(record.step, self.held_out())
            self.measure(record)
            self.observers.stepped(record)
            engine.check_skipped()
            if saver is not None and saver.stop:
                saver.finish(record.step, save=True)
                stopping = not saver.failed
        if saver is not None:
            leaving = signal.SIGUSR2 in told
            saver.finish(engine.step_count, save=self.config.checkpoint.at_end or leaving)
        if told and not (told == (signal.SIGUSR2,) and engine.step_count == train.steps):
            raise StoppedError(told[0])
        asked = stopping and engine.step_count < train.steps
        return "stopped after a checkpoint, as the file stop-after-save asked" if asked else ""

    def due(self, step: int) -> bool:
        """Whether the held-out loss after a step is wanted."""
        train = self.config.train
        return step == train.steps or bool(train.eval_every and step % train.eval_every == 0)

    def catch_up(self) -> None:
        """Do what the lost run did after the steps that were replayed, or would have done:
        collective.

        Raises:
            NonFiniteError: as it did.
        """
        bad = [float(not math.isfinite(result.loss)) for result in self.replayed]
        found = zip(self.replayed, self.runtime.allreduce_scalar(bad), strict=True)
        hint = (
            "; the step was replayed from the log: checkpoint.replay_log=false goes on from the "
            "checkpoint without it"
        )
        for result, ranks in found:
            if ranks:
                self._refuse(result, hint)
        step = self.parts.engine.step_count
        if self.due(step):
            self.observers.evaluated(step, self.held_out())
        self.parts.engine.check_skipped()

    def step(self) -> tuple[StepRecord, tuple[int, ...]]:
        """One step on all ranks; also the signals that any of them received, most urgent first."""
        runtime, parts, step = self.runtime, self.parts, self.parts.sampler.step
        start = now()
        recorder = parts.engine.recorder
        recorder.begin_step(step + 1)
        stalled_s = self.saver.boundary(step) if self.saver is not None else 0.0
        torch.manual_seed(data.step_seed(self.config.run.seed, step, runtime.rank))
        count = self.config.train.accumulate
        codec = parts.parallel.reducer.codec
        with memory_errors(f"step {step + 1}"):
            began = now()
            batches: list[Batch] = [
                parts.source.train_batch(
                    parts.sampler.shard(step, runtime.rank, runtime.size, micro, count)
                )
                for micro in range(count)
            ]
            recorder.add(DATA, began, now())
            result = parts.engine.step(batches)
        parts.sampler.advance()
        if self.log is not None:
            self.log.record(result)
        return self.agree(result, start, codec, stalled_s)

    def agree(
        self, result: StepResult, start: int, codec: str, stalled_s: float = 0.0
    ) -> tuple[StepRecord, tuple[int, ...]]:
        """Means over the ranks, and whether to go on: one small allreduce after the optimizer.

        Its time is that of waiting for the slowest rank's optimizer, and told apart.

        Raises:
            NonFiniteError: the loss of any rank is NaN or Inf; on all ranks.
        """
        size, comm, saver = self.runtime.size, self.parts.parallel.reducer.stats, self.saver
        received = self.signals.received
        values = [
            *(result.loss, not math.isfinite(result.loss)),
            *(comm.comm_ms, comm.exposed_comm_ms + comm.driven_ms, comm.internode_bytes),
            *(received == number for number in (signal.SIGINT, signal.SIGTERM)),
            self.signals.leave,
            *(saver.offer(result.step) if saver is not None else ()),
        ]
        before = now()
        if size > 1:
            values = self.runtime.allreduce_scalar(values)
        ended = now()
        recorder = self.parts.engine.recorder
        recorder.add(AGREEMENT, before, ended)
        recorder.end_step(start)
        loss, bad, comm_ms, exposed_ms, internode, interrupted, terminated, left, *told = values
        if saver is not None:
            saver.hear(told)
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
            compute_ms=step_ms - exposed_ms - waited_ms - stalled_s * 1e3,
            comm_ms=comm_ms / size,
            exposed_comm_ms=exposed_ms,
            wait_ms=waited_ms,
            tokens_per_s=self.info.tokens_per_step / step_ms * 1e3,
            internode_bytes=internode,
            loss_scale=result.loss_scale,
            skipped=result.skipped,
            codec=codec,
            checkpoint_ms=stalled_s * 1e3,
            checkpoints_failed=saver.failures if saver is not None else 0,
        )
        ranks_of = (
            (signal.SIGTERM, terminated),
            (signal.SIGINT, interrupted),
            (signal.SIGUSR2, left),
        )
        return record, tuple(int(number) for number, ranks in ranks_of if ranks)

    def measure(self, record: StepRecord) -> None:
        """Tell the observers what this rank's spans say of the step."""
        if self.ring is None:
            return
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

    def _refuse(self, result: StepResult, hint: str = "") -> NoReturn:
        losses = self.runtime.allgather_object(result.loss)
        ranks = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        where = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranges(ranks)}"
        raise NonFiniteError(
            f"step {result.step}: the loss is {losses[ranks[0]]} on {where}; lower train.lr, set "
            f"train.clip_norm, or look for bad samples{hint}"
        )
