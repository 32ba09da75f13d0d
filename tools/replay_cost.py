"""What a step takes with the replay log and without, on the same model, interleaved."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from tools import benchmark
from tools.benchmark import MIB, median
from tools.contenders import Contender, Workload

HEADS = ["replay log", "step(ms)", "x_off", "spread", "cpu(ms)", "logged(MiB)"]


class Logged(Contender):
    """A contender whose steps are logged, as ``hpcsync.train`` does."""

    def __init__(self, inner: Contender, workload: Workload, folder: Path) -> None:
        from hpcsync.checkpoint.replay import ReplayLog

        super().__init__("on", inner.engine)
        self._folder, self._rank = folder, workload.runtime.rank
        self.bytes: list[int] = []
        self.log = ReplayLog(
            folder,
            inner.engine,
            inner.parallel.reducer,
            workload.runtime,
            workload.config.comm,
            "bench",
        )

    def steps(self, batches: list[Any]) -> None:
        for micro_batches in batches:
            result = self.engine.step(micro_batches)
            self.log.record(result)
            self.loss = result.loss

    def begin(self) -> None:
        """Forget what was logged, as after a checkpoint."""
        step = self.engine.step_count
        self.log.start(step)
        self.log.published(step)

    def count(self, steps: int) -> None:
        """Keep what a step has logged, mean over the last ``steps``."""
        if self.log.problem:
            raise benchmark.BenchmarkError(f"replay log: {self.log.problem}")
        here = self._folder.rglob("*")
        total = sum(each.stat().st_size for each in here if each.is_file())
        self.bytes.append(total // steps)

    def close(self) -> None:
        self.log.close()
        super().close()


def measure(runtime: Any, config: Any, options: argparse.Namespace, folder: Path) -> list[Any]:
    """Rows of the table: off and on."""
    workload = Workload(runtime, config)
    off = workload.contender("hpcsync")
    off.name = "off"
    # Its folder is this rank's alone, so that its files can be counted.
    on = Logged(workload.contender("hpcsync"), workload, folder / f"rank-{runtime.rank}")
    both: list[Contender] = [off, on]
    on.begin()
    for each in both:
        each.steps(workload.batches(each, options.warm_up))
    shuffle = random.Random(0)
    for _ in range(options.replay_rounds):
        shuffle.shuffle(both)
        for each in both:
            if each is on:
                on.begin()
            workload.block(each, options.block)
            if each is on:
                on.count(options.block)
    for each in (off, on):
        workload.agree(each)
    rows = [_row(each, off) for each in (off, on)]
    for each in (off, on):
        each.close()
    return rows


def _row(each: Contender, off: Contender) -> dict[str, Any]:
    own, without = each.samples["seconds"], off.samples["seconds"]
    ratios = sorted(one / other for one, other in zip(own, without, strict=True))
    quarter = len(ratios) // 4
    logged = each.bytes if isinstance(each, Logged) else []
    return {
        "name": each.name,
        "step_ms": median(own) * 1e3,
        "x_off": median(ratios),
        "low": ratios[quarter],
        "high": ratios[-1 - quarter],
        "cpu_ms": median(each.samples["cpu"]) * 1e3,
        "logged_bytes": median(logged) if logged else 0,
        "samples": each.samples,
    }


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text."""
    return [
        row["name"],
        f"{row['step_ms']:.2f}",
        f"{row['x_off']:.3f}",
        f"{row['low']:.3f}..{row['high']:.3f}",
        f"{row['cpu_ms']:.2f}",
        f"{row['logged_bytes'] / MIB:.2f}",
    ]
