"""Measure the GPU path in a few minutes: kernels, sums in a node, the staged pipeline, steps.

    python tools/bench_gpu.py --report gpu

It starts its own ranks, which share the first GPU where there is only one (and take turns on it,
unless NVIDIA's MPS runs), and measures

    kernels  of all codecs and of sums, against a copy of as many bytes on the same GPU
    node     the sum of 2 and of 4 ranks through CUDA IPC, against torch's own add and copy of as
             many buffers by one process
    staged   the sum of 2 ranks through pinned memory and MPI, copies, messages and additions in
             flight together, against copy, send, copy, one after the other
    step     a training step of a GPT of 125 million parameters on 2 ranks, bf16, with the exchange
             of gradients and without; how often the host waited for the GPU in it; how far the
             gradients are from those of one rank with the whole batch

All times are medians over interleaved rounds, ratios medians of a round's ratios. The last table
holds each figure against its goal; the exit status is 1 if a sum was wrong or a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hpcsync.children import last_line  # noqa: E402
from tools import benchmark  # noqa: E402
from tools.benchmark import MIB, BenchmarkError  # noqa: E402

Row = dict[str, Any]
PART_S = 600.0  # that a part may take
STREAMED = 64 * MIB  # kernels are measured on arrays that no cache holds


@dataclass(frozen=True)
class Run:
    """One job.

    Attributes:
        part: of ``kernels`` and ``tools.gpu_parts.PARTS``.
        keys: of the deck.
    """

    part: str
    ranks: int
    keys: tuple[str, ...] = ()


RUNS = (
    Run("kernels", 1),
    Run("node", 2, ("comm.transport.node=cuda_ipc",)),
    Run("node", 4, ("comm.transport.node=cuda_ipc",)),
    Run("staged", 2, ("comm.transport.node=mpi_staged",)),
    Run("step", 2, ("comm.transport.node=cuda_ipc",)),
)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", default="", help="parts: any of kernels,node,staged,step (all)")
    add("--rounds", type=int, default=9)
    add("--quick", action="store_true", help="small sizes: see that it works")
    add("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: try this program itself")
    add("--json", type=Path, help="write all figures there")
    add("--report", default="", metavar="NAME", help="write tools/reports/DATE-HARDWARE-NAME.md")
    add("--part", default="", help=argparse.SUPPRESS)
    add("--out", type=Path, help=argparse.SUPPRESS)
    add("keys", nargs="*", metavar="KEY=VALUE", help="of the deck, as comm.segment_mb=4")
    return parser


# -- one rank of a part --------------------------------------------------------------------


def part(options: argparse.Namespace) -> int:
    """What each rank does; rank 0 writes the rows to --out."""
    from hpcsync import binding, config, launch
    from hpcsync.parallel.placement import get
    from tools.gpu_parts import PARTS, Place

    settings = config.load(None, ["topology.share_devices=true", *options.keys])
    with launch.start(settings.topology, settings.comm.timeout_s) as runtime:
        kind, index = binding.choose(runtime, options.device, share=True)
        device = get(kind, index)
        place = Place(runtime, device, settings, options.rounds, options.quick)
        rows = PARTS[options.part](place)
        if runtime.rank == 0:
            options.out.write_text(json.dumps(rows))
    return 0


def kernels(options: argparse.Namespace) -> int:
    """All codecs' kernels and the sums; rows as bench_codecs measures them."""
    from tools.bench_codecs import Cpu, measure
    from tools.codec_work import SUMS
    from tools.gpu_work import CODECS, Gpu

    machine: Any = Gpu() if options.device == "cuda" else Cpu()
    count = (MIB if options.quick else STREAMED) // 4
    names = [*CODECS[: 2 if options.quick else None], "sum"]
    copy = machine.copier(4 * count * max(map(sum, SUMS)) // 2)
    found = []
    for name in names:
        work = machine.operations(name, count)
        found += measure(work, options.rounds, copy, machine.seconds)
    rows = [
        {
            "codec": row["codec"],
            "operation": row["operation"],
            "bytes": row["touched"],
            "seconds": benchmark.median(row["seconds"]),
            "copy": row["share"],
        }
        for row in found
    ]
    options.out.write_text(json.dumps(rows))
    return 0


# -- the whole -----------------------------------------------------------------------------


def start(run: Run, options: argparse.Namespace, folder: Path) -> list[Row]:
    """Run a job and read its rows.

    Raises:
        BenchmarkError: it failed; the text is the last that it said.
    """
    from tools.bootstrap import mpirun_command, mpirun_environment

    out = folder / f"{run.part}-{run.ranks}.json"
    keys = run.keys if options.device == "cuda" else ()
    words = ["--part", run.part, "--out", str(out), "--device", options.device]
    words += ["--rounds", str(options.rounds), *(["--quick"] if options.quick else [])]
    command = [sys.executable, str(Path(__file__).resolve()), *words, *keys, *options.keys]
    if run.ranks > 1:
        command = [*mpirun_command(benchmark.find_mpirun(), run.ranks), *command]
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    env = mpirun_environment(os.environ | {"OMP_NUM_THREADS": threads})
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=PART_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"did not end within {PART_S:.0f} s") from None
    if done.returncode or not out.exists():
        raise BenchmarkError(reason(done.stderr) or f"status {done.returncode}")
    rows: list[Row] = json.loads(out.read_text())
    return rows


def reason(text: str) -> str:
    """The line of a failed job's output that says most."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if re.match(r"(hpcsync|bench_gpu): |\w+(\.\w+)*Error\b", line)]
    return told[-1] if told else last_line(text)


@dataclass(frozen=True)
class Goal:
    """A figure and what it should be."""

    what: str
    figure: float | None
    shown: str
    goal: str
    reached: bool

    def cells(self) -> list[str]:
        return [self.what, self.shown, self.goal, "yes" if self.reached else "NO"]


def goals(found: Mapping[str, Sequence[Row]]) -> list[Goal]:
    """What the parts that ran should show."""
    made = []
    if rows := found.get("kernels"):
        worst = min(rows, key=lambda row: row["copy"])
        name = f"kernels over copy bandwidth, least ({worst['codec']} {worst['operation']})"
        made.append(_at_least(name, worst["copy"], 0.8, percent=True))
    if rows := found.get("staged"):
        largest = max(rows, key=lambda row: row["bytes"])
        made.append(_at_least("staged over copy-send-copy, largest", largest["ratio"], 1.6))
    for row in found.get("step", ()):
        share = row["exposed"]
        shown = f"{100 * share:.1f}%"
        made.append(Goal("exposed share of a step", share, shown, "under 15%", share < 0.15))
        if row["waits"] is not None:
            count = row["waits"]
            made.append(Goal("host waits in 3 steps", count, str(count), "0", count == 0))
        error = row["error"]
        made.append(
            Goal("gradients against one rank's", error, f"{error:.1e}", "1e-4", error < 1e-4)
        )
    return made


def _at_least(what: str, figure: float, least: float, *, percent: bool = False) -> Goal:
    shown, goal = (f"{figure:.2f}", f"at least {least:g}")
    if percent:
        shown, goal = f"{100 * figure:.0f}%", f"at least {100 * least:.0f}%"
    return Goal(what, figure, shown, goal, figure >= least)


TABLES: dict[str, tuple[str, dict[str, str]]] = {
    "kernels": (
        "Kernels on one GPU; copy: the time of a copy of as many bytes over the kernel's",
        {
            "codec": "codec",
            "operation": "operation",
            "bytes": "touched",
            "seconds": "time(us)",
            "copy": "copy(%)",
        },
    ),
    "node": (
        "Sum of the ranks of a node; x_torch: times as fast as torch's add and copy",
        {
            "ranks": "ranks",
            "transport": "transport",
            "bytes": "size",
            "seconds": "time(us)",
            "torch": "torch(us)",
            "ratio": "x_torch",
            "right": "right",
        },
    ),
    "staged": (
        "Sum of two ranks through pinned memory; x_plain: times as fast as copy, send, copy",
        {
            "transport": "transport",
            "bytes": "size",
            "seconds": "time(us)",
            "plain": "plain(us)",
            "ratio": "x_plain",
            "right": "right",
        },
    ),
    "step": (
        "A training step of a GPT on two ranks",
        {
            "parameters": "parameters",
            "transport": "transport",
            "with": "with(us)",
            "without": "without(us)",
            "exposed": "exposed(%)",
            "waits": "host_waits",
            "error": "gradient_error",
        },
    ),
}


def cell(key: str, value: Any) -> str:
    """A figure as text."""
    if value is None:
        return "-"
    if key in ("seconds", "torch", "plain", "with", "without"):
        return f"{value * 1e6:.1f}"
    if key in ("copy", "exposed"):
        return f"{value * 100:.1f}"
    if key == "bytes":
        return f"{value / MIB:.2f} MiB"
    if key == "right":
        return "yes" if value else "WRONG"
    return f"{value:.2g}" if key == "error" else f"{value:.2f}" if key == "ratio" else str(value)


def table(name: str, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells."""
    columns = TABLES[name][1]
    return [*columns.values()], [[cell(key, row[key]) for key in columns] for row in rows]


def measure(options: argparse.Namespace) -> int:
    """Everything; the exit status."""
    runs = chosen(options)
    head = {"command": benchmark.command_line(options, 1)} | facts(options)
    print(*(f"# {key}: {value}" for key, value in head.items()), sep="\n", flush=True)
    found: dict[str, list[Row]] = {}
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        for run in runs:
            try:
                rows = start(run, options, Path(folder))
            except BenchmarkError as error:
                faults.append(f"{run.part} on {run.ranks} ranks: {error}")
                print(f"bench_gpu: {faults[-1]}", file=sys.stderr, flush=True)
                continue
            found.setdefault(run.part, []).extend(rows)
            print("", TABLES[run.part][0], "", sep="\n")
            print(*benchmark.table(*table(run.part, rows)), sep="\n", flush=True)
    judged = goals(found)
    if judged:
        print("", *benchmark.table(HEADS, [each.cells() for each in judged]), sep="\n")
    keep(options, head, found, judged, faults)
    wrong = any(not row.get("right", True) for rows in found.values() for row in rows)
    return 1 if faults or wrong else 0


HEADS = ["figure", "here", "goal", "reached"]


def chosen(options: argparse.Namespace) -> list[Run]:
    """The jobs to run. Raises BenchmarkError: there is no GPU, or no such part."""
    names = [name.strip() for name in options.only.split(",") if name.strip()]
    for name in names:
        if name not in TABLES:
            raise BenchmarkError(f"--only: no part {name!r}; there are {', '.join(TABLES)}")
    if options.rounds < 1:
        raise BenchmarkError("--rounds must be above 0")
    if options.device == "cpu" and options.report:
        raise BenchmarkError("--report: figures of --device cpu say nothing of a GPU")
    return [run for run in RUNS if not names or run.part in names]


def facts(options: argparse.Namespace) -> dict[str, str]:
    """The head of the output. Raises BenchmarkError: there is no GPU that can be used."""
    if options.device == "cpu":
        return benchmark.facts("the host's processor in the GPU's place")
    from hpcsync import cuda_state
    from hpcsync.errors import DeviceError

    try:
        state = cuda_state.require()
    except DeviceError as error:
        raise BenchmarkError(f"{error}; nothing was measured") from None
    known = cuda_state.identity(state)
    gpu = f"{len(state.gpus)} x {state.gpus[0].name}, driver for CUDA {known['driver']}"
    return {"gpu": f"{gpu}, CuPy {known['cupy']}"} | benchmark.facts("2 and 4 ranks share a GPU")


def keep(
    options: argparse.Namespace,
    head: Mapping[str, str],
    found: Mapping[str, list[Row]],
    judged: Sequence[Goal],
    faults: Sequence[str],
) -> None:
    """Write what --json and --report ask for."""
    if options.json:
        options.json.write_text(benchmark.as_json({**head, **found, "failed": list(faults)}))
    if not options.report:
        return
    note = f"Medians of {options.rounds} interleaved rounds; ratios are medians of the rounds'."
    body = [note, "", *benchmark.markdown(HEADS, [each.cells() for each in judged])]
    for name, rows in found.items():
        body += ["", f"## {TABLES[name][0]}", "", *benchmark.markdown(*table(name, rows))]
    if faults:
        body += ["", "## Failed", "", *(f"- {fault}" for fault in faults)]
    gpu = re.sub(r"[^a-z0-9]+", "-", head["gpu"].partition(",")[0].lower()).strip("-")
    path = benchmark.write_report(f"{gpu}-{options.report}", "The GPU path", head, body)
    print(f"\n# report: {os.path.relpath(path)}")


def main(options: argparse.Namespace) -> int:
    """The exit status."""
    try:
        if options.part:
            return kernels(options) if options.part == "kernels" else part(options)
        return measure(options)
    except BenchmarkError as error:
        print(f"bench_gpu: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    given = arguments().parse_args()
    if given.part and given.part != "kernels":
        from hpcsync import launch

        launch.guard(lambda: main(given))
    sys.exit(main(given))
