"""Saving while training goes on.

    main thread, at the beginning of a step           thread of each rank

    due on rank 0, and a buffer is free
      -> state -> this rank's share of it into          -> its bytes into a file, hashed, fsync
         a host buffer (the only stall)
    all ranks have written (a number that rode on
      the agreement of a step) -> what each wrote,
      to rank 0                                         -> rank 0: index, manifest, fsync, the
                                                           folder's final name, ``latest``, prune
    rank 0 has (another such number) -> told

Threads do not communicate. Two buffers: a checkpoint may be taken while the one before is written;
when both are in use, the next is taken as soon as one is free. Whatever fails on whichever rank,
training goes on, and what was written aside is removed.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import CheckpointConfig
from ..errors import CollectiveTimeout
from ..intervals import parse
from ..runtime import Runtime
from ..trace.recorder import CHECKPOINT, Recorder, now
from . import folder as folders
from .contract import About, Outcome, StepLog, Taken
from .files import Files, Share
from .layout import TensorMeta
from .manifest import Document, own_prefix
from .publisher import Publisher, in_one_line, say
from .snapshot import Filled, HostBuffer
from .state import Flat, flatten
from .triggers import Triggers
from .worker import Worker
from .writer import Part

_PAUSE_S = 0.005
_CLOSE_S = 1.0
_TELL_S = 10.0  # of waiting for a disk, before it is told


@dataclass(slots=True, kw_only=True)
class _Save:
    """A checkpoint under way; the thread sets ``written`` or ``problem``, then ``done``."""

    step: int
    buffer: HostBuffer
    taken_s: float
    stall_s: float = 0.0
    nbytes: int = 0
    common: Flat | None = None
    own: Flat | None = None
    written: Part | None = None
    problem: str = ""
    done: bool = False
    parts: list[Any] = field(default_factory=list)


class Saver:
    """Takes and writes the checkpoints of a run. ``boundary``, ``finish`` and ``drain`` are
    collective.

    Args:
        folder: of the run.
        state: gives the state as it is; collective.
        first_only: names of tensors of ``common`` that may differ between ranks: rank 0's count.
        told: called on all ranks when a checkpoint is whole, or has failed.
        saved_step: the step of the checkpoint that the run goes on from.

    Attributes:
        log: what is told of checkpoints besides; see ``StepLog``.
        failed: the last checkpoint was not saved.
        failures: how many were not.
    """

    def __init__(
        self,
        runtime: Runtime,
        config: CheckpointConfig,
        folder: Path,
        state: Callable[[], Taken],
        about: About,
        *,
        first_only: Collection[str] = (),
        told: Callable[[Outcome], None] = lambda outcome: None,
        recorder: Recorder | None = None,
        saved_step: int = -1,
        pinned: bool = False,
    ) -> None:
        self._runtime, self._config, self._about = runtime, config, about
        self._state, self._told, self._recorder = state, told, recorder
        self._checkpoints = folder / folders.FOLDER
        self._triggers = Triggers(parse(config.every), folder, config.mtbf_h * 3600)
        self._publisher = Publisher(self._checkpoints, config)
        self._files = Files(runtime, first_only, of_nodes=config.files == "node")
        self._worker = Worker("hpcsync-checkpoint")
        self._free = [HostBuffer(pinned), HostBuffer(pinned)]
        self._writing: deque[_Save] = deque()
        self._publishing: deque[_Save] = deque()
        self._heard = [0.0] * self.NUMBERS
        self._due = self._stop = self._crowded = self._awaited = False
        self._last_step, self._good_step, self._ended_step = saved_step, saved_step, -1
        self._offered_step = -1
        self.asked = False
        self.log: StepLog | None = None
        self.failed = False
        self.failures = 0

    NUMBERS = 6  # that ride on a step's agreement

    @property
    def stop(self) -> bool:
        """The file ``stop-after-save`` asks to save and stop."""
        return self._stop

    @property
    def presses(self) -> bool:
        """A checkpoint is due at the next step boundary; the same on all ranks."""
        return self._due

    def ask(self) -> None:
        """Save at the next step boundary; any rank may, at any time."""
        self.asked = True

    def require(self, *, whole: bool = False) -> None:
        """Save at the next step boundary; to be called on all ranks.

        Args:
            whole: do not go on before it is known to be on disk, or to have failed.
        """
        self._due, self._awaited = True, whole

    def offer(self, step: int | None = None) -> list[float]:
        """What this rank has to say, to be added over all ranks.

        Args:
            step: that has just ended; None between steps. A step may be told again.
        """
        asked, self.asked = self.asked, False
        due = stop = False
        if self._runtime.rank == 0 and step is not None:
            if step != self._offered_step:
                due = self._triggers.due(step, writing=bool(self._writing or self._publishing))
            self._offered_step = step
            stop = self._triggers.stop
        written = self._writing[0] if self._writing else None
        whole = self._publishing[0] if self._publishing else None
        return [
            float(due or asked),
            float(stop),
            *(float(each is not None and each.done) for each in (written, whole)),
            *(float(each is not None and each.problem != "") for each in (written, whole)),
        ]

    def hear(self, sums: Sequence[float]) -> None:
        """The sums over all ranks of what they offered."""
        self._heard = list(sums)
        self._due = self._due or sums[0] > 0
        self._stop = self._stop or sums[1] > 0

    def boundary(self, step: int) -> float:
        """Between two steps: go on with what is under way, take what is due.

        Returns:
            Seconds for which training stood still.
        """
        start = now()
        self._advance()
        if self._due and step != self._last_step and self._has_room():
            self._take(step)
        elif step == self._last_step:
            self._due = False
        if self._awaited or not self._config.async_:
            self._awaited = False
            self.drain()
        return (now() - start) / 1e9

    def finish(self, step: int, *, save: bool) -> None:
        """At the end: wait for what is under way, and save once more if that is wanted."""
        if (save or self._due) and step != self._last_step:
            if not self._free:
                self.drain()
            self._take(step)
        self.drain()

    def drain(self) -> None:
        """Wait until nothing is under way."""
        began, said = time.monotonic(), False
        while self._writing or self._publishing:
            self.hear(self._runtime.allreduce_scalar(self.offer()))
            self._advance()
            if not said and time.monotonic() - began > _TELL_S:
                said = True
                self._say("waiting for a checkpoint to be on disk")
            time.sleep(_PAUSE_S)

    def close(self) -> None:
        """Stop the thread; what is being written may stay unfinished, and is no checkpoint then."""
        self._worker.close(_CLOSE_S)

    def _has_room(self) -> bool:
        if not self._free and not self._crowded:
            self._crowded = True
            self._say(
                "warning: two checkpoints are still being written; the one that is due will be "
                "taken later (checkpoint.every is shorter than writing takes)"
            )
        return bool(self._free)

    def _take(self, step: int) -> None:
        """Copy this rank's share and have it written."""
        start = now()
        self._due, self._last_step = False, step
        save = _Save(step=step, buffer=self._free.pop(), taken_s=time.monotonic())
        common, own = self._state()
        share: Share | None = None
        filled: list[Filled] = []
        try:
            save.common = flatten(common)
            save.own = flatten(own, own_prefix(self._runtime.rank))
        except Exception as error:
            save.problem = in_one_line(error)
        # Collective where ranks share a file, so that no rank may leave it out.
        try:
            share = self._files.share(save.common, save.own)
        except CollectiveTimeout:
            raise
        except Exception as error:
            save.problem = save.problem or in_one_line(error)
        if share is not None and not save.problem:
            try:
                tensors = save.common.tensors | save.own.tensors  # type: ignore[union-attr]
                filled = save.buffer.fill(tensors, share.pieces)
                save.nbytes = sum(piece.nbytes for piece in share.pieces)
            except Exception as error:  # no memory, say
                save.problem = in_one_line(error)
        self._writing.append(save)
        if save.problem or share is None:
            save.problem = save.problem or "another rank's state cannot be stored"
            save.done = True
        else:
            self._worker.submit(lambda: self._write(save, share, filled))
        if self._runtime.rank == 0:
            self._triggers.taken(step)
        if self.log is not None:
            self.log.start(step)
        save.stall_s = (now() - start) / 1e9
        if self._recorder is not None:
            self._recorder.add(CHECKPOINT, start, now(), save.nbytes)

    def _write(self, save: _Save, share: Share, filled: list[Filled]) -> None:
        aside = folders.aside(self._checkpoints, save.step)
        try:
            aside.mkdir(parents=True, exist_ok=True)
            save.written = self._files.writer.write(aside, share.datasets, filled)
        except Exception as error:
            save.problem = in_one_line(error, aside)
        finally:
            save.done = True

    def _advance(self) -> None:
        """Go on with the oldest ones, as far as all ranks agreed."""
        _, _, written, whole, unwritten, unpublished = self._heard
        self._heard = [0.0] * self.NUMBERS
        if self._publishing and whole == self._runtime.size:
            save = self._publishing.popleft()
            self._end(save, unpublished > 0)
        if self._writing and written == self._runtime.size:
            save = self._writing.popleft()
            self._free.append(save.buffer)
            if unwritten:
                self._end(save, True)
            else:
                self._collect(save)

    def _collect(self, save: _Save) -> None:
        """Rank 0 gets to know what each rank has written, and publishes."""
        assert save.own is not None
        metas = self._files.metas(save.own)
        parts = self._runtime.gather_object((save.written, save.own.skeleton, metas))
        save.done = self._runtime.rank != 0
        if parts is not None:
            assert save.common is not None
            skeletons = [skeleton for _, skeleton, _ in parts]
            document = self._about.document(
                save.step, self._runtime.topology.nodes, save.common.skeleton, skeletons
            )
            every = [*self._files.metas(save.common), *(m for _, _, own in parts for m in own)]
            written = [part for part, _, _ in parts]
            self._worker.submit(lambda: self._publish(save, document, every, written), first=True)
        save.common = save.own = None  # they keep what was trained alive
        self._publishing.append(save)

    def _publish(
        self, save: _Save, document: Document, metas: list[TensorMeta], parts: list[Part]
    ) -> None:
        try:
            save.problem = self._publisher.publish(document, metas, parts)
        finally:
            save.done = True

    def _end(self, save: _Save, failed: bool) -> None:
        """A checkpoint is whole, or has failed somewhere."""
        problem = self._tell(save) if failed else ""
        outcome = Outcome(
            step=save.step,
            problem=problem,
            nbytes=save.nbytes,
            stall_s=save.stall_s,
            durable_s=time.monotonic() - save.taken_s,
        )
        if save.step >= self._ended_step:  # one that cannot be written may overtake the one before
            self._ended_step, self.failed = save.step, failed
        if failed:
            self.failures += 1
            self._triggers.failed(save.step)
            self._stop = False
        else:
            self._good_step, self._crowded = max(self._good_step, save.step), False
            self._triggers.saved(save.step, outcome.stall_s, outcome.durable_s)
            if self.log is not None:
                self.log.published(save.step)
        self._told(outcome)

    def _tell(self, save: _Save) -> str:
        """Warn of a checkpoint that failed, and have its rest removed; why it did."""
        found = self._runtime.allgather_object(save.problem)
        rank, problem = next((each for each in enumerate(found) if each[1]), (0, ""))
        where = f"rank {rank}: " if self._runtime.size > 1 else ""
        last = (
            f"the last one is step {self._good_step}" if self._good_step >= 0 else "there is none"
        )
        self._say(
            f"WARNING: the checkpoint of step {save.step} was NOT saved: {where}{problem}; "
            f"training goes on, {last}"
        )
        if self._runtime.local_rank == 0:  # the folder may be on a disk of the node
            aside = folders.aside(self._checkpoints, save.step)
            self._worker.submit(lambda: shutil.rmtree(aside, ignore_errors=True), first=True)
        return where + problem

    def _say(self, text: str) -> None:
        if self._runtime.rank == 0:
            say(text)
