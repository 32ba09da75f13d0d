"""Time allreduces: every algorithm of hpcsync, MPI's own and Gloo's, side by side in one run.

    python tools/bench_allreduce.py --ranks 4
    python tools/bench_allreduce.py --vcluster nodes=2,rate=1gbit --ranks-per-node 2 -e 25M
    mpirun -n 8 python tools/bench_allreduce.py --sizes 25M --only auto,mpi
    python tools/bench_allreduce.py --ranks 512 --sizes 64K --only auto,halving,mpi --rounds 3

The columns are nccl-tests': size, count, type, time, algbw (size / time), busbw (algbw x
2 (n-1) / n), and the error against a float64 sum, relative to its largest element. A round
times every contender once, in an order that changes; the time of a round is the slowest rank's
mean over some calls in a row, and the table shows the median over rounds. "x mpi" and "x gloo"
say how many times as fast as those; "bound" is time over that of a hierarchical sum whose
only cost is the shaped link; "sent" is what a node sent through its interfaces in one call;
"cpu" is the processor time of rank 0, all threads, in percent of the time.

"hpcsync" rows run through the progress thread and the node's shared memory as training does;
"native" there is MPI's nonblocking allreduce. Needs torch for Gloo only, which takes part on
up to 16 ranks where torch is installed, and on more with --gloo.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import benchmark  # noqa: E402
from tools.benchmark import MIB, BenchmarkError, median  # noqa: E402

ALGORITHMS = ("auto", "hierarchical", "direct", "ring", "halving", "doubling", "native")
GLOO_MOST_RANKS = 16
ROUND_S = 0.02  # calls of one contender in one round take about this long together
MOST_CALLS = 200


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    size = benchmark.parse_size
    add("-b", "--begin", type=size, default=4096, help="smallest size (4K)")
    add("-e", "--end", type=size, default=25 * MIB, help="largest size (25M)")
    add("-f", "--factor", type=float, default=0.0, help="between sizes (three in all)")
    add("--sizes", default="", help="sizes instead of -b, -e, -f: 64K,1M,25M")
    add("--dtype", default="float32", choices=("float32", "float64"))
    add("--only", default="", help=f"contenders: any of {','.join(ALGORITHMS)},mpi,gloo")
    add("--rounds", type=int, default=9)
    add("--calls", type=int, default=0, help="calls a round (0: for about 20 ms)")
    add("--gloo", action=argparse.BooleanOptionalAction, default=None)
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="comm.segment_mb=4 ...")
    add("--json", type=Path, help="write all samples there")
    add("--report", default="", metavar="NAME", help="write tools/reports/DATE-HARDWARE-NAME.md")
    benchmark.add_launch_arguments(parser)
    return parser


# -- contenders --------------------------------------------------------------------------


class Contender(ABC):
    """One way to sum `array` over all ranks in place."""

    name: str
    array: Any  # np.ndarray, 1-D

    @abstractmethod
    def prepare(self, count: int) -> None:
        """Get ready for the first `count` elements; collective."""

    @abstractmethod
    def run(self) -> None:
        """One sum."""


class Hpcsync(Contender):
    """An algorithm of hpcsync, on memory that the node shares."""

    def __init__(self, collectives: Any, algorithm: str, dtype: Any, most: int) -> None:
        self.name = f"hpcsync {algorithm}"
        self._collectives = collectives
        self._algorithm = algorithm
        self._dtype = dtype
        self._buffer = collectives.buffer(most * dtype.itemsize)
        self.array = self._buffer.own.view(dtype.storage)
        self._bound: Any = None

    def prepare(self, count: int) -> None:
        if self._bound is not None:
            self._bound.close()
        self._bound = self._collectives.allreduce(
            self._buffer, self._dtype, count=count, algorithm=self._algorithm, label=self.name
        )

    def run(self) -> None:
        self._bound.start()
        self._bound.wait()


class Mpi(Contender):
    """MPI's own blocking allreduce."""

    name = "mpi"

    def __init__(self, comm: Any, dtype: Any, most: int) -> None:
        import numpy as np
        from mpi4py import MPI

        self._comm, self._in_place = comm, MPI.IN_PLACE
        self.array = np.zeros(most, dtype.storage)

    def prepare(self, count: int) -> None:
        self._part = self.array[:count]

    def run(self) -> None:
        self._comm.Allreduce(self._in_place, self._part)


class Gloo(Contender):
    """torch.distributed's allreduce over Gloo, as torch DDP on CPUs has it."""

    name = "gloo"

    def __init__(self, runtime: Any, dtype: Any, most: int) -> None:
        import numpy as np

        self._dist = benchmark.start_gloo(runtime)
        import torch

        torch.set_num_threads(1)
        self.array = np.zeros(most, dtype.storage)
        self._tensor = torch.from_numpy(self.array)

    def prepare(self, count: int) -> None:
        self._part = self._tensor[:count]

    def run(self) -> None:
        self._dist.all_reduce(self._part)


def chosen(options: argparse.Namespace, size: int, nodes: int) -> list[str]:
    """Names of the contenders. Raises BenchmarkError."""
    torch_is_there = importlib.util.find_spec("torch") is not None
    if options.only:
        names = [name.strip() for name in options.only.split(",") if name.strip()]
        for name in names:
            if name not in (*ALGORITHMS, "mpi", "gloo"):
                raise BenchmarkError(f"--only: no contender {name!r}")
    else:
        # What auto and hierarchical stand for there is measured under its own name.
        names = [*ALGORITHMS[1 if nodes > 1 else 2 :], "mpi"]
        if torch_is_there and options.gloo is None and size <= GLOO_MOST_RANKS:
            names.append("gloo")
    if options.gloo and "gloo" not in names:
        names.append("gloo")
    if options.gloo is False:
        names = [name for name in names if name != "gloo"]
    if "gloo" in names and not torch_is_there:
        raise BenchmarkError("gloo needs torch: pip install torch, or --no-gloo")
    return names


# -- measuring ---------------------------------------------------------------------------


class Bench:
    """The measurements of one job."""

    def __init__(self, runtime: Any, contenders: Sequence[Contender], dtype: Any) -> None:
        from mpi4py import MPI

        self.runtime, self.contenders, self.dtype = runtime, contenders, dtype
        self.mpi = MPI
        # A spinning barrier starts the ranks closest together, where it is not the load itself.
        spins = runtime.size <= 4 * (os.cpu_count() or 1)
        self.barrier = runtime.comm.Barrier if spins else runtime.barrier

    def size(self, count: int, rounds: int, calls: int) -> list[dict[str, Any]]:
        """Check and time every contender on `count` elements; a row each."""
        own, expected = self._data(count)
        rows, repeats = [], []
        for contender in self.contenders:
            contender.prepare(count)
            contender.array[:count] = own
            self.barrier()
            start = time.perf_counter()
            contender.run()
            spent = time.perf_counter() - start
            wrong = abs(contender.array[:count].astype("float64") - expected).max()
            error = float(wrong / abs(expected).max())
            contender.array[:count] = 0  # sums of sums would overflow
            contender.run()
            spent, error = self.runtime.allreduce_scalar([spent, error], "max")
            repeats.append(calls or max(1, min(MOST_CALLS, int(ROUND_S / spent))))
            rows.append({"name": contender.name, "error": error})
            rows[-1] |= {"seconds": [], "sent": [], "cpu": []}
        order = list(range(len(rows)))
        shuffle = random.Random(count)
        for _ in range(rounds):
            shuffle.shuffle(order)
            for index in order:
                seconds, sent, cpu = self._round(self.contenders[index], repeats[index])
                rows[index]["seconds"].append(seconds)
                rows[index]["sent"].append(sent)
                rows[index]["cpu"].append(cpu)
        for row in rows:
            row["seconds"] = self.runtime.allreduce_scalar(row["seconds"], "max")
        return rows

    def _round(self, contender: Contender, calls: int) -> tuple[float, float, float]:
        """Seconds and share of a core a call on this rank, and bytes that its node sent."""
        before = benchmark.wire_bytes()
        self.barrier()
        start, busy = time.perf_counter(), time.process_time()
        for _ in range(calls):
            contender.run()
        seconds = (time.perf_counter() - start) / calls
        cpu = (time.process_time() - busy) / calls / seconds
        self.barrier()
        return seconds, (benchmark.wire_bytes() - before) / calls, cpu

    def _data(self, count: int) -> tuple[Any, Any]:
        """This rank's elements, and the sum over ranks made in float64."""
        import numpy as np

        own = np.random.default_rng((count, self.runtime.rank)).standard_normal(count, "float32")
        own = own.astype(self.dtype.storage, copy=False)
        expected = own.astype("float64")
        for start in range(0, count, MIB):
            part = expected[start : start + MIB]
            self.runtime.wait(self.runtime.comm.Iallreduce(self.mpi.IN_PLACE, part))
        return own, expected


def sizes(options: argparse.Namespace, itemsize: int) -> list[int]:
    """Sizes in elements, rising. Raises BenchmarkError."""
    if options.sizes:
        wanted = [benchmark.parse_size(text) for text in options.sizes.split(",")]
    else:
        if options.begin > options.end:
            raise BenchmarkError("-b is larger than -e")
        factor = options.factor or max(1.01, (options.end / options.begin) ** 0.5)
        if factor <= 1:
            raise BenchmarkError("-f must be above 1")
        wanted, size = [], float(options.begin)
        while size < options.end * 1.0001:
            wanted.append(round(size))
            size *= factor
    return sorted({max(1, size // itemsize) for size in wanted})


def bound_seconds(nbytes: int, nodes: int, link_bits: float) -> float:
    """Each node's link carries its share of the buffer both ways at once; 0 if unshaped."""
    return 2 * (nodes - 1) / nodes * nbytes * 8 / link_bits if link_bits else 0.0


def summarise(row: dict[str, Any], count: int, bench: Bench, link_bits: float) -> dict[str, Any]:
    """The figures of one line of the table."""
    runtime, nbytes = bench.runtime, count * bench.dtype.itemsize
    seconds = median(row["seconds"])
    bound = bound_seconds(nbytes, runtime.topology.node_count, link_bits)
    return row | {
        "size": nbytes,
        "count": count,
        "type": bench.dtype.name,
        "time_us": seconds * 1e6,
        "algbw_gb_s": nbytes / seconds / 1e9,
        "busbw_gb_s": nbytes / seconds / 1e9 * 2 * (runtime.size - 1) / runtime.size,
        "times_bound": seconds / bound if bound else None,
        "sent_bytes": median(row["sent"]),
        "cpu_share": median(row["cpu"]),
        # Rounding of p terms one after the other, against the largest sum.
        "right": row["error"] <= 2 * runtime.size * EPSILON[bench.dtype.name],
    }


EPSILON = {"float32": 2.0**-23, "float64": 2.0**-52}


def compare(rows: list[dict[str, Any]]) -> None:
    """Add how many times as fast as MPI and Gloo each row is: the median over rounds."""
    for rival in ("mpi", "gloo"):
        theirs: list[float] = next((row["seconds"] for row in rows if row["name"] == rival), [])
        for row in rows:
            pairs = zip(theirs, row["seconds"], strict=False)
            row[f"x_{rival}"] = median(other / own for other, own in pairs) if theirs else None


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text."""

    def ratio(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    return [
        row["name"],
        str(row["size"]),
        str(row["count"]),
        row["type"],
        f"{row['time_us']:.1f}",
        f"{row['algbw_gb_s']:.2f}",
        f"{row['busbw_gb_s']:.2f}",
        f"{row['error']:.0e}" + ("" if row["right"] else " WRONG"),
        ratio(row["x_mpi"]),
        ratio(row["x_gloo"]),
        ratio(row["times_bound"]),
        f"{row['sent_bytes'] / MIB:.2f}" if row["several_nodes"] else "",
        f"{row['cpu_share'] * 100:.0f}",
    ]


HEADS = [
    "contender",
    "size(B)",
    "count",
    "type",
    "time(us)",
    "algbw(GB/s)",
    "busbw(GB/s)",
    "error",
    "x_mpi",
    "x_gloo",
    "x_bound",
    "sent(MiB)",
    "cpu(%)",
]


def used_columns(rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows without the columns that say nothing in this run."""
    kept = [i for i in range(len(HEADS)) if any(row[i] for row in rows)]
    return [HEADS[i] for i in kept], [[row[i] or "-" for i in kept] for row in rows]


# -- the whole ---------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> int:
    """What each rank does; the status is 1 if a sum was wrong."""
    from hpcsync import config, launch
    from hpcsync.collectives import Collectives
    from hpcsync.device import dtype_of

    settings = config.load(None, options.set)
    dtype = dtype_of(options.dtype)
    counts = sizes(options, dtype.itemsize)
    with launch.start(settings.topology, settings.comm.timeout_s) as runtime:
        names = chosen(options, runtime.size, runtime.topology.node_count)
        collectives = Collectives(runtime, settings.comm)
        made = [make(name, runtime, collectives, dtype, counts[-1]) for name in names]
        bench = Bench(runtime, made, dtype)
        place = options.place or runtime.topology.describe()
        head = {"command": benchmark.command_line(options, runtime.size)}
        head |= benchmark.facts(place) if runtime.rank == 0 else {}
        if runtime.rank == 0:
            print(*(f"# {key}: {value}" for key, value in head.items()), sep="\n", flush=True)
        rows = []
        for count in counts:
            found = bench.size(count, options.rounds, options.calls)
            found = [summarise(row, count, bench, options.link_bits) for row in found]
            compare(found)
            for row in found:
                row["several_nodes"] = runtime.topology.node_count > 1
            rows += found
            if runtime.rank == 0:
                show(found)
        if runtime.rank == 0:
            keep(options, head, rows)
        if "gloo" in names:
            runtime.barrier()
            import torch.distributed as dist

            dist.destroy_process_group()
    return 0 if all(row["right"] for row in rows) else 1


def make(name: str, runtime: Any, collectives: Any, dtype: Any, most: int) -> Contender:
    """A contender by name; collective."""
    if name == "mpi":
        return Mpi(runtime.comm, dtype, most)
    if name == "gloo":
        return Gloo(runtime, dtype, most)
    return Hpcsync(collectives, name, dtype, most)


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table of one size."""
    print("", *benchmark.table(*used_columns([cells(row) for row in rows])), sep="\n", flush=True)


def keep(options: argparse.Namespace, head: dict[str, str], rows: list[dict[str, Any]]) -> None:
    """Write what --json and --report ask for."""
    if options.json:
        options.json.write_text(benchmark.as_json(head | {"rows": rows}))
    if options.report:
        body = benchmark.markdown(*used_columns([cells(row) for row in rows]))
        note = f"Medians of {options.rounds} interleaved rounds; x: times as fast as that contender"
        note += "; x_bound: time over that of a hierarchical sum limited by the link alone."
        path = benchmark.write_report(options.report, "Allreduce", head, [note, "", *body])
        print(f"\n# report: {os.path.relpath(path)}")


if __name__ == "__main__":
    benchmark.main("bench_allreduce", arguments().parse_args(), measure)
