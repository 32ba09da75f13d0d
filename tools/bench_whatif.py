"""How far the steps that `trace.py whatif` predicts are from steps that were run.

    python tools/bench_whatif.py
    python tools/bench_whatif.py --cases 200mbit,int8 --rounds 5 laptop model.width=256

In each round one job is traced on a virtual cluster of 2 nodes with one rank each, 1 Gbit/s links
and no codec, and then jobs are run that differ from it in one thing or two. Each is predicted from
the round's trace, with nothing but the options named below. The table shows medians over rounds:

    predicted(ms), run(ms)   the step
    off                      predicted over run, less 1
    as traced                what a step of the traced job took: were nothing predicted, off would
                             be "as traced(ms)" over run

Cases: 200mbit, 500mbit (links), int8, bf16 (codec), int8-200mbit (both), 4ranks (2 on each node,
which has one core), buckets (comm.bucket_mb=0.5). Root; see tools/vcluster.py.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import benchmark  # noqa: E402
from tools.benchmark import BenchmarkError, median  # noqa: E402
from tools.namespaces import ClusterError  # noqa: E402
from tools.virtual_cluster import VirtualCluster  # noqa: E402

RATE = "1gbit"
_WARM = 8  # steps that do not count


class Case(NamedTuple):
    """A job beside the traced one."""

    predict: tuple[str, ...]  # options of whatif
    settings: tuple[str, ...] = ()  # of the deck
    rate: str = RATE
    ranks_per_node: int = 1


CODED = ("compress.warmup=0",)
CASES = {
    "200mbit": Case(("--bandwidth", "200mbit"), rate="200mbit"),
    "500mbit": Case(("--bandwidth", "500mbit"), rate="500mbit"),
    "int8": Case(("--codec", "int8"), ("compress.codec=int8", *CODED)),
    "bf16": Case(("--codec", "bf16"), ("compress.codec=bf16", *CODED)),
    "int8-200mbit": Case(
        ("--codec", "int8", "--bandwidth", "200mbit"),
        ("compress.codec=int8", *CODED),
        rate="200mbit",
    ),
    "4ranks": Case(("--ranks", "4", "--nodes", "2"), ranks_per_node=2),
    "buckets": Case(("--bucket-mb", "0.5"), ("comm.bucket_mb=0.5",)),
}


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("deck", nargs="*", metavar="[DECK] KEY=VALUE", help="as for hpcsync.train")
    add("--cases", default=",".join(CASES), help="of these (%(default)s)")
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=32, help="of a job (%(default)s)")
    add("--json", type=Path, help="write all samples there")
    add("--report", default="", metavar="NAME", help="write tools/reports/DATE-HARDWARE-NAME.md")
    return parser


class Jobs:
    """Runs jobs on one virtual cluster."""

    def __init__(self, cluster: VirtualCluster, options: argparse.Namespace, folder: Path) -> None:
        self._cluster, self._options, self._folder = cluster, options, folder

    def run(self, name: str, case: Case, every: int) -> tuple[Path, float]:
        """The run folder, and the median of a step in ms.

        Raises:
            BenchmarkError: the job failed.
        """
        out = self._folder / name
        shutil.rmtree(out, ignore_errors=True)
        self._cluster.set_rate(case.rate)
        words = [sys.executable, "-m", "hpcsync.train", *self._options.deck, *case.settings]
        words += [f"train.steps={self._options.steps}", "train.eval_every=0"]
        words += [f"trace.every={every}", "--out", str(out)]
        done = self._cluster.run_mpi(
            words, case.ranks_per_node, env={"OMP_NUM_THREADS": "1"}, timeout=300
        )
        if done.returncode:
            raise BenchmarkError(f"{name}: the job failed: {done.stderr.strip()[-300:]}")
        with (out / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return out, median(float(row["step_ms"]) for row in rows[_WARM:])


def predicted(run: Path, case: Case) -> float:
    """What whatif says of a step, in ms.

    Raises:
        BenchmarkError: it says nothing.
    """
    tool = [sys.executable, str(ROOT / "tools" / "trace.py"), "whatif", str(run), "--json"]
    words = [*tool, "--was", RATE, "--cores", "1", *case.predict]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"whatif {' '.join(case.predict)}: {done.stderr.strip()}")
    found: float = json.loads(done.stdout)["step_ms"]
    return found


def measure(options: argparse.Namespace) -> dict[str, list[tuple[float, float, float]]]:
    """(traced, predicted, run) in ms of each round, by case."""
    names = [name.strip() for name in options.cases.split(",")]
    for name in names:
        if name not in CASES:
            raise BenchmarkError(f"--cases: no case {name!r}; there are {', '.join(CASES)}")
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    folder = Path(tempfile.mkdtemp(prefix="bench-whatif-"))
    try:
        with VirtualCluster(2, RATE) as cluster:
            jobs = Jobs(cluster, options, folder)
            for round_ in range(options.rounds):
                base, traced = jobs.run("base", Case(()), 1)
                for name in names:
                    _, run = jobs.run(name, CASES[name], 1)
                    found[name].append((traced, predicted(base, CASES[name]), run))
                    print(f"# round {round_ + 1} {name}: traced, predicted, run", end=" ")
                    print(*(f"{value:.1f}" for value in found[name][-1]), flush=True)
    except ClusterError as error:
        raise BenchmarkError(str(error)) from None
    finally:
        shutil.rmtree(folder)
    return found


HEADS = ["case", "as traced(ms)", "predicted(ms)", "run(ms)", "off", "farthest"]


def rows_of(found: dict[str, list[tuple[float, float, float]]]) -> list[list[str]]:
    """The table."""
    rows = []
    for name, samples in found.items():
        traced, told, run = (median(column) for column in zip(*samples, strict=True))
        off = [one / other - 1 for _, one, other in samples]
        farthest = max(off, key=abs)
        numbers = (f"{value:.1f}" for value in (traced, told, run))
        rows.append([name, *numbers, f"{median(off):+.1%}", f"{farthest:+.1%}"])
    return rows


def main() -> int:
    """The command."""
    options = arguments().parse_args()
    try:
        head: dict[str, Any] = {"command": benchmark.command_line(_alone(options), 1)}
        head |= benchmark.facts(f"2 nodes, {RATE} links (tbf) unless named", mpi=False)
        print(*(f"# {key}: {value}" for key, value in head.items()), sep="\n", flush=True)
        found = measure(options)
    except BenchmarkError as error:
        print(f"bench_whatif: {error}", file=sys.stderr)
        return 2
    rows = rows_of(found)
    print("", *benchmark.table(HEADS, rows), sep="\n")
    if options.json:
        options.json.write_text(benchmark.as_json(head | {"samples": found}))
    if options.report:
        body = [
            f"Medians of {options.rounds} rounds of jobs of {options.steps} steps, one after the "
            "other; off: predicted over run, less 1; farthest: in any round.",
            "",
            *benchmark.markdown(HEADS, rows),
        ]
        path = benchmark.write_report(options.report, "Predicted steps", head, body)
        print(f"\n# report: {path.relative_to(ROOT)}")
    return 0


def _alone(options: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**vars(options), ranks=0, vcluster="")


if __name__ == "__main__":
    sys.exit(main())
