"""Time training steps under hpcsync and its codecs, torch DDP over Gloo, and no communication.

    python tools/bench_train.py --ranks 2
    python tools/bench_train.py --ranks 4 laptop model.width=384
    python tools/bench_train.py --vcluster nodes=2,rate=1gbit --ranks-per-node 1
    python tools/bench_train.py --vcluster nodes=2 --links 1gbit,200mbit --ranks-per-node 1 \\
        --only none,ddp,ddp-fp16,ddp-powersgd,hpcsync,hpcsync-int8
    mpirun -n 8 python tools/bench_train.py cpu_cluster comm.bucket_mb=10

Each rank holds the same model once for each contender and trains it on the same data, by the same
engine, in turns: blocks of steps in an order that changes from round to round. The contenders:

    none            exchanges nothing
    lockstep        exchanges one number a step: ranks wait for each other, and nothing else
    ddp             torch DDP; ddp-fp16 and ddp-powersgd (rank 4) are its hooks of these names
    hpcsync         as the deck says
    hpcsync-CODEC   with compress.codec=CODEC from the first step: hpcsync-int8, hpcsync-auto, ...
                    (auto first trains until it has chosen: its loss is of more steps)

The time of a block is that of its slowest rank; the table shows medians over rounds of

    step(ms)     a step: forward, backward, exchange, clipping, optimizer
    exposed(ms)  a step less one of "none" in the same round, which exchanges nothing
    cpu(ms)      processor time of a rank in a step, threads and all
    loss         of the last step, mean over ranks (under "none" every rank is on its own)
    sent(MiB)    a step, by a node through its network interfaces, headers included
    x_sent       sent by the row over sent by hpcsync
    x_none       a step over one of "none"
    x_ddp        how many times as fast as DDP; x_exposed: DDP's exposed time over the row's

The deck and key=value settings are those of hpcsync.train. DDP gets the same bucket size, and
gradients as views of its buckets. --links shapes a virtual cluster's links to one rate after the
other, with fresh contenders and a table for each.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import benchmark, contenders, links  # noqa: E402
from tools.benchmark import MIB, BenchmarkError, median  # noqa: E402
from tools.contenders import Workload  # noqa: E402

NAMES = ("none", "ddp", "hpcsync")
MOST_TO_SETTLE = 200  # steps that auto is given to choose in


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("deck", nargs="*", metavar="[DECK] KEY=VALUE", help="as for hpcsync.train")
    add("--only", default=",".join(NAMES), help="contenders (%(default)s)")
    add("--links", default="", metavar="1gbit,200mbit", help="with --vcluster: one table a rate")
    add("--rounds", type=int, default=7)
    add("--block", type=int, default=4, help="steps of one contender in a round (%(default)s)")
    add("--warm-up", type=int, default=3, help="steps before (%(default)s)")
    add("--find-unused", action="store_true", help="DDP's find_unused_parameters")
    add("--json", type=Path, help="write all samples there")
    add("--report", default="", metavar="NAME", help="write tools/reports/DATE-HARDWARE-NAME.md")
    benchmark.add_launch_arguments(parser)
    return parser


class Bench:
    """The contenders on one shape of the links."""

    def __init__(self, workload: Workload, options: argparse.Namespace, rate: str = "") -> None:
        self.workload, self.options, self.rate = workload, options, rate
        self.contenders = [
            workload.contender(name, find_unused=options.find_unused) for name in chosen(options)
        ]

    def run(self) -> None:
        """Warm up, then the rounds."""
        for contender in self.contenders:
            contender.steps(self.workload.batches(contender, self.options.warm_up))
            self.workload.settle(contender, MOST_TO_SETTLE)
        order = list(self.contenders)
        shuffle = random.Random(self.workload.config.run.seed)
        for _ in range(self.options.rounds):
            shuffle.shuffle(order)
            for contender in order:
                self.workload.block(contender, self.options.block)
        for contender in self.contenders:
            self.workload.agree(contender)

    def rows(self) -> list[dict[str, Any]]:
        """The figures of the table."""
        by_name = {contender.name: contender.samples["seconds"] for contender in self.contenders}
        sent = {contender.name: contender.samples["sent"] for contender in self.contenders}
        exposed = {
            name: median(own - none for own, none in zip(seconds, by_name["none"], strict=True))
            for name, seconds in by_name.items()
            if "none" in by_name
        }
        rows = []
        for contender in self.contenders:
            name, samples = contender.name, contender.samples
            own = samples["seconds"]
            ours = name.startswith("hpcsync")
            both = ours and "ddp" in exposed and exposed[name] > 0
            rows.append(
                {
                    "name": name,
                    "rate": self.rate,
                    "step_ms": median(own) * 1e3,
                    "exposed_ms": exposed[name] * 1e3 if name != "none" and exposed else None,
                    "waited_ms": median(samples["waited"]) * 1e3 if ours else None,
                    "cpu_ms": median(samples["cpu"]) * 1e3,
                    "loss": contender.loss,
                    "sent_bytes": median(samples["sent"]),
                    "x_sent": _share(samples["sent"], sent.get("hpcsync", [])),
                    "x_none": _ratio(own, by_name.get("none", [])),
                    "x_ddp": _ratio(by_name.get("ddp", []), own),
                    "x_exposed": exposed["ddp"] / exposed[name] if both else None,
                    "chose": contender.choice() if name.endswith("-auto") else None,
                    "samples": samples,
                }
            )
        return rows

    def close(self) -> None:
        """Free what the contenders hold; collective."""
        for contender in self.contenders:
            contender.close()


def _share(own: list[float], whole: list[float]) -> float | None:
    """Of the medians; None where nothing is sent."""
    return median(own) / median(whole) if whole and median(whole) else None


def _ratio(these: list[float], those: list[float]) -> float:
    """Median over rounds; nan without samples."""
    return median(one / other for one, other in zip(these, those, strict=False))


def chosen(options: argparse.Namespace) -> list[str]:
    """Names of the contenders, each once. Raises BenchmarkError."""
    names = [name.strip() for name in options.only.split(",") if name.strip()]
    for name in names:
        contenders.check(name)
    return list(dict.fromkeys(names))


HEADS = [
    "contender",
    "step(ms)",
    "exposed(ms)",
    "cpu(ms)",
    "loss",
    "sent(MiB)",
    "x_sent",
    "x_none",
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
        number(row["x_sent"], 3),
        number(row["x_none"], 2),
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
    chosen(options)
    rates = links.rates(options.links) if options.links else [""]
    with launch.start(resolved.topology, resolved.comm.timeout_s) as runtime:
        workload = Workload(runtime, resolved)
        head = {}
        if runtime.rank == 0:
            head = {"command": benchmark.command_line(options, runtime.size)}
            head |= benchmark.facts(options.place or runtime.topology.describe())
            head["model"] = f"{resolved.model.name}, {workload.parameters:,} parameters"
            head["batch"] = f"{resolved.train.global_batch} samples of {resolved.data.name} a step"
            head["settings"] = " ".join(options.deck) or "defaults"
            print(*(f"# {key}: {value}" for key, value in head.items()), sep="\n", flush=True)
        cluster = links.Links(runtime, options.link_folder)
        found: list[list[dict[str, Any]]] = []
        for rate in rates:
            if rate:
                cluster.shape(rate)
            bench = Bench(workload, options, rate)
            bench.run()
            found.append(bench.rows())
            bench.close()
            if runtime.rank == 0:
                show(found[-1])
        if runtime.rank == 0:
            keep(options, head, found)
        contenders.close_gloo(runtime)
    return 0


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table of one shape of the links."""
    rate = rows[0]["rate"]
    title = [f"# links: {rate}"] if rate else []
    print("", *title, *benchmark.table(HEADS, [cells(row) for row in rows]), sep="\n", flush=True)


def keep(
    options: argparse.Namespace, head: dict[str, str], tables: list[list[dict[str, Any]]]
) -> None:
    """Write what --json and --report ask for."""
    if options.json:
        rows = [row for table in tables for row in table]
        options.json.write_text(benchmark.as_json(head | {"rows": rows}))
    if options.report:
        body = [
            f"Medians of {options.rounds} rounds of {options.block} steps a contender, "
            "interleaved; exposed: a step less one without communication in the same round; "
            "x_sent: bytes over those of hpcsync; x_none: a step over one without communication; "
            "x_ddp: times as fast as DDP."
        ]
        for rows in tables:
            body += ["", f"## Links of {rows[0]['rate']}"] if rows[0]["rate"] else []
            body += ["", *benchmark.markdown(HEADS, [cells(row) for row in rows])]
            body += [f"\n{row['name']} chose {row['chose']}." for row in rows if row["chose"]]
        path = benchmark.write_report(options.report, "Training step", head, body)
        print(f"\n# report: {os.path.relpath(path)}")


if __name__ == "__main__":
    benchmark.main("bench_train", arguments().parse_args(), measure)
