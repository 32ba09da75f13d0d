"""How long tools/trace.py takes with the trace of a large run.

    python tools/bench_tracing.py
    python tools/bench_tracing.py --ranks 2048 --nodes 256 --steps 20

The trace is synthetic: as many ranks, steps and spans as are asked for, with noise in every
duration. Each command runs as a process of its own; its largest resident memory is the kernel's
figure. Times hang on the machine: the first line names it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import benchmark  # noqa: E402
from tools.benchmark import MIB  # noqa: E402

HEADS = ["command", "wall(s)", "cpu(s)", "memory(MiB)"]


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ranks", type=int, default=512)
    add("--nodes", type=int, default=64)
    add("--steps", type=int, default=100, help="that are written (%(default)s)")
    add("--buckets", type=int, default=16)
    add("--segments", type=int, default=3, help="of a bucket (%(default)s)")
    add("--window", default="50-52", help="steps that are exported (%(default)s)")
    add("--report", default="", metavar="NAME", help="write tools/reports/DATE-HARDWARE-NAME.md")
    return parser


def timed(command: list[str]) -> tuple[float, float, float]:
    """(seconds, seconds of processor, MiB) of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    taken = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"bench_tracing: {' '.join(command)} failed")
    return taken, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def main() -> int:
    """The command."""
    from hpcsync import trace
    from tests import traces

    options = arguments().parse_args()
    alone = argparse.Namespace(**vars(options), vcluster="")
    head = {"command": benchmark.command_line(alone, 1)}
    head |= benchmark.facts(f"trace of {options.ranks} ranks on {options.nodes} nodes", mpi=False)
    folder = Path(tempfile.mkdtemp(prefix="bench-tracing-"))
    try:
        shape = {name: getattr(options, name) for name in ("ranks", "nodes", "steps", "buckets")}
        run = traces.make(folder / "run", segments=options.segments, **shape)
        with trace.open(run) as found:
            spans = found.events(0).shape[0] / options.steps
        nbytes = sum(path.stat().st_size for path in (run / "trace").iterdir())
        head["trace"] = f"{options.steps} steps, {spans:.0f} spans a step, {nbytes / MIB:.0f} MiB"
        print(*(f"# {key}: {value}" for key, value in head.items()), sep="\n", flush=True)
        tool = [sys.executable, str(ROOT / "tools" / "trace.py")]
        out = str(folder / "window.json")
        rows = []
        for words in (
            ["summary", str(run)],
            ["export", str(run), "--steps", options.window, "--output", out],
        ):
            taken, cpu, memory = timed([*tool, *words])
            shown = " ".join(word for word in words if "/" not in word and word != "--output")
            rows.append([shown, f"{taken:.1f}", f"{cpu:.1f}", f"{memory:.0f}"])
            print(f"# {shown}: {taken:.1f} s", flush=True)
    finally:
        shutil.rmtree(folder)
    print("", *benchmark.table(HEADS, rows), sep="\n")
    if options.report:
        body = [*benchmark.markdown(HEADS, rows)]
        path = benchmark.write_report(options.report, "Reading a large trace", head, body)
        print(f"\n# report: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
