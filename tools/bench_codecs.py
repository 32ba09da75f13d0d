"""Time every codec and the node's sum on one core, against a copy of as many bytes.

    python tools/bench_codecs.py
    python tools/bench_codecs.py --only int8,int4,sum --mb 64 --isa avx2
    python tools/bench_codecs.py --device gpu --report codecs

For each size (--mb, and --piece, which stays in cache as pieces of a bucket do) the table shows
medians over rounds of

    time(us)       a call, by processor time; on a GPU by events on the stream
    in(GB/s)       of float32 that goes in, or comes out
    touched(GB/s)  of all bytes that are read or written, each once
    copy(%)        how much of the time a copy of as many bytes takes: copying n bytes touches 2 n.
                   The copy is made in the same round, next to the call: by memcpy, or the driver
    x_numpy        how many times as fast as the NumPy reference, which gives the same bits

encode is with error feedback; combine is what an owner does with one other rank's piece (decode,
add, mean, code again); exchange is all but the network of a codec whose coded forms are added;
"sum 4 -> 1" is the mean of four buffers written to one of them.

A second table shows coded over raw bytes, the error relative to the values (2-norm) of normal
values and of heavy-tailed ones (Student's t, 3 degrees of freedom) without error feedback; for
topk also its count over k, and how many times as fast its encode is as torch.topk of |x|.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import benchmark  # noqa: E402
from tools.benchmark import MIB, BenchmarkError, median  # noqa: E402

if TYPE_CHECKING:
    from tools.codec_work import Operation

SAMPLE_S = 0.004  # calls of one sample take at least about this long together


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", default="", help="codecs, and sum (all)")
    add("--mb", type=float, default=64.0, help="MiB of float32, much more than a cache (64)")
    add("--piece", type=float, default=1.0, help="MiB of a piece; 0: none (1)")
    add("--rounds", type=int, default=9)
    add("--isa", default="", choices=("plain", "avx2", "avx512"), help="of the native kernels")
    add("--device", default="cpu", choices=("cpu", "gpu"))
    add("--reference", action=argparse.BooleanOptionalAction, default=True, help="time NumPy too")
    add("--json", type=Path, help="write all samples there")
    add("--report", default="", metavar="NAME", help="write tools/reports/DATE-HARDWARE-NAME.md")
    return parser


# -- measuring ---------------------------------------------------------------------------

Timer = Callable[[Callable[[], object], int], float]


class Cpu:
    """This process's memory and its clock."""

    def seconds(self, run: Callable[[], object], calls: int) -> float:
        """Processor time of a call, on average over some: others on the core do not count."""
        start = time.process_time()
        for _ in range(calls):
            run()
        return (time.process_time() - start) / calls

    def copier(self, most: int) -> Callable[[int], None]:
        """memcpy of any size up to ``most`` bytes."""
        import numpy as np

        # Not zeros: untouched pages would all be one.
        source, target = np.ones(most, np.uint8), np.ones(most, np.uint8)

        def copy(nbytes: int) -> None:
            ctypes.memmove(target.ctypes.data, source.ctypes.data, nbytes)

        return copy

    def operations(self, name: str, count: int, *, native: bool = True) -> list[Operation]:
        """Of a codec, or of ``sum``."""
        from hpcsync import codecs
        from tools import codec_work

        if name == "sum":
            return codec_work.sums(count)
        codec = codecs.build(name, codec_work.SETTINGS, native=native)
        return codec_work.operations(codec, count)


def enough(run: Callable[[], object], timer: Timer) -> int:
    """Calls of a sample; also warms up."""
    run()
    return max(1, min(1000, round(SAMPLE_S / max(timer(run, 1), 1e-9))))


def measure(
    operations: Sequence[Operation], rounds: int, copy: Callable[[int], None], timer: Timer
) -> list[dict[str, Any]]:
    """Samples of each operation and of the copy beside it, in turns."""
    calls, rows = [], []
    for each in operations:
        each.reset()
        half = each.touched // 2
        calls.append((enough(each.run, timer), enough(lambda half=half: copy(half), timer)))
        rows.append(_row(each))
    for turn in range(rounds):
        for each, (own, copies), row in zip(operations, calls, rows, strict=True):
            half = each.touched // 2
            each.reset()
            if turn % 2:
                row["copy"].append(timer(lambda half=half: copy(half), copies))
            row["seconds"].append(timer(each.run, own))
            if not turn % 2:
                row["copy"].append(timer(lambda half=half: copy(half), copies))
    for row in rows:
        pairs = zip(row["copy"], row["seconds"], strict=True)
        row["share"] = median(other / own for other, own in pairs)
    return rows


def _row(each: Operation) -> dict[str, Any]:
    return {
        "codec": each.codec,
        "operation": each.name,
        "touched": each.touched,
        "source": each.source,
        "seconds": [],
        "copy": [],
        "numpy": None,
    }


def add_reference(cpu: Cpu, name: str, count: int, rows: list[dict[str, Any]]) -> None:
    """Time the NumPy forms of the same operations, once each after a first call."""
    for row, each in zip(rows, cpu.operations(name, count, native=False), strict=True):
        each.reset()
        each.run()
        row["numpy"] = cpu.seconds(each.run, 1)


def time_topk(cpu: Cpu, count: int, rounds: int) -> float:
    """How many times as fast as torch.topk, which sorts nothing, topk's encode is."""
    import torch

    from tools import codec_work

    torch.set_num_threads(1)
    encode = cpu.operations("topk", count)[0].run
    magnitudes = torch.from_numpy(codec_work.normal(count)).abs_()
    k = max(1, round(count * codec_work.SETTINGS.ratio))

    def theirs() -> None:
        torch.topk(magnitudes, k, sorted=False)

    own, other = enough(encode, cpu.seconds), enough(theirs, cpu.seconds)
    return median(cpu.seconds(theirs, other) / cpu.seconds(encode, own) for _ in range(rounds))


# -- showing -----------------------------------------------------------------------------

HEADS = [
    "codec",
    "operation",
    "MiB",
    "time(us)",
    "in(GB/s)",
    "touched(GB/s)",
    "copy(%)",
    "x_numpy",
]
QUALITY_HEADS = ["codec", "coded/raw", "error normal", "error heavy", "count/k", "x_torch.topk"]


def cells(row: dict[str, Any]) -> list[str]:
    """A timed row as text."""
    once = median(row["seconds"])
    return [
        row["codec"],
        row["operation"],
        f"{row['mib']:g}",
        f"{once * 1e6:.1f}",
        f"{row['source'] / once / 1e9:.2f}",
        f"{row['touched'] / once / 1e9:.2f}",
        f"{row['share'] * 100:.0f}",
        f"{row['numpy'] / once:.1f}" if row["numpy"] else "-",
    ]


def quality_cells(row: dict[str, Any]) -> list[str]:
    """A row of the second table as text."""

    def number(key: str) -> str:
        return f"{row[key]:.2f}" if key in row else "-"

    return [
        row["codec"],
        f"{row['ratio_normal']:.4f}",
        f"{row['error_normal']:.2e}",
        f"{row['error_heavy']:.2e}",
        number("count_over_k"),
        number("x_topk"),
    ]


def chosen(options: argparse.Namespace) -> list[str]:
    """The codecs to time; one that cannot be had is told. Raises BenchmarkError."""
    from hpcsync import codecs
    from hpcsync.errors import HpcsyncError
    from tools import codec_work

    wanted = [name.strip() for name in options.only.split(",") if name.strip()]
    found = []
    for name in wanted or [*codecs.BUILTINS, "sum"]:
        if name != "sum" and name not in codecs.BUILTINS:
            raise BenchmarkError(
                f"--only: no codec {name!r}; there are {', '.join(codecs.BUILTINS)}, and sum"
            )
        try:
            if name != "sum":
                codecs.build(name, codec_work.SETTINGS)
        except (HpcsyncError, ImportError, AttributeError) as error:
            print(f"bench_codecs: {name}: left out: {error}", file=sys.stderr)
            continue
        found.append(name)
    return found


def prepare(options: argparse.Namespace) -> str:
    """Pin this process to one core, choose the instruction set; what runs, in words.

    Before NumPy is imported, so that its threads are as many. Raises BenchmarkError.
    """
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    from hpcsync.device import kernels

    native = kernels.load()
    if native is None:
        print(f"bench_codecs: warning: {kernels.missing()}", file=sys.stderr)
        if options.isa:
            raise BenchmarkError(f"--isa {options.isa}: there are no native kernels")
        return "NumPy on one core"
    if options.isa and not native.use_isa(options.isa):
        raise BenchmarkError(f"--isa {options.isa}: this processor lacks it")
    return f"{native.isa} kernels on one core"


def run(options: argparse.Namespace) -> int:
    """Everything."""
    machine: Any
    if options.device == "gpu":
        from tools.gpu_work import CODECS, Gpu

        machine = Gpu()
        what = f"GPU kernels, {machine.name}"
        names = [name for name in chosen(options) if name in (*CODECS, "sum")]
    else:
        what = prepare(options)
        machine = Cpu()
        names = chosen(options)
    head = {"command": benchmark.command_line(options, 1)} | benchmark.facts(what, mpi=False)
    print(*(f"# {key}: {value}" for key, value in head.items()), sep="\n", flush=True)
    rows = [row for size in sizes(options) for row in time_all(machine, names, size, options)]
    qualities = [] if options.device == "gpu" else qualify(machine, names, options)
    keep(options, head, rows, qualities)
    return 0


def sizes(options: argparse.Namespace) -> list[float]:
    """In MiB."""
    return [size for size in (options.mb, options.piece) if size > 0]


def time_all(
    machine: Any, names: Sequence[str], size: float, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of one size, shown as they come."""
    from hpcsync.device import kernels

    count = max(1, int(size * MIB) // 4)
    copy = machine.copier(16 * count)  # half of the most that is touched: four in, four out
    rows = []
    for name in names:
        operations = machine.operations(name, count)
        found = measure(operations, options.rounds, copy, machine.seconds)
        natively = isinstance(machine, Cpu) and kernels.load() is not None
        if natively and options.reference and name != "sum":
            add_reference(machine, name, count, found)
        found = [row | {"mib": size} for row in found]
        show(HEADS, [cells(row) for row in found])
        rows += found
    return rows


def qualify(cpu: Cpu, names: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the second table, of the larger size."""
    from tools import codec_work

    count = max(1, int(options.mb * MIB) // 4)
    found = [codec_work.quality(name, count) for name in names if name != "sum"]
    for row in found:
        if row["codec"] == "topk":
            row["count_over_k"] = row["kept_normal"] / codec_work.SETTINGS.ratio
            row["x_topk"] = time_topk(cpu, count, options.rounds)
    if found:
        show(QUALITY_HEADS, [quality_cells(row) for row in found])
    return found


def show(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    print("", *benchmark.table(heads, rows), sep="\n", flush=True)


def keep(
    options: argparse.Namespace,
    head: dict[str, str],
    rows: list[dict[str, Any]],
    qualities: list[dict[str, Any]],
) -> None:
    """Write what --json and --report ask for."""
    if options.json:
        options.json.write_text(benchmark.as_json(head | {"rows": rows, "quality": qualities}))
    if options.report:
        body = [
            f"Medians of {options.rounds} interleaved rounds; copy(%): the time of a copy of as "
            "many bytes as are touched, over the row's; x_numpy: times as fast as NumPy.",
            "",
            *benchmark.markdown(HEADS, [cells(row) for row in rows]),
        ]
        if qualities:
            table = benchmark.markdown(QUALITY_HEADS, [quality_cells(row) for row in qualities])
            body += ["", "Error: relative to the values (2-norm).", "", *table]
        path = benchmark.write_report(options.report, "Codecs", head, body)
        print(f"\n# report: {os.path.relpath(path)}")


def main(options: argparse.Namespace) -> int:
    """The exit status."""
    try:
        if min(options.mb, options.rounds) <= 0:
            raise BenchmarkError("--mb and --rounds must be above 0")
        return run(options)
    except BenchmarkError as error:
        print(f"bench_codecs: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(arguments().parse_args()))
