"""The training loop: steps, agreements, checkpoints and evaluations.

[ checkpoint of the state as it is -> data -> step -> agreement -> held-out loss -> observers ]*

Where a device makes a step's numbers they come with the next step (``engine.lag``), and so does
what the agreement says of them; before anything that wants the weights of a step its own are
waited for.
"""

from __future__ import annotations

import math
import signal
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch

from . import config as configs
from . import data
from .assembly import Parts
from .checkpoint.saver import Saver
from .config import Config
from .engine import Batch, StepResult
from .errors import NonFiniteError
from .exhausted import memory_errors
from .gradients.stats import Comm
from .launch import Runtime
from .observers import Observers, RunInfo, StepRecord
from .observers.detail import of_step
from .parallel.data_parallel import broadcast_tensors
from .stopping import StoppedError, StopSignals
from .trace.events import EVENT, Events
from .trace.recorder import AGREEMENT, DATA, Ring, now
from .wording import ranges

if TYPE_CHECKING:
    from .checkpoint.replay import ReplayLog

_SAVE_S = 25.0  # for a last checkpoint after a signal; batch systems kill after 30 s or more


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """A step whose work was given, and whose record is to come.

    Attributes:
        start: when the step began, of ``now()``.
        codec: of its gradients.
        stalled_s: that it stood still for checkpoints.
        comm: what its exchange costs; to be read with its result.
    """

    step: int
    start: int
    codec: str
    stalled_s: float
    comm: Comm


@dataclass(slots=True)
class Carried:
    """What goes from step to step.

    Attributes:
        given: steps without a record yet.
        ended: when the last record was made.
        events: spans of steps without a record.
    """

    given: deque[Given] = field(default_factory=deque)
    ended: int = 0
    events: Events = field(default_factory=lambda: np.empty(0, EVENT))


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
    carried: Carried = field(default_factory=Carried)

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
            records, told = self.step()
            if told:
                self.signals.allow(_SAVE_S)
            # Who leaves in time leaves what a run that was not told to stop would have done.
            wanted = told in ((), (signal.SIGUSR2,)) and self.due(engine.step_count)
            for record in records:
                if wanted and record.step == engine.step_count:
                    self.observers.evaluated(record.step, self.held_out())
                self.measure(record)
                self.observers.stepped(record)
            engine.check_skipped()
            if saver is not None and saver.stop:
                saver.finish(engine.step_count, save=True)
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

    def step(self) -> tuple[list[StepRecord], tuple[int, ...]]:
        """One step on all ranks: the records that it brings; also the signals that any rank
        received, most urgent first."""
        runtime, parts, step = self.runtime, self.parts, self.parts.sampler.step
        engine = parts.engine
        start = now()
        engine.recorder.begin_step(step + 1)
        stalled_s = self.saver.boundary(step) if self.saver is not None else 0.0
        torch.manual_seed(data.step_seed(self.config.run.seed, step, runtime.rank))
        count = self.config.train.accumulate
        codec = parts.parallel.reducer.codec
        with memory_errors(f"step {step + 1}"), engine.streams.range(f"step {step + 1}"):
            began = now()
            batches: list[Batch] = [
                parts.source.train_batch(
                    parts.sampler.shard(step, runtime.rank, runtime.size, micro, count)
                )
                for micro in range(count)
            ]
            engine.recorder.add(DATA, began, now())
            result = engine.step(batches)
        parts.sampler.advance()
        comm = parts.parallel.reducer.stats
        self.carried.given.append(
            Given(step=step + 1, start=start, codec=codec, stalled_s=stalled_s, comm=comm)
        )
        if self.log is not None and result is not None:
            self.log.record(result)
        record, told = self.agree(result)
        records = [record] if record is not None else []
        if self.carried.given and self._wants_weights(told):
            record, _ = self.agree(engine.flush())
            assert record is not None
            records.append(record)
        return records, told

    def _wants_weights(self, told: tuple[int, ...]) -> bool:
        """Whether something is about to be done with the weights as they are now, on all ranks."""
        step, saver = self.parts.engine.step_count, self.saver
        saves = saver is not None and (saver.presses or saver.stop)
        return bool(told) or self.due(step) or saves

    def agree(self, result: StepResult | None) -> tuple[StepRecord | None, tuple[int, ...]]:
        """Means over the ranks, and whether to go on: one small allreduce after the optimizer.

        Its time is that of waiting for the slowest rank's optimizer, and told apart; where results
        lag, nobody's device waits meanwhile.

        Args:
            result: of the first step without a record; None if it is not there yet.

        Raises:
            NonFiniteError: the loss of any rank is NaN or Inf; on all ranks.
        """
        runtime, saver, engine = self.runtime, self.saver, self.parts.engine
        given = self.carried.given.popleft() if result is not None else None
        numbers = _numbers(result, given)
        values = [
            *numbers,
            *(self.signals.received == number for number in (signal.SIGINT, signal.SIGTERM)),
            self.signals.leave,
            *(saver.offer(engine.step_count) if saver is not None else ()),
        ]
        before = now()
        if runtime.size > 1:
            values = runtime.allreduce_scalar(values)
        ended = now()
        if not engine.lag and given is not None:
            engine.recorder.add(AGREEMENT, before, ended)
            engine.recorder.end_step(given.start)
        interrupted, terminated, left, *heard = values[len(numbers) :]
        if saver is not None:
            saver.hear(heard)
        record: StepRecord | None = None
        if result is not None and given is not None:
            waited_ms = (ended - before) / 1e6 if runtime.size > 1 and not engine.lag else 0.0
            record = self._record(result, given, values[: len(numbers)], ended, waited_ms)
        ranks_of = (
            (signal.SIGTERM, terminated),
            (signal.SIGINT, interrupted),
            (signal.SIGUSR2, left),
        )
        return record, tuple(int(number) for number, ranks in ranks_of if ranks)

    def _record(
        self,
        result: StepResult,
        given: Given,
        sums: Sequence[float],
        ended: int,
        waited_ms: float,
    ) -> StepRecord:
        """A step's record from sums over all ranks of ``_numbers``."""
        loss, bad, comm_ms, exposed_ms, internode = sums
        if bad:
            self._refuse(result)
        size, saver = self.runtime.size, self.saver
        # A step that was given while the one before ran has its own time from that one's end on.
        step_ms = (ended - max(given.start, self.carried.ended)) / 1e6
        self.carried.ended = ended
        exposed_ms /= size
        return StepRecord(
            step=result.step,
            loss=loss / size,
            lr=result.lr,
            grad_norm=result.grad_norm,
            step_ms=step_ms,
            compute_ms=step_ms - exposed_ms - waited_ms - given.stalled_s * 1e3,
            comm_ms=comm_ms / size,
            exposed_comm_ms=exposed_ms,
            wait_ms=waited_ms,
            tokens_per_s=self.info.tokens_per_step / step_ms * 1e3,
            internode_bytes=internode,
            loss_scale=result.loss_scale,
            skipped=result.skipped,
            codec=given.codec,
            checkpoint_ms=given.stalled_s * 1e3,
            checkpoints_failed=saver.failures if saver is not None else 0,
        )

    def measure(self, record: StepRecord) -> None:
        """Tell the observers what this rank's spans say of the step."""
        if self.ring is None:
            return
        found = np.concatenate([self.carried.events, self.ring.take()])
        self.carried.events = found[found["step"] > record.step]
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


def _numbers(result: StepResult | None, given: Given | None) -> list[float]:
    """What is added over all ranks of a step; zeros if its result is not there yet."""
    if result is None or given is None:
        return [0.0] * 5
    comm = given.comm
    return [
        *(result.loss, not math.isfinite(result.loss)),
        *(comm.comm_ms, comm.exposed_comm_ms + comm.driven_ms, comm.internode_bytes),
    ]
