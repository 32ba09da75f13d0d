"""Does `python -m hpcsync.preflight` name the node that was slowed, and no other?

    python tools/bench_preflight.py
    python tools/bench_preflight.py --runs 5 --cases clean,link --nodes 4

Each run starts the command anew on a virtual cluster, with one rank on each node, and one node,
another one from run to run, slowed in one way:

    clean     in none
    link      its link has half of the others' rate
    compute   it has 0.4 of a core (control groups)
    memory    every copy in memory is done twice (in the rank's program: one machine's memory cannot
              be slow for some)

A run is right if it names that node and no other; a clean one if it names none. Bandwidths of the
clean runs are compared with what the links' shape lets pass: tbf counts Ethernet frames, which
carry 1448 bytes of payload in 1514 where TCP sends full ones. Root; see tools/vcluster.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import benchmark, quota  # noqa: E402
from tools.benchmark import BenchmarkError, median, parse_rate  # noqa: E402
from tools.namespaces import ClusterError  # noqa: E402
from tools.virtual_cluster import VirtualCluster  # noqa: E402

CASES = ("clean", "link", "compute", "memory")
PAYLOAD = 1448 / 1514  # of an Ethernet frame that TCP fills, with time stamps
LINK, CORES = 0.5, 0.4  # what is left to the slowed node
TIMEOUT_S = 300
_STATUSES = (0, 4)

# The command, with copies done twice on one host.
TWICE = """
import socket, sys
from hpcsync.preflight import compute
from hpcsync.preflight.__main__ import main
once = compute.Bench._copy
if socket.gethostname() == sys.argv[1]:
    compute.Bench._copy = lambda bench: (once(bench), once(bench))[0]
main(sys.argv[2:])
"""


class Run(NamedTuple):
    """One run: the node that was slowed (none if empty), those named, and what was printed."""

    slowed: str
    named: tuple[str, ...]
    found: dict[str, Any]

    @property
    def right(self) -> bool:
        return self.named == ((self.slowed,) if self.slowed else ())


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cases", default=",".join(CASES), help="of these (%(default)s)")
    add("--runs", type=int, default=20, help="of each case (%(default)s)")
    add("--nodes", type=int, default=3)
    add("--rate", default="1gbit", help="of the links (%(default)s)")
    add("--json", type=Path, help="write all that was found there; added to, if it is there")
    add("--report", default="", metavar="NAME", help="write tools/reports/DATE-HARDWARE-NAME.md")
    return parser


def run(cluster: VirtualCluster, case: str, host: str) -> Run:
    """Start the command with ``host`` slowed.

    Raises:
        BenchmarkError: it failed.
    """
    start = [sys.executable, "-m", "hpcsync.preflight"]
    slowing: AbstractContextManager[object] = nullcontext()
    rate = cluster.state.rate
    if case == "link":
        cluster.set_rate(f"{parse_rate(rate) * LINK:.0f}bit", host)
    elif case == "compute":
        slowing = quota.Quota(cluster, host, CORES)
    elif case == "memory":
        start = [sys.executable, "-c", TWICE, host]
    try:
        with slowing:
            done = cluster.run_mpi(
                [*start, "--json", "--save", ""],
                env={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                timeout=TIMEOUT_S,
            )
    finally:
        cluster.set_rate(rate, host)
    if done.returncode not in _STATUSES:
        raise BenchmarkError(f"{case}: the command failed: {done.stderr.strip()[-300:]}")
    found = json.loads(done.stdout)
    return Run("" if case == "clean" else host, tuple(found["exclude"]), found)


def measure(options: argparse.Namespace) -> dict[str, list[Run]]:
    """All runs, by case."""
    names = [name.strip() for name in options.cases.split(",")]
    for name in names:
        if name not in CASES:
            raise BenchmarkError(f"--cases: no case {name!r}; there are {', '.join(CASES)}")
    found: dict[str, list[Run]] = {name: [] for name in names}
    try:
        with VirtualCluster(options.nodes, options.rate) as cluster:
            for at in range(options.runs):
                for name in names:
                    each = run(cluster, name, cluster.hosts[at % len(cluster.hosts)])
                    found[name].append(each)
                    if options.json:
                        _add(options.json, name, each)
                    told = ", ".join(each.named) or "none"
                    print(
                        f"# run {at + 1} {name}: slowed {each.slowed or 'none'}, named {told}"
                        f"{'' if each.right else '  WRONG'}, {each.found['seconds']:.1f} s",
                        flush=True,
                    )
    except (ClusterError, subprocess.TimeoutExpired) as error:
        raise BenchmarkError(str(error)) from None
    return found


HEADS = ["case", "right", "of", "share of the median", "seconds"]
WIDTHS = ["bandwidth", "median", "least", "most"]


def rows_of(found: dict[str, list[Run]]) -> list[list[str]]:
    """How often each case was right, and by how much the named node differed."""
    rows = []
    for name, runs in found.items():
        shares = [
            slow["share"]
            for each in runs
            for slow in each.found["slow"]
            if slow["name"] == each.slowed and slow["what"] == _WHAT.get(name)
        ]
        told = f"{min(shares):.2f} to {max(shares):.2f}" if shares else "-"
        right = sum(each.right for each in runs)
        seconds = median(each.found["seconds"] for each in runs)
        rows.append([name, str(right), str(len(runs)), told, f"{seconds:.1f}"])
    return rows


_WHAT = {"link": "link", "compute": "product", "memory": "memory"}


def bandwidths(runs: Sequence[Run], rate: str) -> list[list[str]]:
    """What was measured over what the shape lets pass."""
    most = parse_rate(rate) / 8 * PAYLOAD
    if not runs or not most:
        return []
    found = [each.found["levels"]["rail"]["rate"] for each in runs]
    pairs = [value / most for value in found if value is not None]  # None: nothing came
    together = [
        1 / each.found["levels"]["rail"]["all_ranks"]["wire_s"] / most
        for each in runs
        if each.found["levels"]["rail"]["all_ranks"]
    ]
    return [
        [name, f"{median(values):.3f}", f"{min(values):.3f}", f"{max(values):.3f}"]
        for name, values in (("one pair at a time", pairs), ("all ranks at once", together))
        if values
    ]


def main() -> int:
    """The command."""
    options = arguments().parse_args()
    place = f"{options.nodes} nodes x 1 rank, {options.rate} links (tbf)"
    try:
        alone = argparse.Namespace(**vars(options), ranks=0, vcluster="")
        head: dict[str, Any] = {"command": benchmark.command_line(alone, 1)}
        head |= benchmark.facts(place, mpi=False)
        print(*(f"# {key}: {value}" for key, value in head.items()), sep="\n", flush=True)
        found = measure(options)
    except BenchmarkError as error:
        print(f"bench_preflight: {error}", file=sys.stderr)
        return 2
    if options.json:
        found = _all(options.json)
    rows, widths = rows_of(found), bandwidths(found.get("clean", []), options.rate)
    print("", *benchmark.table(HEADS, rows), "", *benchmark.table(WIDTHS, widths), sep="\n")
    if options.report:
        body = [
            "Each run is the command started anew; right: it named the slowed node and no other. "
            "Runs of several calls with one --json are counted together.",
            "",
            *benchmark.markdown(HEADS, rows),
            "",
            "Bandwidth of the clean runs over what the links' shape lets pass: of 1514 bytes of a "
            f"frame, 1448 are payload, so {options.rate} is "
            f"{parse_rate(options.rate) / 8e6 * PAYLOAD:.1f} MB/s each way.",
            "",
            *benchmark.markdown(WIDTHS, widths),
        ]
        path = benchmark.write_report(options.report, "Preflight", head, body)
        print(f"\n# report: {path.relative_to(ROOT)}")
    return 0


def _all(path: Path) -> dict[str, list[Run]]:
    """The runs that a file holds, by case."""
    before = json.loads(path.read_text()) if path.exists() else {}
    return {
        name: [Run(slowed, tuple(named), told) for slowed, named, told in before[name]]
        for name in CASES
        if name in before
    }


def _add(path: Path, name: str, each: Run) -> None:
    """Keep a run at once: a benchmark of many minutes may be interrupted and taken up."""
    whole = _all(path)
    whole.setdefault(name, []).append(each)
    path.write_text(benchmark.as_json(whole))


if __name__ == "__main__":
    sys.exit(main())
