"""What tracing costs a step, and whether a trace tells the truth about communication.

    python tools/bench_trace.py --ranks 2
    python tools/bench_trace.py --vcluster nodes=2,rate=1gbit --ranks-per-node 1

Each rank holds the same model once for each contender and trains it in turns: blocks of steps in
an order that changes from round to round. The contenders:

    none      exchanges no gradients
    serial    exchanges them after the backward pass: nothing is hidden
    silent    hpcsync, with a recorder that records nothing
    ring      hpcsync, spans into the ring in memory: what runs always
    traced    hpcsync, every step written to files; the writing runs in its own blocks only

Every step ends with the agreement of all ranks that a run's steps end with. The first table has the
cost: medians over rounds of a step and of a rank's processor time in it, over those of "silent" in
the same round, with the interval in which 95% of resampled medians lie. The second one sets what
the trace says of communication beside the difference between steps with and without it:

    exposed   share of a step: by the trace, and by (traced - none) / traced
    overlap   hidden share of communication: by the trace, and by
              1 - (traced - none) / (serial - none)

with the interval in which 95% of the measured shares of resampled rounds lie.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import benchmark  # noqa: E402
from tools.benchmark import BenchmarkError, median  # noqa: E402
from tools.contenders import Contender, Plain, Workload  # noqa: E402

NAMES = ("none", "serial", "silent", "ring", "traced")
RESAMPLED = 2000


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("deck", nargs="*", metavar="[DECK] KEY=VALUE", help="as for hpcsync.train")
    add("--only", default=",".join(NAMES), help="contenders, silent among them (%(default)s)")
    add("--rounds", type=int, default=15)
    add("--block", type=int, default=6, help="steps of one contender in a round (%(default)s)")
    add("--warm-up", type=int, default=3, help="steps before (%(default)s)")
    add("--keep", type=Path, metavar="DIR", help="keep the trace there, in a folder that is new")
    add("--json", type=Path, help="write all samples there")
    add("--report", default="", metavar="NAME", help="write tools/reports/DATE-HARDWARE-NAME.md")
    benchmark.add_launch_arguments(parser)
    return parser


class Traced(Contender):
    """A contender whose steps are recorded as those of a run are."""

    def __init__(self, name: str, engine: Any, runtime: Any) -> None:
        super().__init__(name, engine)
        self._runtime = runtime
        self.after: Callable[[int], None] = lambda step: None

    def steps(self, batches: list[Any]) -> None:
        """Train, with the spans and the agreement of the training loop."""
        from hpcsync.trace.recorder import AGREEMENT, DATA, now

        recorder = self.engine.recorder
        for micro_batches in batches:
            start = now()
            recorder.begin_step(self.engine.step_count + 1)
            recorder.add(DATA, start, now())
            self.loss = self.engine.step(micro_batches).loss
            before = now()
            self._runtime.allreduce_scalar([self.loss] * 7)
            recorder.add(AGREEMENT, before, now())
            recorder.end_step(start)
            self.after(self.engine.step_count)


def silent_recorder() -> Any:
    """One that records nothing, for what recording costs."""
    from hpcsync.trace.recorder import Recorder

    class Silent(Recorder):
        def add(self, *_: Any, **__: Any) -> None:
            pass

        def number(self) -> int:
            return 1

        def begin_step(self, step: int) -> int:
            return 1

        def end_step(self, start: int) -> None:
            pass

    return Silent(2)


class Tracing:
    """The files of the traced contender, written while its blocks run and at no other time."""

    def __init__(self, workload: Workload, contender: Traced, folder: Path) -> None:
        from hpcsync.observers.trace import Traces

        self._open = threading.Event()
        config = replace(workload.config.trace, enabled=True, every=1)
        collectives = contender.parallel.collectives
        self.observer = Traces(
            collectives, config, lambda: describe(workload, contender), "benchmark"
        )
        # The recorder's memory has moved to where the node's first rank sees it.
        self.observer.started(_info(workload, folder))
        collector = self.observer._collector
        if collector is not None:
            before = collector._collect

            def gated() -> None:
                self._open.wait()
                before()

            collector._collect = gated  # type: ignore[method-assign]
        contender.after = self._stepped

    def _stepped(self, step: int) -> None:
        self.observer.stepped(_Step(step))  # type: ignore[arg-type]

    def enable(self, wanted: bool) -> None:
        """Let the writing go on, or wait."""
        (self._open.set if wanted else self._open.clear)()

    def close(self) -> None:
        """The last of it; collective."""
        self._open.set()
        self.observer.ended("done", "")


class _Step:
    """What the observer of traces looks at in a step's record."""

    def __init__(self, step: int) -> None:
        self.step = step


def describe(workload: Workload, contender: Contender) -> dict[str, str]:
    """What a run tells about itself in its trace."""
    import json

    from hpcsync.config import dump

    topology = workload.runtime.topology
    buckets = [
        {"index": each.index, "bytes": each.nbytes, "elements": each.numel, "coded": 0}
        for each in contender.parallel.reducer.buckets
    ]
    return {
        "config": dump(workload.config),
        "topology": json.dumps([list(ranks) for ranks in topology.nodes]),
        "codec": workload.config.compress.codec,
        "algorithm": contender.parallel.reducer.algorithm,
        "buckets": json.dumps(buckets),
        "links": "{}",
    }


def _info(workload: Workload, folder: Path) -> Any:
    from hpcsync.observers.base import RunInfo

    runtime, config = workload.runtime, workload.config
    return RunInfo(
        folder=folder,
        rank=runtime.rank,
        ranks=runtime.size,
        nodes=runtime.topology.node_count,
        host=runtime.host,
        steps=config.train.steps,
        tokens_per_step=1,
        unit="sample",
        val_unit="nats",
        codec=config.compress.codec,
        algorithm="",
        every_s=60.0,
        run_id="benchmark",
        node=runtime.topology.node_of(runtime.rank),
        local_rank=runtime.local_rank,
    )


def contender(workload: Workload, name: str) -> Traced:
    """A contender with a fresh copy of the model; collective."""
    import copy

    from hpcsync.engine import Engine
    from hpcsync.optimizers import make_optimizer
    from hpcsync.parallel import DataParallel
    from hpcsync.trace.recorder import Recorder

    config = workload.config
    model = copy.deepcopy(workload.model)
    recorder = Recorder(config.trace.ring) if name in ("ring", "traced") else silent_recorder()
    if name == "none":
        parallel: Any = Plain(model)
    else:
        comm = replace(config.comm, overlap=False) if name == "serial" else config.comm
        parallel = DataParallel(
            model,
            runtime=workload.runtime,
            comm=comm,
            compress=config.compress,
            seed=config.run.seed,
            recorder=recorder,
        )
    optimizer = make_optimizer(model, config.train)
    return Traced(
        name, Engine(model, optimizer, parallel, config.train, recorder), workload.runtime
    )


def chosen(options: argparse.Namespace) -> list[str]:
    """Names of the contenders. Raises BenchmarkError."""
    names = list(dict.fromkeys(name.strip() for name in options.only.split(",")))
    for name in names:
        if name not in NAMES:
            raise BenchmarkError(f"--only: no contender {name!r}; there are {', '.join(NAMES)}")
    return list(dict.fromkeys([*names, "silent", "traced"]))


class Bench:
    """All contenders, in turns."""

    def __init__(self, workload: Workload, options: argparse.Namespace, folder: Path) -> None:
        self.workload, self.options, self.folder = workload, options, folder
        self.contenders = {name: contender(workload, name) for name in chosen(options)}
        self.tracing = Tracing(workload, self.contenders["traced"], folder)

    def run(self) -> None:
        """Warm up, then the rounds."""
        for each in self.contenders.values():
            each.steps(self.workload.batches(each, self.options.warm_up))
        order = list(self.contenders.values())
        shuffle = random.Random(self.workload.config.run.seed)
        for _ in range(self.options.rounds):
            shuffle.shuffle(order)
            for each in order:
                self.tracing.enable(each.name == "traced")
                time.sleep(0.01)
                self.workload.block(each, self.options.block)
        for each in order:
            self.workload.agree(each)
        self.tracing.close()

    def costs(self) -> list[dict[str, Any]]:
        """Rows of the first table."""
        base = self.contenders["silent"].samples
        rows = []
        for name, each in self.contenders.items():
            row: dict[str, Any] = {"name": name, "samples": each.samples}
            for key in ("seconds", "cpu"):
                ratios = [a / b for a, b in zip(each.samples[key], base[key], strict=True)]
                row[key] = median(each.samples[key]) * 1e3
                row[f"mean_{key}"] = sum(each.samples[key]) / len(ratios) * 1e3
                row[f"x_{key}"], row[f"ci_{key}"] = median(ratios), resampled(ratios)
            rows.append(row)
        return rows

    def truths(self) -> list[dict[str, Any]]:
        """Rows of the second table: by the trace, and by steps with and without communication;
        none if those were not run."""
        if not {"none", "serial"} <= self.contenders.keys():
            return []
        from hpcsync import trace
        from hpcsync.trace.analysis.summary import summarise

        with trace.open(self.folder) as found:
            told = summarise(found, found.ranks)
        share = next(part.share for part in told.parts if part.name == "exposed")
        names = ("traced", "none", "serial")
        rounds = list(
            zip(*(self.contenders[name].samples["seconds"] for name in names), strict=True)
        )
        return [
            {
                "name": name,
                "trace": told_share,
                "measured": measured(rounds),
                "ci": resampled(rounds, measured),
            }
            for name, told_share, measured in (
                ("exposed", share, exposed_share),
                ("overlap", told.overlap, hidden_share),
            )
        ]

    def close(self) -> None:
        """Free what the contenders hold; collective."""
        for each in self.contenders.values():
            each.close()


def exposed_share(rounds: Sequence[tuple[float, float, float]]) -> float:
    """Of a step, by seconds with communication, without, and with all of it after the backward
    pass; of means, since a trace tells means."""
    own, none, _ = (sum(each) for each in zip(*rounds, strict=True))
    return (own - none) / own


def hidden_share(rounds: Sequence[tuple[float, float, float]]) -> float:
    """Of communication; as ``exposed_share``."""
    own, none, serial = (sum(each) for each in zip(*rounds, strict=True))
    return 1 - (own - none) / (serial - none)


def resampled(
    values: Sequence[Any], of: Callable[[Sequence[Any]], float] = median
) -> tuple[float, float]:
    """Between which 95% of those of resampled values lie (Efron, Annals of Statistics, 1979)."""
    source = random.Random(0)
    found = sorted(of(source.choices(values, k=len(values))) for _ in range(RESAMPLED))
    return found[int(0.025 * RESAMPLED)], found[int(0.975 * RESAMPLED)]


def measure(options: argparse.Namespace) -> int:
    """What each rank does."""
    from hpcsync import config, launch
    from tools.bench_train import read_config

    with launch.start(config.TopologyConfig()) as probe:
        resolved = read_config(options, probe.size)
    with launch.start(resolved.topology, resolved.comm.timeout_s) as runtime:
        workload = Workload(runtime, resolved)
        head = {}
        if runtime.rank == 0:
            head = {"command": benchmark.command_line(options, runtime.size)}
            head |= benchmark.facts(options.place or runtime.topology.describe())
            head["model"] = f"{resolved.model.name}, {workload.parameters:,} parameters"
            print(*(f"# {key}: {value}" for key, value in head.items()), sep="\n", flush=True)
        made = tempfile.mkdtemp(prefix=".bench-trace-", dir=Path.cwd()) if runtime.rank == 0 else ""
        folder = Path(runtime.bcast(made))
        try:
            bench = Bench(workload, options, folder)
            bench.run()
            runtime.barrier()
            if runtime.rank == 0:
                tell(options, head, bench)
            bench.close()
        finally:
            if made and options.keep:
                shutil.move(made, options.keep)
            elif made:
                shutil.rmtree(made)
    return 0


COSTS = ["contender", "step(ms)", "cpu(ms)", "x_step", "95%", "x_cpu", "95%"]
TRUTHS = ["share", "trace", "measured", "95%", "points"]


def tell(options: argparse.Namespace, head: dict[str, str], bench: Bench) -> None:
    """Print the tables, and write what --json and --report ask for."""
    costs, truths = bench.costs(), bench.truths()
    first = [
        [
            row["name"],
            f"{row['seconds']:.1f}",
            f"{row['cpu']:.1f}",
            f"{row['x_seconds']:.4f}",
            "{:.4f} to {:.4f}".format(*row["ci_seconds"]),
            f"{row['x_cpu']:.4f}",
            "{:.4f} to {:.4f}".format(*row["ci_cpu"]),
        ]
        for row in costs
    ]
    second = [
        [
            row["name"],
            f"{row['trace']:.3f}",
            f"{row['measured']:.3f}",
            "{:.3f} to {:.3f}".format(*row["ci"]),
            f"{100 * (row['trace'] - row['measured']):+.1f}",
        ]
        for row in truths
    ]
    print("", *benchmark.table(COSTS, first), sep="\n")
    if second:
        print("", *benchmark.table(TRUTHS, second), sep="\n")
    if options.json:
        options.json.write_text(benchmark.as_json(head | {"costs": costs, "truths": truths}))
    if options.report:
        body = [
            f"Medians of {options.rounds} rounds of {options.block} steps a contender, "
            "interleaved; x: over silent, which records nothing, in the same round.",
            "",
            *benchmark.markdown(COSTS, first),
        ]
        if second:
            body += [
                "",
                "exposed: share of a step, by the trace and by (traced - none) / traced. overlap: "
                "hidden share of communication, by the trace and by 1 - (traced - none) / (serial "
                "- none); serial exchanges after the backward pass.",
                "",
                *benchmark.markdown(TRUTHS, second),
            ]
        path = benchmark.write_report(options.report, "Tracing", head, body)
        print(f"\n# report: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    benchmark.main("bench_trace", arguments().parse_args(), measure)
