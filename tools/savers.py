"""Ways to save the same state from all ranks, made alike for a comparison, and steps meanwhile.

    plain       each rank writes its share of the bytes into a file of its own, and fsyncs it
    torch.save  rank 0 writes all, fsyncs, renames; the others wait
    dcp         torch.distributed.checkpoint.save, over Gloo
    dcp-async   torch.distributed.checkpoint.async_save, which reuses its host memory
    hpcsync     hpcsync's saver, which does too

A way begins in ``start``, which returns when training may go on, and has ended when ``step``,
called between steps, says so on all ranks: the bytes are then on the disk, under their names.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tools import benchmark
from tools.benchmark import BenchmarkError, median

State = Mapping[str, Any]
_WIDTH = 1024  # of the state's matrices: 4 MiB each
_PAUSE_S = 0.002  # of a step where nothing is computed


class Way(Protocol):
    """A way to save; collective."""

    def start(self, folder: Path) -> None:
        """Begin to save into ``folder``, which is new and empty."""

    def step(self) -> bool:
        """Whether all is on the disk; called between steps."""

    def close(self) -> None:
        """Free what is held."""


def make_state(nbytes: int) -> dict[str, dict[str, Tensor]]:
    """A model's weights and Adam's two means, about so large, the same on all ranks."""
    layers = max(1, round(nbytes / (3 * 4 * (_WIDTH * _WIDTH + _WIDTH))))
    generator = torch.Generator().manual_seed(0)
    state: dict[str, dict[str, Tensor]] = {}
    for group in ("model", "exp_avg", "exp_avg_sq"):
        tensors: dict[str, Tensor] = {}
        for layer in range(layers):
            tensors[f"layers.{layer}.weight"] = torch.randn(_WIDTH, _WIDTH, generator=generator)
            tensors[f"layers.{layer}.bias"] = torch.randn(_WIDTH, generator=generator)
        state[group] = tensors
    return state


def size(state: State) -> int:
    """Bytes of a state."""
    return sum(each.nbytes for group in state.values() for each in group.values())


class Plain:
    """The same bytes, evenly shared, and nothing else."""

    def __init__(self, runtime: Any, state: State, scratch: Path) -> None:
        self._runtime = runtime
        self._bytes = torch.randint(
            0, 256, (size(state) // runtime.size,), dtype=torch.uint8
        ).numpy()

    def start(self, folder: Path) -> None:
        handle = os.open(folder / f"plain-{self._runtime.rank}", os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            data = self._bytes.data
            while data:
                data = data[os.write(handle, data) :]
            os.fsync(handle)
        finally:
            os.close(handle)
        self._runtime.barrier()

    def step(self) -> bool:
        return True

    def close(self) -> None:
        del self._bytes


class TorchSave:
    """As many scripts do, but durably."""

    def __init__(self, runtime: Any, state: State, scratch: Path) -> None:
        self._runtime, self._state = runtime, state

    def start(self, folder: Path) -> None:
        if self._runtime.rank == 0:
            part = folder / "state.pt.part"
            with part.open("wb") as file:
                torch.save(self._state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, folder / "state.pt")
            sync_folder(folder)
        self._runtime.barrier()

    def step(self) -> bool:
        return True

    def close(self) -> None:
        pass


class Distributed:
    """torch.distributed.checkpoint with the settings it comes with, files synced."""

    def __init__(self, runtime: Any, state: State, scratch: Path) -> None:
        import torch.distributed as dist

        if not dist.is_initialized():
            benchmark.start_gloo(runtime)
        self._runtime, self._state = runtime, state

    def start(self, folder: Path) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(dict(self._state), checkpoint_id=folder)
        self._runtime.barrier()

    def step(self) -> bool:
        return True

    def close(self) -> None:
        pass


class DistributedAsync(Distributed):
    """The same in the background, from a copy in memory that is kept from save to save."""

    def __init__(self, runtime: Any, state: State, scratch: Path) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        super().__init__(runtime, state, scratch)
        # Pinned memory and the like need CUDA.
        self._stager = DefaultStager(StagingOptions(False, False, False, False))
        self._future: Any = None

    def start(self, folder: Path) -> None:
        import torch.distributed.checkpoint as dcp

        self._future = dcp.async_save(
            dict(self._state), checkpoint_id=folder, async_stager=self._stager
        )

    def step(self) -> bool:
        (running,) = self._runtime.allreduce_scalar([not self._future.done()])
        if running:
            return False
        self._future.result()  # raises what went wrong
        return True

    def close(self) -> None:
        self._stager.close()


class Ours:
    """The saver of ``hpcsync.train``, with what it asks of a training loop."""

    def __init__(self, runtime: Any, state: State, scratch: Path) -> None:
        from hpcsync.checkpoint.contract import About, Taken
        from hpcsync.checkpoint.saver import Saver
        from hpcsync.config import CheckpointConfig

        self._runtime, self._outcome, self._count = runtime, None, 0
        self._scratch = scratch
        self._saver = Saver(
            runtime,
            CheckpointConfig(every=0, keep=1000),
            scratch,
            lambda: Taken({**state, "step": self._count}, {"random": torch.get_rng_state()}),
            About(run_id="bench", config="", versions={}),
            told=self._told,
        )

    def _told(self, outcome: Any) -> None:
        if outcome.problem:
            raise BenchmarkError(f"hpcsync: {outcome.problem}")
        self._outcome = outcome

    def start(self, folder: Path) -> None:
        self._outcome, self._count = None, self._count + 1
        self._saver.require()
        self._saver.boundary(self._count)

    def step(self) -> bool:
        self._saver.hear(self._runtime.allreduce_scalar(self._saver.offer()))
        self._saver.boundary(self._count)
        return self._outcome is not None

    def close(self) -> None:
        self._saver.close()


WAYS: dict[str, Callable[[Any, State, Path], Way]] = {
    "plain": Plain,
    "torch.save": TorchSave,
    "dcp": Distributed,
    "dcp-async": DistributedAsync,
    "hpcsync": Ours,
}


def check(name: str) -> None:
    """Raises BenchmarkError: nothing is called that."""
    if name not in WAYS:
        raise BenchmarkError(f"--only: no way {name!r}; there are {', '.join(WAYS)}")


class Training:
    """Steps of a fixed amount of work, agreed on by all ranks as a training step is.

    Args:
        milliseconds: that a step takes while nothing is saved; 0: a short pause instead.
    """

    def __init__(self, runtime: Any, milliseconds: float) -> None:
        self.milliseconds = milliseconds
        torch.set_num_threads(1)
        self._runtime, self._times = runtime, 0
        self._matrix, self._result = torch.randn(256, 256), torch.empty(256, 256)
        if milliseconds:
            for _ in range(2):  # the first is a warm-up
                runtime.barrier()
                start = time.perf_counter()
                self._compute(50)
                spent = (time.perf_counter() - start) / 50
            (mean,) = runtime.allreduce_scalar([spent])
            self._times = max(1, round(milliseconds / 1e3 / (mean / runtime.size)))

    def _compute(self, times: int) -> None:
        for _ in range(times):
            torch.mm(self._matrix, self._matrix, out=self._result)

    def step(self) -> None:
        """The work of one step."""
        if self._times:
            self._compute(self._times)
        else:
            time.sleep(_PAUSE_S)
        self._runtime.allreduce_scalar([0.0])

    def usual(self, steps: int = 10) -> float:
        """Seconds of a step while nothing is saved."""
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            self.step()
            times.append(time.perf_counter() - start)
        return median(times)


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def empty(folder: Path) -> None:
    """Remove all that is in a folder, and let the disk come to rest."""
    for each in folder.iterdir():
        if each.is_dir():
            shutil.rmtree(each)
        else:
            each.unlink()
    os.sync()
