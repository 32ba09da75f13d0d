"""Time saving of a state beside torch.save, torch.distributed.checkpoint and a plain write.

    python tools/bench_checkpoint.py --ranks 2
    python tools/bench_checkpoint.py --ranks 4 --state 600M --rounds 9 --folder /scratch
    python tools/bench_checkpoint.py --ranks 2 --only plain,hpcsync --step-ms 0,20,200
    python tools/bench_checkpoint.py --ranks 2 --replay-rounds 20 laptop model.width=384

The state is that of a model under Adam: weights and two means, the same on all ranks. The ways to
save it (tools/savers.py) take turns, in an order that changes from round to round; what one has
written is removed, and the disk comes to rest, before the next begins. Meanwhile each rank
"trains": steps of matrix products of --step-ms each, with an agreement of all ranks at the end; of
0 ms: pauses. A table for each shows medians over rounds, of the slowest rank:

    stall(ms)    from the call until training may go on
    durable(ms)  from the call until it is known that all is on the disk
    MiB/s        the state over that time
    x_plain      the time of a plain parallel write with fsync of the same bytes over it
    x_copy       stall over the time of copying this rank's share of the state in memory
    lost(ms)     all that training lost: the stall, and what steps took longer until then

With --replay-rounds a model is trained with the replay log and without, in turns; deck and
settings are those of hpcsync.train: step time, its ratio to that without in the same round (with
the middle half of the rounds), and bytes a rank logs a step.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import benchmark  # noqa: E402
from tools.benchmark import MIB, BenchmarkError, median  # noqa: E402

if TYPE_CHECKING:
    from tools.savers import Training

HEADS = ["way", "stall(ms)", "durable(ms)", "MiB/s", "x_plain", "x_copy", "lost(ms)"]
NAMES = ("plain", "torch.save", "dcp", "dcp-async", "hpcsync")
_PATIENCE_S = 600.0


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("deck", nargs="*", metavar="[DECK] KEY=VALUE", help="for --replay-rounds: what is trained")
    add("--only", default=",".join(NAMES), help="ways to save (%(default)s)")
    add("--state", type=benchmark.parse_size, default="300M", help="bytes of it (%(default)s)")
    add("--rounds", type=int, default=7, help="of saving (%(default)s); 0: none")
    add("--step-ms", type=_milliseconds, default="0,50", help="of steps (%(default)s)")
    add("--folder", type=Path, help="where to write (here): a folder of the disk to be measured")
    add("--replay-rounds", type=int, default=0, help="with the replay log and without")
    add("--block", type=int, default=10, help="steps of each in such a round (%(default)s)")
    add("--warm-up", type=int, default=5, help="steps of each before (%(default)s)")
    add("--json", type=Path, help="write all samples there")
    add("--report", default="", metavar="NAME", help="write tools/reports/DATE-HARDWARE-NAME.md")
    benchmark.add_launch_arguments(parser)
    return parser


def _milliseconds(text: str) -> list[float]:
    """Of "0,50"; raises argparse's error."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: write milliseconds, as 0,50")
    return list(dict.fromkeys(found))


def chosen(options: argparse.Namespace) -> list[str]:
    """Names of the ways, each once. Raises BenchmarkError."""
    from tools import savers

    names = [name.strip() for name in options.only.split(",") if name.strip()]
    for name in names:
        savers.check(name)
    return list(dict.fromkeys(names))


class Bench:
    """All ways to save one state, while steps of each length go on."""

    def __init__(self, runtime: Any, options: argparse.Namespace, folder: Path) -> None:
        from tools import savers

        self.runtime, self.options, self.folder = runtime, options, folder
        self.state = savers.make_state(options.state)
        names = chosen(options)
        self.trainings = [savers.Training(runtime, each) for each in options.step_ms]
        self.ways = {name: savers.WAYS[name](runtime, self.state, folder) for name in names}
        self.samples: dict[tuple[str, float], dict[str, list[float]]] = {
            (name, each.milliseconds): {"stall": [], "durable": [], "lost": [], "copy": []}
            for each in self.trainings
            for name in names
        }

    def run(self) -> None:
        """A warm-up, then the rounds."""
        order = [(name, each) for each in self.trainings for name in self.ways]
        shuffle = random.Random(0)
        for name in self.ways:
            self.sample(name, self.trainings[0])
        for _ in range(self.options.rounds):
            shuffle.shuffle(order)
            copy = self.copy()
            for name, training in order:
                found = self.sample(name, training) | {"copy": copy}
                for key, value in found.items():
                    self.samples[name, training.milliseconds][key].append(value)
        for samples in self.samples.values():
            for key, values in samples.items():
                samples[key] = self.runtime.allreduce_scalar(values, "max")

    def sample(self, name: str, training: Training) -> dict[str, float]:
        """Save once."""
        from tools import savers

        runtime, way = self.runtime, self.ways[name]
        folder = self.folder / name
        if runtime.rank == 0:
            folder.mkdir()
            savers.sync_folder(self.folder)
        usual = training.usual()
        runtime.comm.Barrier()
        start = time.perf_counter()
        way.start(folder)
        stalled = time.perf_counter()
        steps = 0
        while not way.step():
            training.step()
            steps += 1
            if time.perf_counter() - start > _PATIENCE_S:
                raise BenchmarkError(f"{name}: not on the disk after {_PATIENCE_S:.0f} s")
        ended = time.perf_counter()
        runtime.barrier()
        if runtime.rank == 0:
            savers.empty(self.folder)
        runtime.barrier()
        lost = stalled - start + (ended - stalled - steps * usual if steps else 0.0)
        return {"stall": stalled - start, "durable": ended - start, "lost": lost}

    def copy(self) -> float:
        """Seconds of copying this rank's share of the state in memory, all ranks at once."""
        import torch

        share = torch.ones(self.options.state // self.runtime.size, dtype=torch.uint8)
        target = torch.zeros_like(share)
        times = []
        for _ in range(3):
            self.runtime.comm.Barrier()
            start = time.perf_counter()
            target.copy_(share)
            times.append(time.perf_counter() - start)
        return median(times)

    def tables(self) -> list[list[dict[str, Any]]]:
        """The figures of each table, one for each length of steps."""
        return [
            [self._row(name, training.milliseconds) for name in self.ways]
            for training in self.trainings
        ]

    def _row(self, name: str, step_ms: float) -> dict[str, Any]:
        from tools import savers

        nbytes, samples = savers.size(self.state), self.samples[name, step_ms]
        plain = self.samples.get(("plain", step_ms), {}).get("durable", [])
        stall, durable = samples["stall"], samples["durable"]
        return {
            "name": name,
            "step_ms": step_ms,
            "bytes": nbytes,
            "stall_ms": median(stall) * 1e3,
            "durable_ms": median(durable) * 1e3,
            "rate": nbytes / median(durable),
            "x_plain": _ratio(plain, durable),
            "x_copy": _ratio(stall, samples["copy"]),
            "copy_ms": median(samples["copy"]) * 1e3,
            "lost_ms": median(samples["lost"]) * 1e3 if step_ms else None,
            "samples": samples,
        }

    def close(self) -> None:
        """Free what the ways hold."""
        for way in self.ways.values():
            way.close()


def _ratio(these: list[float], those: list[float]) -> float:
    """Median over rounds; nan without samples."""
    return median(one / other for one, other in zip(these, those, strict=False))


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text."""

    def number(value: float | None, places: int) -> str:
        return "-" if value is None or math.isnan(value) else f"{value:.{places}f}"

    return [
        row["name"],
        number(row["stall_ms"], 1),
        number(row["durable_ms"], 0),
        number(row["rate"] / MIB, 0),
        number(row["x_plain"], 2),
        number(row["x_copy"], 2),
        number(row["lost_ms"], 1),
    ]


def file_system(folder: Path) -> str:
    """Its type, as the kernel tells it."""
    found = ("/", "unknown")
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        for line in mounts:
            place, kind = line.split()[1:3]
            if folder.is_relative_to(place) and len(place) >= len(found[0]):
                found = (place, kind)
    return found[1]


def measure(options: argparse.Namespace) -> int:
    """What each rank does."""
    from hpcsync import config, launch
    from tools import contenders, replay_cost
    from tools.bench_train import read_config

    chosen(options)
    with launch.start(config.TopologyConfig()) as probe:
        resolved = read_config(options, probe.size) if options.replay_rounds else config.Config()
    with launch.start(resolved.topology, resolved.comm.timeout_s) as runtime:
        folder = _scratch(runtime, options)
        head: dict[str, str] = {}
        if runtime.rank == 0:
            head = {"command": benchmark.command_line(options, runtime.size)}
            head |= benchmark.facts(options.place or runtime.topology.describe())
            head["file system"] = file_system(folder)
            print(*(f"# {key}: {value}" for key, value in head.items()), sep="\n", flush=True)
        try:
            saving, replay = [], []
            if options.rounds:
                bench = Bench(runtime, options, folder)
                bench.run()
                saving = bench.tables()
                bench.close()
            if options.replay_rounds:
                replay = replay_cost.measure(runtime, resolved, options, folder / "replay")
            if runtime.rank == 0:
                keep(options, head, saving, replay)
            contenders.close_gloo(runtime)
        finally:
            if runtime.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
    return 0


def _scratch(runtime: Any, options: argparse.Namespace) -> Path:
    """A new folder, the same for all ranks."""
    place = (options.folder or Path.cwd()).resolve()
    found = ""
    if runtime.rank == 0:
        try:
            found = tempfile.mkdtemp(prefix="bench-checkpoint-", dir=place)
        except OSError as error:
            raise BenchmarkError(f"--folder: {place}: {error.strerror}") from None
    return Path(runtime.bcast(found))


def keep(
    options: argparse.Namespace,
    head: dict[str, str],
    saving: list[list[dict[str, Any]]],
    replay: list[dict[str, Any]],
) -> None:
    """Print the tables, and write what --json and --report ask for."""
    from tools import replay_cost

    found: list[tuple[str, list[str], list[list[str]]]] = []
    for rows in saving:
        first = rows[0]
        meanwhile = f"steps of {first['step_ms']:g} ms" if first["step_ms"] else "pauses"
        title = (
            f"{first['bytes'] / MIB:.0f} MiB saved, meanwhile {meanwhile}; copying a rank's share "
            f"takes {first['copy_ms']:.1f} ms; medians of {options.rounds} rounds"
        )
        found.append((title, HEADS, [cells(row) for row in rows]))
    if replay:
        title = f"a training step; medians of {options.replay_rounds} rounds of {options.block}"
        found.append((title, replay_cost.HEADS, [replay_cost.cells(row) for row in replay]))
    for title, heads, texts in found:
        print("", f"# {title}", *benchmark.table(heads, texts), sep="\n", flush=True)
    if options.json:
        options.json.write_text(benchmark.as_json(head | {"saving": saving, "replay": replay}))
    if options.report:
        body = ["Columns: `python tools/bench_checkpoint.py --help`."]
        for title, heads, texts in found:
            body += ["", f"## {title[0].upper()}{title[1:]}", "", *benchmark.markdown(heads, texts)]
        path = benchmark.write_report(options.report, "Checkpoints", head, body)
        print(f"\n# report: {os.path.relpath(path)}")


if __name__ == "__main__":
    benchmark.main("bench_checkpoint", arguments().parse_args(), measure)
