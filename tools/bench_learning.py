"""Compare the held-out loss under each codec with the uncoded one, over seeds.

    python tools/bench_learning.py --json runs/learning.json
    python tools/bench_learning.py --json runs/learning.json --codecs none,int8,topk --seeds 2
    python tools/bench_learning.py --json runs/learning.json --report learning

Each run is `mpirun -n 4 python -m hpcsync.train` with one rank a node by pretence, so that all of
the exchange is coded; the deck, its warm-up too, is otherwise the default one. Runs go seed by
seed. Results are kept in the --json file after each run, and runs that it holds are not repeated:
the same command goes on after an interruption, and more codecs or seeds may be added. A codec may
be told more than the deck:

    --codecs none,topk/compress.ratio=0.05,onebit/train.optimizer=onebit_adam

powersgd has rank 8 and topk a ratio of 0.01 if nothing else is said. The table shows, over the
seeds that both it and "none" have,

    val_loss   mean
    mean(%)    of the difference from uncoded with the same seed, relative; more than 0 is worse
    worst(%)   the largest of them
    sent(%)    bytes between nodes a step, median of the last run's steps, over uncoded

SIGTSTP (Ctrl-Z, kill -TSTP) stops this program and the ranks that it started, which have process
groups of their own, until SIGCONT.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import benchmark  # noqa: E402
from tools.benchmark import BenchmarkError  # noqa: E402

CODECS = (
    "none,bf16,fp16,fp8,int8,int4,int8_shared,powersgd,onebit,topk"  # those with a promise first
)
MORE = {"powersgd": ("compress.rank=8",), "topk": ("compress.ratio=0.01",)}
# A stopped job is not a stuck one.
PATIENCE = "comm.timeout_s=1e6"


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--codecs", default=CODECS, help="CODEC[/KEY=VALUE ...] (%(default)s)")
    add("--seeds", type=int, default=5, help="run.seed from 1 on (%(default)s)")
    add("--steps", type=int, default=400)
    add("--ranks", type=int, default=4)
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="for all runs")
    add("--json", type=Path, required=True, help="the results, read and written")
    add("--work", type=Path, default=ROOT / "runs" / "learning", help="folders of runs")
    add("--nice", type=int, default=0, help="added to the runs' niceness")
    add("--dry-run", action="store_true", help="show what is to run, and the table so far")
    add("--report", default="", metavar="NAME", help="write tools/reports/DATE-HARDWARE-NAME.md")
    return parser


# -- what to run -------------------------------------------------------------------------


def variants(text: str) -> list[str]:
    """The codecs with their settings; "none" first, since all are compared with it.

    Raises BenchmarkError.
    """
    from hpcsync import codecs

    found = [part.strip() for part in text.split(",") if part.strip()]
    for variant in found:
        codec, *settings = variant.split("/")
        if codec not in codecs.BUILTINS and ":" not in codec:
            known = ", ".join(codecs.BUILTINS)
            raise BenchmarkError(f"--codecs: no codec {codec!r}; there are {known}")
        for setting in settings:
            if "=" not in setting:
                raise BenchmarkError(f"--codecs: {variant}: {setting!r} is no KEY=VALUE")
    return list(dict.fromkeys(["none", *found]))


def settings_of(variant: str, seed: int, options: argparse.Namespace) -> list[str]:
    """The overrides of one run; later ones count."""
    codec, *own = variant.split("/")
    return [
        f"train.steps={options.steps}",
        "train.eval_every=0",
        "topology.ranks_per_node=1",
        PATIENCE,
        f"run.seed={seed}",
        f"compress.codec={codec}",
        *MORE.get(codec, ()),
        *options.set,
        *own,
    ]


class Results:
    """The --json file: the setup, and for each "variant seed" what its run came to."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._path: Path = options.json
        setup = {"steps": options.steps, "ranks": options.ranks, "set": options.set}
        self._held: dict[str, Any] = {"setup": setup, "runs": {}}
        if self._path.exists():
            try:
                self._held = json.loads(self._path.read_text())
                known = self._held["setup"]
            except (ValueError, KeyError, TypeError):
                raise BenchmarkError(f"--json: {self._path} holds no results of this") from None
            if known != setup:
                raise BenchmarkError(
                    f"--json: {self._path} holds runs of another setup, {known}; name another file"
                )

    def get(self, variant: str, seed: int) -> dict[str, Any] | None:
        """What a run came to, if it was done."""
        found: dict[str, Any] | None = self._held["runs"].get(f"{variant} {seed}")
        return found

    def put(self, variant: str, seed: int, found: dict[str, Any]) -> None:
        """Keep a run, on disk too."""
        self._held["runs"][f"{variant} {seed}"] = found
        self._path.parent.mkdir(parents=True, exist_ok=True)
        aside = self._path.with_suffix(".new")
        aside.write_text(benchmark.as_json(self._held))
        aside.rename(self._path)

    def table(self, names: list[str], seeds: range) -> list[list[str]]:
        """Rows of the table, for codecs with any run."""
        rows = []
        for variant in names:
            both = [(self.get(variant, seed), self.get("none", seed)) for seed in seeds]
            pairs = [(own, plain) for own, plain in both if own and plain]
            if not pairs:
                continue
            off = [own["val_loss"] / plain["val_loss"] - 1 for own, plain in pairs]
            own, plain = pairs[-1]
            sent = own["sent"] / plain["sent"] if plain["sent"] else float("nan")
            rows.append(
                [
                    variant,
                    str(len(pairs)),
                    f"{sum(own['val_loss'] for own, _ in pairs) / len(pairs):.4f}",
                    f"{sum(off) / len(off) * 100:+.2f}",
                    f"{max(off) * 100:+.2f}",
                    f"{sent * 100:.2f}",
                    str(sum(own["skipped"] for own, _ in pairs)),
                ]
            )
        return rows


HEADS = ["codec", "seeds", "val_loss", "mean(%)", "worst(%)", "sent(%)", "skipped"]


# -- running -----------------------------------------------------------------------------


def train(variant: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run. Raises BenchmarkError with the end of what it said."""
    from tools.bootstrap import mpirun_command, mpirun_environment

    name = variant.replace("/", "-").replace("=", "-").replace(":", "-")
    folder: Path = options.work / f"{name}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [*mpirun_command(benchmark.find_mpirun(), options.ranks)]
    command += [sys.executable, "-m", "hpcsync.train", *settings_of(variant, seed, options)]
    env = mpirun_environment(os.environ | {"OMP_NUM_THREADS": "1"})
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    log = folder.with_name(folder.name + ".log")
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--out", str(folder)],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.nice(options.nice),
        )
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        summary = {}
    if status or summary.get("status") != "done" or summary.get("val_loss") is None:
        last = " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
        raise BenchmarkError(f"{variant}, seed {seed}: status {status}: {last}")
    return {
        "val_loss": summary["val_loss"],
        "val_unit": summary["val_unit"],
        "loss_last": summary["loss_last"],
        "sent": summary["internode_bytes_per_step"],
        "skipped": summary["skipped"],
        "codec": summary["codec"],
        "revision": benchmark.revision(),
    }


def descendants() -> list[int]:
    """Processes that this one started, and theirs."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError, ValueError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, left = [], [os.getpid()]
    while left:
        more = children.get(left.pop(), [])
        found += more
        left += more
    return found


def _signal_all(number: signal.Signals) -> None:
    for process in descendants():
        with suppress(ProcessLookupError):
            os.kill(process, number)


def _stop(_number: int, _frame: FrameType | None) -> None:
    _signal_all(signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGSTOP)
    _signal_all(signal.SIGCONT)


def run(options: argparse.Namespace) -> int:
    """All runs that are missing, then the table; the status is 1 if a run failed."""
    names, seeds = variants(options.codecs), range(1, options.seeds + 1)
    results = Results(options)
    missing = [
        (variant, seed) for seed in seeds for variant in names if not results.get(variant, seed)
    ]
    failed = 0
    for place, (variant, seed) in enumerate(missing, start=1):
        print(f"# {place} of {len(missing)}: {variant}, seed {seed}", end="", flush=True)
        if options.dry_run:
            print(": " + " ".join(settings_of(variant, seed, options)))
            continue
        began = time.monotonic()
        try:
            found = train(variant, seed, options)
        except BenchmarkError as error:
            failed += 1
            print(f": failed\nbench_learning: {error}", file=sys.stderr, flush=True)
            continue
        spent = time.monotonic() - began
        print(f": {found['val_loss']:.4f} {found['val_unit']}, {spent:.0f} s", flush=True)
        results.put(variant, seed, found)
    rows = results.table(names, seeds)
    if rows:
        print("", *benchmark.table(HEADS, rows), sep="\n")
    if options.report and rows:
        keep(options, rows)
    return 1 if failed else 0


def keep(options: argparse.Namespace, rows: list[list[str]]) -> None:
    """Write what --report asks for."""
    head = {"command": benchmark.command_line(options, 1)}
    head |= benchmark.facts(f"{options.ranks} on one machine, taken as nodes of one rank")
    body = [
        f"{options.steps} steps of the default job; held-out loss in bits a byte, against the "
        "uncoded run of the same seed; more than 0 is worse; sent: bytes between nodes a step, "
        "over uncoded.",
        "",
        *benchmark.markdown(HEADS, rows),
    ]
    path = benchmark.write_report(options.report, "Learning under codecs", head, body)
    print(f"\n# report: {os.path.relpath(path)}")


def main(options: argparse.Namespace) -> int:
    """The exit status."""
    signal.signal(signal.SIGTSTP, _stop)
    # Told to end while it waits for a run, it ends the run, too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        return run(options)
    except BenchmarkError as error:
        print(f"bench_learning: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(arguments().parse_args()))
