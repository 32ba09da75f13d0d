"""Does compress.codec=auto choose well? Its step against each fixed choice, over many setups.

    python tools/bench_auto.py --json runs/auto.json
    python tools/bench_auto.py --json runs/auto.json --links 50mbit,1gbit --models mlp-10M
    python tools/bench_auto.py --json runs/auto-int8.json --allow none,bf16,int8 --report auto-int8

A setup is a shape of the links of a virtual cluster (root), a model, and a layout: 2x1 is two nodes
of one rank. In a setup, every rank holds the model once for each allowed codec and once for auto.
auto first trains until it has settled; then all train in turns, in blocks of steps, until the
ratios are known well enough (--precision) or --seconds are over. The table shows

    CODEC(ms)   a step with that codec all the way, median over rounds
    auto(ms)    a step under auto, and what it chose
    auto/best   its step over that of the fixed choice with the smallest median, in the same round;
                median over rounds, and +-, its standard error
    auto/none   likewise over uncoded

Key=value settings are those of hpcsync.train. Results are kept in the --json file after each setup,
and setups that it holds are not measured again: the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import benchmark, links  # noqa: E402
from tools.auto_figures import cells, heads, judge, summary  # noqa: E402
from tools.benchmark import BenchmarkError  # noqa: E402

LINKS = "50mbit,100mbit,200mbit,400mbit,1gbit,none"
LAYOUTS = "2x1,2x2"
MODELS = {
    "mlp-0.2M": "model.name=mlp data.name=digits model.layers=2 model.hidden=400",
    "gpt-0.2M": "model.layers=2 model.width=80 model.heads=4 model.context=64",
    "mlp-1M": "model.name=mlp data.name=digits model.layers=2 model.hidden=960",
    "gpt-2M": "model.layers=4 model.width=192 model.heads=6 model.context=64",
    "gpt-4M": "model.layers=4 model.width=288 model.heads=6 model.context=64",
    "mlp-10M": "model.name=mlp data.name=digits model.layers=2 model.hidden=3100",
}
WARM_UP = 2  # steps: buckets are laid out anew after the first
BLOCK_S = 0.2  # a contender's steps of one round take about this long together, or are one
LEAST_ROUNDS, MOST_ROUNDS, MOST_BLOCK = 3, 60, 8


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("settings", nargs="*", metavar="KEY=VALUE", help="as for hpcsync.train")
    add("--json", type=Path, required=True, help="the results, read and written")
    add("--allow", default="none,bf16", help="compress.allow (%(default)s)")
    add("--links", default=LINKS, help="rates (%(default)s)")
    add("--models", default=",".join(MODELS), help="%(default)s")
    add("--layouts", default=LAYOUTS, metavar="NODESxRANKS", help="%(default)s")
    add("--settle", type=int, default=200, help="most steps until auto has settled (%(default)s)")
    add("--seconds", type=float, default=15.0, help="of measuring a setup, about (%(default)s)")
    add("--precision", type=float, default=0.7, help="standard error, %% (%(default)s)")
    add("--no-more", action="store_true", help="measure nothing: the table of what is there")
    add("--report", default="", metavar="NAME", help="write tools/reports/DATE-HARDWARE-NAME.md")
    add("--layout", default="", help=argparse.SUPPRESS)  # what a job of ranks measures
    add("--link-folder", default="", help=argparse.SUPPRESS)
    return parser


def listed(text: str, known: Sequence[str], option: str) -> list[str]:
    """Names from a list. Raises BenchmarkError for one that is not known."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    for name in found:
        if known and name not in known:
            raise BenchmarkError(f"{option}: no {name!r}; there are {', '.join(known)}")
    if not found:
        raise BenchmarkError(f"{option}: nothing in it")
    return list(dict.fromkeys(found))


class Plan:
    """What is to be measured, and what was."""

    def __init__(self, options: argparse.Namespace) -> None:
        from hpcsync.codecs import BUILTINS

        self.allow = listed(options.allow, list(BUILTINS), "--allow")
        self.links = links.rates(options.links)
        self.models = listed(options.models, list(MODELS), "--models")
        self.layouts = [read_layout(text) for text in listed(options.layouts, (), "--layouts")]
        if "none" not in self.allow:
            raise BenchmarkError("--allow: auto is compared with uncoded, too: allow none")
        self._path: Path = options.json
        setup = {"allow": self.allow, "settings": options.settings}
        self.held: dict[str, Any] = {"setup": setup, "setups": {}}
        if self._path.exists():
            try:
                self.held = json.loads(self._path.read_text())
                known = self.held["setup"]
            except (ValueError, KeyError, TypeError):
                raise BenchmarkError(f"--json: {self._path} holds no results of this") from None
            if known != setup:
                raise BenchmarkError(
                    f"--json: {self._path} holds measurements of {known}; name another file"
                )

    def missing(self, layout: str) -> list[tuple[str, str]]:
        """Models and links of a layout that are not measured yet."""
        return [
            (model, link)
            for model in self.models
            for link in self.links
            if key_of(layout, model, link) not in self.held["setups"]
        ]

    def put(self, key: str, found: Mapping[str, Any]) -> None:
        """Keep a setup's figures, on disk too."""
        self.held["setups"][key] = found
        self._path.parent.mkdir(parents=True, exist_ok=True)
        aside = self._path.with_suffix(".new")
        aside.write_text(benchmark.as_json(self.held))
        aside.rename(self._path)

    def rows(self) -> list[dict[str, Any]]:
        """What is measured of what was asked for, in order."""
        wanted = [
            key_of(f"{nodes}x{local}", model, link)
            for nodes, local in self.layouts
            for model in self.models
            for link in self.links
        ]
        return [self.held["setups"][key] for key in wanted if key in self.held["setups"]]


def key_of(layout: str, model: str, link: str) -> str:
    """A setup's name."""
    return f"{layout} {model} {link}"


def read_layout(text: str) -> tuple[int, int]:
    """Nodes and ranks a node of "2x1". Raises BenchmarkError."""
    nodes, _, local = text.partition("x")
    if not (nodes.isdigit() and local.isdigit() and int(nodes) > 1 and int(local) > 0):
        raise BenchmarkError(f"--layouts: {text!r}: write 2x1 for two nodes of one rank")
    return int(nodes), int(local)


# -- measuring, on each rank -------------------------------------------------------------


class Setup:
    """The contenders on one shape of the links."""

    def __init__(self, workload: Any, plan: Plan, options: argparse.Namespace) -> None:
        self.workload, self.options = workload, options
        self.runtime = workload.runtime
        names = [*plan.allow, "auto"]
        self.contenders = {name: workload.contender(f"hpcsync-{name}") for name in names}

    def run(self) -> dict[str, Any]:
        """The figures of the setup; collective."""
        for name, contender in self.contenders.items():
            if name != "auto":
                contender.steps(self.workload.batches(contender, WARM_UP))
        auto = self.contenders["auto"]
        steps = self.workload.settle(auto, self.options.settle)
        chose = auto.choice()
        blocks = {name: self._block(contender) for name, contender in self.contenders.items()}
        seconds = self._rounds(blocks)
        return {
            "seconds": seconds,
            "settled_after": steps,
            "chose": chose if auto.choice() == chose else f"{chose}, then {auto.choice()}",
            "why": auto.auto().get("why", ""),
            **judge(seconds),
        }

    def _block(self, contender: Any) -> int:
        """Steps of a round, alike on all ranks."""
        batches = self.workload.batches(contender, 1)
        start = time.perf_counter()
        contender.steps(batches)
        (spent,) = self.runtime.allreduce_scalar([time.perf_counter() - start], "max")
        return max(1, min(MOST_BLOCK, round(BLOCK_S / spent)))

    def _rounds(self, blocks: Mapping[str, int]) -> dict[str, list[float]]:
        """Samples by name: of each round the slowest rank's."""
        seconds: dict[str, list[float]] = {name: [] for name in self.contenders}
        order, shuffle, spent = list(self.contenders), random.Random(1), 0.0
        for done in range(1, MOST_ROUNDS + 1):
            shuffle.shuffle(order)
            start = time.perf_counter()
            for name in order:
                self.workload.block(self.contenders[name], blocks[name])
            spent += time.perf_counter() - start
            own = [self.contenders[name].samples["seconds"][-1] for name in seconds]
            *slowest, elapsed = self.runtime.allreduce_scalar([*own, spent], "max")
            for name, value in zip(seconds, slowest, strict=True):
                seconds[name].append(value)
            precise = done >= LEAST_ROUNDS and (
                judge(seconds)["error"] * 100 <= self.options.precision
            )
            if precise or (done >= LEAST_ROUNDS and elapsed > self.options.seconds):
                break
        return seconds

    def close(self) -> None:
        """Free what the contenders hold; collective."""
        for contender in self.contenders.values():
            contender.close()


def work(options: argparse.Namespace) -> int:
    """What each rank of a job does: all missing setups of one layout."""
    import dataclasses

    from hpcsync import config, launch
    from tools.contenders import Workload

    plan = Plan(options)
    missing = plan.missing(options.layout)
    with launch.start(config.TopologyConfig(), 600.0) as runtime:
        missing = runtime.bcast(missing)
        cluster = links.Links(runtime, options.link_folder)
        workload, built = None, ""
        for place, (model, link) in enumerate(missing, start=1):
            if model != built:
                resolved = config.load(None, [*MODELS[model].split(), *options.settings])
                compress = dataclasses.replace(resolved.compress, allow=tuple(plan.allow))
                resolved = dataclasses.replace(resolved, compress=compress)
                workload, built = Workload(runtime, resolved), model
            assert workload is not None
            cluster.shape(link)
            began = time.monotonic()
            setup = Setup(workload, plan, options)
            found = setup.run()
            setup.close()
            found |= {"layout": options.layout, "model": model, "link": link}
            found |= {"parameters": workload.parameters, "took_s": time.monotonic() - began}
            if runtime.rank == 0:
                plan.put(key_of(options.layout, model, link), found)
                line = "  ".join(cells(found, plan.allow))
                print(f"{place}/{len(missing)}  {line}  {found['took_s']:.0f} s", flush=True)
    return 0


# -- the whole ---------------------------------------------------------------------------


def campaign(options: argparse.Namespace) -> int:
    """A job for each layout that has something missing, then the table."""
    from tools.links import served
    from tools.namespaces import ClusterError, follow
    from tools.virtual_cluster import VirtualCluster

    plan = Plan(options)
    head = {"command": benchmark.command_line(options, 1)}
    head |= benchmark.facts(f"{options.layouts}, links of a virtual cluster (tbf)")
    print(*(f"# {key}: {value}" for key, value in head.items()), sep="\n", flush=True)
    for nodes, local in plan.layouts:
        layout = f"{nodes}x{local}"
        if options.no_more or not plan.missing(layout):
            continue
        print("", "  ".join(heads(plan.allow)), sep="\n", flush=True)
        script = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], "--layout", layout]
        try:
            with VirtualCluster(nodes, "none") as cluster, served(cluster) as folder:
                script += ["--link-folder", str(folder)]
                job = cluster.spawn_mpi(script, local, env={"OMP_NUM_THREADS": "1"})
                status = follow([job])
        except ClusterError as error:
            raise BenchmarkError(str(error)) from None
        if status:
            return status
    show(options, head, Plan(options))
    return 0


def show(options: argparse.Namespace, head: Mapping[str, str], plan: Plan) -> None:
    """Print the table, and write what --report asks for."""
    rows = plan.rows()
    texts = [cells(row, plan.allow) for row in rows]
    print("", *benchmark.table(heads(plan.allow), texts), "", *summary(rows), sep="\n")
    if options.report:
        body = [
            "Medians of interleaved rounds; auto/best: over the fixed choice with the smallest "
            "median, in the same round; +-: standard error of the ratios.",
            "",
            *(f"- {line}" for line in summary(rows)),
            "",
            *benchmark.markdown(heads(plan.allow), texts),
        ]
        path = benchmark.write_report(options.report, "compress.codec=auto", head, body)
        print(f"\n# report: {os.path.relpath(path)}")


def main(options: argparse.Namespace) -> int:
    """The exit status; as one of the ranks, it ends the job."""
    if options.layout:
        from hpcsync import errors, launch

        def guarded() -> int:
            try:
                return work(options)
            except BenchmarkError as error:
                raise errors.UserError(str(error)) from None

        launch.guard(guarded)
    try:
        return campaign(options)
    except BenchmarkError as error:
        print(f"bench_auto: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(arguments().parse_args()))
