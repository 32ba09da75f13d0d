"""Time training steps under hpcsync, under torch DDP over Gloo, and without communication.

    python tools/bench_train.py --ranks 2
    python tools/bench_train.py --ranks 4 laptop model.width=384
    python tools/bench_train.py --vcluster nodes=2,rate=1gbit --ranks-per-node 1
    mpirun -n 8 python tools/bench_train.py cpu_cluster comm.bucket_mb=10

Each rank holds the same model three times and trains each on the same data, by the same engine,
in turns: blocks of steps in an order that changes from round to round. The time of a block is
that of its slowest rank; the table shows medians over rounds of

    step(ms)     a step: forward, backward, exchange, clipping, optimizer
    exposed(ms)  a step less one of "none" in the same round, which exchanges nothing
    cpu(ms)      processor time of a rank in a step, threads and all
    loss         of the last step, mean over ranks (under "none" every rank is on its own)
    sent(MiB)    a step, by a node through its network interfaces, headers included
    x_ddp        how many times as fast as DDP; x_exposed: its exposed time over the row's

The deck and key=value settings are those of hpcsync.train. DDP gets the same bucket size, and
gradients as views of its buckets.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import random
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import benchmark  # noqa: E402
from tools.benchmark import MIB, BenchmarkError, median  # noqa: E402

NAMES = ("none", "ddp", "hpcsync")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("deck", nargs="*", metavar="[DECK] KEY=VALUE", help="as for hpcsync.train")
    add("--only", default=",".join(NAMES), help="contenders (%(default)s)")
    add("--rounds", type=int, default=7)
    add("--block", type=int, default=4, help="steps of one contender in a round (%(default)s)")
    add("--warm-up", type=int, default=3, help="steps before (%(default)s)")
    add("--find-unused", action="store_true", help="DDP's find_unused_parameters")
    add("--json", type=Path, help="write all samples there")
    add("--report", default="", metavar="NAME", help="write tools/reports/DATE-HARDWARE-NAME.md")
    benchmark.add_launch_arguments(parser)
    return parser


class Plain:
    """A module that exchanges nothing, or that DDP wraps, as the engine wants it."""

    def __init__(self, module: Any, wrapped: Any = None) -> None:
        self.module, self.wrapped = module, wrapped or module

    def __call__(self, inputs: Any, targets: Any) -> Any:
        return self.wrapped(inputs, targets)

    def no_sync(self) -> AbstractContextManager[Any]:
        """DDP's own; nothing where nothing is exchanged."""
        if self.wrapped is self.module:
            return nullcontext()
        context: AbstractContextManager[Any] = self.wrapped.no_sync()
        return context

    def norm(self) -> Any:
        """2-norm of all gradients, as hpcsync.DataParallel.norm."""
        import torch

        grads = [param.grad for param in self.module.parameters() if param.grad is not None]
        return torch.nn.utils.get_total_norm(grads)


class Contender:
    """A model in training."""

    def __init__(self, name: str, engine: Any) -> None:
        self.name, self.engine = name, engine
        self.loss = float("nan")
        self.samples: dict[str, list[float]] = {"seconds": [], "cpu": [], "sent": [], "waited": []}

    def steps(self, batches: list[Any]) -> None:
        """Train on a list of steps' micro-batches."""
        for micro_batches in batches:
            self.loss = self.engine.step(micro_batches).loss


class Bench:
    """The contenders of one job and the data that all see."""

    def __init__(self, runtime: Any, config: Any, options: argparse.Namespace) -> None:
        import torch

        from hpcsync import data, models

        torch.set_num_threads(config.train.threads or torch.get_num_threads())
        self.runtime, self.config, self.options = runtime, config, options
        self.source = data.build(config)
        self.sampler = data.Sampler(
            self.source.train_size, config.train.global_batch, config.run.seed
        )
        torch.manual_seed(config.run.seed)
        self.model = models.build(config.model, self.source)
        self.parameters = sum(param.numel() for param in self.model.parameters())
        self.contenders = [self._make(name) for name in chosen(options)]

    def _make(self, name: str) -> Contender:
        import torch

        from hpcsync.engine import Engine, make_optimizer
        from hpcsync.parallel import DataParallel

        model = copy.deepcopy(self.model)
        parallel: Any = Plain(model)
        if name == "ddp":
            benchmark.start_gloo(self.runtime)
            wrapped = torch.nn.parallel.DistributedDataParallel(
                model,
                bucket_cap_mb=self.config.comm.bucket_mb,
                gradient_as_bucket_view=True,
                find_unused_parameters=self.options.find_unused,
            )
            parallel = Plain(model, wrapped)
        if name == "hpcsync":
            parallel = DataParallel(model, runtime=self.runtime, comm=self.config.comm)
        optimizer = make_optimizer(model, self.config.train)
        return Contender(name, Engine(model, optimizer, parallel, self.config.train))

    def batches(self, contender: Contender, count: int) -> list[Any]:
        """The data of the contender's next steps on this rank."""
        micros = self.config.train.accumulate
        first = contender.engine.step_count
        rank, size = self.runtime.rank, self.runtime.size
        return [
            [
                self.source.train_batch(self.sampler.shard(step, rank, size, micro, micros))
                for micro in range(micros)
            ]
            for step in range(first, first + count)
        ]

    def run(self) -> None:
        """Warm up, then the rounds."""
        for contender in self.contenders:
            contender.steps(self.batches(contender, self.options.warm_up))
        order = list(self.contenders)
        shuffle = random.Random(self.config.run.seed)
        for _ in range(self.options.rounds):
            shuffle.shuffle(order)
            for contender in order:
                self._block(contender)
        for contender in self.contenders:
            self._agree(contender)

    def _block(self, contender: Contender) -> None:
        batches = self.batches(contender, self.options.block)
        before = benchmark.wire_bytes()
        self.runtime.comm.Barrier()
        cpu, start = time.process_time(), time.perf_counter()
        contender.steps(batches)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        self.runtime.barrier()
        stats = getattr(getattr(contender.engine.data_parallel, "reducer", None), "stats", None)
        found = {
            "seconds": seconds / self.options.block,
            "cpu": cpu / self.options.block,
            "sent": (benchmark.wire_bytes() - before) / self.options.block,
            "waited": stats.exposed_comm_ms / 1e3 if stats else 0.0,
        }
        for key, value in found.items():
            contender.samples[key].append(value)

    def _agree(self, contender: Contender) -> None:
        """The slowest rank's times, and means over ranks of the rest."""
        runtime = self.runtime
        samples = contender.samples
        samples["seconds"] = runtime.allreduce_scalar(samples["seconds"], "max")
        for key in ("cpu", "sent", "waited"):
            total = runtime.allreduce_scalar(samples[key])
            samples[key] = [value / runtime.size for value in total]
        contender.loss = runtime.allreduce_scalar([contender.loss])[0] / runtime.size

    def rows(self) -> list[dict[str, Any]]:
        """The figures of the table."""
        by_name = {contender.name: contender.samples["seconds"] for contender in self.contenders}
        exposed = {
            name: median(own - none for own, none in zip(seconds, by_name["none"], strict=True))
            for name, seconds in by_name.items()
            if "none" in by_name
        }
        rows = []
        for contender in self.contenders:
            name, samples = contender.name, contender.samples
            pairs = zip(by_name.get("ddp", []), samples["seconds"], strict=False)
            both = name == "hpcsync" and "ddp" in exposed and exposed[name] > 0
            rows.append(
                {
                    "name": name,
                    "step_ms": median(samples["seconds"]) * 1e3,
                    "exposed_ms": exposed[name] * 1e3 if name != "none" and exposed else None,
                    "waited_ms": median(samples["waited"]) * 1e3 if name == "hpcsync" else None,
                    "cpu_ms": median(samples["cpu"]) * 1e3,
                    "loss": contender.loss,
                    "sent_bytes": median(samples["sent"]),
                    "x_ddp": median(ddp / own for ddp, own in pairs),
                    "x_exposed": exposed["ddp"] / exposed[name] if both else None,
                    "samples": samples,
                }
            )
        return rows


def chosen(options: argparse.Namespace) -> list[str]:
    """Names of the contenders. Raises BenchmarkError."""
    names = [name.strip() for name in options.only.split(",") if name.strip()]
    for name in names:
        if name not in NAMES:
            raise BenchmarkError(f"--only: no contender {name!r}; there are {', '.join(NAMES)}")
    return [name for name in NAMES if name in names]


HEADS = [
    "contender",
    "step(ms)",
    "exposed(ms)",
    "cpu(ms)",
    "loss",
    "sent(MiB)",
    "x_ddp",
    "x_exposed",
]


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text."""

    def number(value: float | None, places: int) -> str:
        return "-" if value is None or math.isnan(value) else f"{value:.{places}f}"

    return [
        row["name"],
        number(row["step_ms"], 1),
        number(row["exposed_ms"], 1),
        number(row["cpu_ms"], 1),
        number(row["loss"], 5),
        number(row["sent_bytes"] / MIB, 2),
        number(row["x_ddp"], 2),
        number(row["x_exposed"], 2),
    ]


def read_config(options: argparse.Namespace, size: int) -> Any:
    """The deck and settings of the command line."""
    from hpcsync import config

    decks = [word for word in options.deck if "=" not in word]
    if len(decks) > 1:
        raise BenchmarkError(f"one deck at most, not {', '.join(decks)}")
    settings = [word for word in options.deck if "=" in word]
    resolved = config.load(decks[0] if decks else None, settings)
    config.check_ranks(resolved, size)
    return resolved


def measure(options: argparse.Namespace) -> int:
    """What each rank does."""
    from hpcsync import config, launch

    with launch.start(config.TopologyConfig()) as probe:
        resolved = read_config(options, probe.size)
    with launch.start(resolved.topology, resolved.comm.timeout_s) as runtime:
        bench = Bench(runtime, resolved, options)
        bench.run()
        rows = bench.rows()
        place = options.place or runtime.topology.describe()
        if runtime.rank == 0:
            head = {"command": benchmark.command_line(options, runtime.size)}
            head |= benchmark.facts(place)
            head["model"] = f"{resolved.model.name}, {bench.parameters:,} parameters"
            head["batch"] = f"{resolved.train.global_batch} samples of {resolved.data.name} a step"
            head["settings"] = " ".join(options.deck) or "defaults"
            show(options, head, rows)
        if any(contender.name == "ddp" for contender in bench.contenders):
            import torch.distributed as dist

            runtime.barrier()
            dist.destroy_process_group()
    return 0


def show(options: argparse.Namespace, head: dict[str, str], rows: list[dict[str, Any]]) -> None:
    """Print the table, and write what --json and --report ask for."""
    texts = [cells(row) for row in rows]
    print(*(f"# {key}: {value}" for key, value in head.items()), "", sep="\n")
    print(*benchmark.table(HEADS, texts), sep="\n", flush=True)
    if options.json:
        options.json.write_text(benchmark.as_json(head | {"rows": rows}))
    if options.report:
        note = (
            f"Medians of {options.rounds} rounds of {options.block} steps a contender, "
            "interleaved; exposed: a step less one without communication in the same round."
        )
        body = [note, "", *benchmark.markdown(HEADS, texts)]
        path = benchmark.write_report(options.report, "Training step", head, body)
        print(f"\n# report: {os.path.relpath(path)}")


if __name__ == "__main__":
    benchmark.main("bench_train", arguments().parse_args(), measure)
