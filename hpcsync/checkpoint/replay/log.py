"""The log of one rank: written step by step, and replayed."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import xxhash
from torch import nn
from torch.optim import Optimizer

from ...collectives.kept import Keeper
from ...config import CommConfig
from ...gradients.reducer import Reducer
from ...runtime import Runtime
from . import chain, means
from .background import Background
from .own import OwnState
from .records import Writer
from .recovery import Recovery
from .slots import Slots

# Own state up to this many bytes goes into the record itself: then every logged step can be gone
# back to, and not the newest alone.
_INLINE = 1 << 16
# A log that takes more than this share of the time for so long is given up: training comes first.
_MOST, _WATCH_S = 0.5, 30.0


class StepNumbers(Protocol):
    """What the log asks of a ``StepResult``, which is a dataclass of plain numbers."""

    @property
    def step(self) -> int: ...

    @property
    def skipped(self) -> bool: ...


class EngineLike(Protocol):
    """What the log asks of an ``Engine``."""

    model: nn.Module
    optimizer: Optimizer

    def repeat(self, numbers: Mapping[str, Any]) -> Any:
        """Do a step's update again, on the gradients that stand in the parameters."""


class ReplayLog:
    """See the package.

    Args:
        folder: of all ranks' logs; made if it is not there.
        lineage: a word that all logs and checkpoints of one run share, and no others.

    Attributes:
        problem: why nothing is logged until the next ``start``; empty if all is well.
    """

    def __init__(
        self,
        folder: Path,
        engine: EngineLike,
        reducer: Reducer,
        runtime: Runtime,
        comm: CommConfig,
        lineage: str,
    ) -> None:
        self._folder = folder
        self._engine, self._reducer, self._runtime = engine, reducer, runtime
        self._identity = {
            "lineage": lineage,
            "rank": runtime.rank,
            "nodes": [list(ranks) for ranks in runtime.topology.nodes],
            "setup": _setup(engine, reducer, comm),
        }
        self._next_lineage = lineage
        self._swept = False
        self._own = OwnState(engine.model, reducer)
        self._slots = Slots(chain.slot_paths(folder, runtime.rank))
        self._writer: Writer | None = None
        self._keepers: tuple[tuple[int, Keeper], ...] | None = None
        self._background = Background(self._files)
        self._meta: dict[str, Any] = {}
        self._exchange: dict[str, Any] = {}
        self.problem = ""
        self._watch()
        reducer.keep()

    def start(self, step: int) -> None:
        """Log the steps after ``step``, whose state a checkpoint has or will have.

        The first call of a process forgets all that earlier ones logged.
        """
        self._close()
        self.problem = ""
        self._identity["lineage"] = self._next_lineage
        self._watch()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not self._swept:
                self._sweep()
                self._swept = True
            path = chain.log_path(self._folder, self._runtime.rank, step)
            self._background.spare(path)
            path.unlink(missing_ok=True)
            self._writer = Writer(path)
            self._writer.begin()
            self._writer.finish(step, chain.header(self._identity, step))
        except OSError as error:
            self._give_up(error.strerror or str(error))

    def rename(self, lineage: str) -> None:
        """From the next ``start`` on, logs are of another lineage: their checkpoints are not those
        that the run had before at the same steps."""
        self._next_lineage = lineage

    def record(self, result: StepNumbers) -> None:
        """Log a step; right after ``Engine.step``, on all ranks. Collective where the buckets are
        about to be laid out anew."""
        began = time.perf_counter()
        self._record(result)
        ended = time.perf_counter()
        self._spent_s += ended - began
        elapsed = ended - self._began_s
        if self._writer is not None and elapsed > _WATCH_S and self._spent_s > _MOST * elapsed:
            self._give_up(f"the disk is slow: it took {self._spent_s:.0f} s of {elapsed:.0f}")

    def _record(self, result: StepNumbers) -> None:
        if self._writer is not None:
            try:
                self._write_means(self._writer, result)
            except OSError as error:
                self._give_up(error.strerror or str(error))
        # All ranks do this, or none: also those that could not write.
        exchange = self._reducer.settled_state()
        if self._writer is not None:
            try:
                self._write_own(self._writer, result, exchange)
            except OSError as error:
                self._give_up(error.strerror or str(error))

    def published(self, step: int) -> None:
        """The checkpoint of ``step`` can be read by whoever resumes: older parts have served."""
        try:
            found = chain.logs(self._folder, self._runtime.rank)
        except OSError:
            return
        self._background.remove([path for begin, path in found.items() if begin < step])

    def recover(self, step: int, told: Callable[[Any], None] | None = None) -> int:
        """Replay what was logged after the checkpoint of ``step``, whose state has been loaded;
        collective. Logging goes on from there.

        Args:
            told: called with the result of each step on this rank.

        Returns:
            The step that the state is of now.

        Raises:
            AgreedError: the log is whole, but cannot be replayed here; the state is of no use then.
        """
        rank, folder = self._runtime.rank, self._folder
        found = chain.follow(folder, rank, self._identity, step)
        slots = {
            number: slot
            for number, slot in self._slots.read().items()
            if all(slot.meta.get(key) == value for key, value in self._identity.items())
        }
        recovery = Recovery(self._engine, self._reducer, self._runtime, self._own)
        last, why = recovery.plan(found, slots, step)
        if why and rank == 0:
            print(f"hpcsync: replay log: {why}", file=sys.stderr, flush=True)
        if last == step:
            self.start(step)
            return step
        recovery.run(found, step, last, told)
        self._go_on(found.steps[last])
        return last

    def close(self) -> None:
        """Stop logging; what was logged stays."""
        self._close()
        self._background.close()

    def _write_means(self, writer: Writer, result: StepNumbers) -> None:
        keepers = self._reducer.keepers
        if keepers is not self._keepers:
            writer.begin()
            layout = means.describe(self._reducer, keepers)
            writer.finish(result.step, {"kind": "layout", **layout})
            self._keepers = keepers
        writer.begin()
        left = [] if result.skipped else [keeper.left() for _, keeper in keepers]
        for each in left:
            writer.add(each.arrays)
        writer.flush()  # before the buckets are laid out anew
        self._meta = {
            "kind": "step",
            "numbers": {name: getattr(result, name) for name in _names(type(result))},
            "none": [n for n, p in self._reducer.parameters.items() if p.grad is None],
            "sizes": [[array.nbytes for array in each.arrays] for each in left],
            "moments": [[each.step, each.seed] for each in left],
        }

    def _write_own(self, writer: Writer, result: StepNumbers, exchange: dict[str, Any]) -> None:
        own = self._own.capture()
        inline = own.nbytes <= _INLINE
        if inline:
            writer.add(own.arrays)
        else:
            self._slots.write(result.step, own.arrays, self._identity | own.meta)
        counts = exchange.pop("compression")
        more = {"counts": counts, "own": own.meta if inline else None}
        if exchange != self._exchange:
            self._exchange = exchange
            more["exchange"] = exchange
        writer.finish(result.step, self._meta | more)

    def _go_on(self, last: chain.Logged) -> None:
        """Write behind the last step that was replayed; what was logged after it goes."""
        self._keepers, self._exchange, self.problem = None, {}, ""
        self._swept = True
        self._watch()
        try:
            # At once: a checkpoint may soon begin a file of the same name.
            for begin, path in chain.logs(self._folder, self._runtime.rank).items():
                if begin >= last.record.step:
                    path.unlink(missing_ok=True)
            self._writer = Writer(last.record.path, last.record.stop)
        except OSError as error:
            self._give_up(error.strerror or str(error))

    def _watch(self) -> None:
        """Begin to count the time that logging takes."""
        self._began_s, self._spent_s = time.perf_counter(), 0.0

    def _sweep(self) -> None:
        """Delete what other processes left, of this rank and of ranks that are no more."""
        self._slots.remove()
        doomed = list(chain.logs(self._folder, self._runtime.rank).values())
        if self._runtime.rank == 0:
            doomed += chain.strangers(self._folder, self._runtime.size)
        for path in doomed:
            path.unlink(missing_ok=True)

    def _give_up(self, reason: str) -> None:
        """Nothing can be logged; give back the space, which the next checkpoint may need."""
        self._close()
        rank = self._runtime.rank
        self.problem = f"replay log: {reason}; nothing is logged until the next checkpoint"
        print(f"hpcsync: warning: rank {rank}: {self.problem}", file=sys.stderr, flush=True)
        try:
            self._background.remove(list(chain.logs(self._folder, rank).values()))
            self._slots.remove()
        except OSError:
            return

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        self._keepers, self._exchange = None, {}
        if writer is not None:
            writer.close()
        self._slots.close()

    def _files(self) -> list[int]:
        writer = self._writer
        return [] if writer is None else [writer.fileno]


@functools.cache
def _names(kind: type[Any]) -> tuple[str, ...]:
    return tuple(each.name for each in dataclasses.fields(kind))


def _setup(engine: EngineLike, reducer: Reducer, comm: CommConfig) -> str:
    """A hash of all that a log's bytes depend on, apart from the run."""
    names = (
        *("algorithm", "rail_algorithm", "reproducible", "bucket_mb", "first_bucket_mb"),
        *("segment_mb", "node_transport"),
        # Earlier versions did not have it.
        *(("rail_transport",) if comm.rail_transport != "auto" else ()),
    )
    compression = reducer.compression
    told = {
        "parameters": [[n, list(p.shape), str(p.dtype)] for n, p in reducer.parameters.items()],
        "optimizer": [type(engine.optimizer).__name__, _groups(engine.optimizer)],
        "comm": {name: getattr(comm, name) for name in names},
        "compress": dataclasses.asdict(compression.deck) if compression else None,
        "seed": compression.seed if compression else None,
    }
    words = json.dumps(told, sort_keys=True, default=str)
    return str(xxhash.xxh3_128_hexdigest(words.encode()))


def _groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Its settings, group by group, but for the rate, which each step tells."""
    return [
        {key: value for key, value in group.items() if key not in ("lr", "params")}
        | {"parameters": len(group["params"])}
        for group in optimizer.param_groups
    ]
