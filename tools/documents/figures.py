"""Tables of pages in docs/, from the newest report of each measurement in tools/reports/."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPORTS = Path(__file__).resolve().parents[1] / "reports"

Row = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Measured:
    """A report: its file, and its tables in order, each under the heading above it."""

    path: Path
    tables: Sequence[tuple[str, Sequence[Row]]]

    @property
    def link(self) -> str:
        return f"[{self.path.stem}](../tools/reports/{self.path.name})"


def newest(name: str, folder: Path = REPORTS) -> Measured:
    """The newest report of a name, which begins with a date and the hardware.

    Raises:
        FileNotFoundError: there is none.
    """
    fits = re.compile(rf"\d{{4}}-\d\d-\d\d-.*-core-{re.escape(name)}\.md")
    found = sorted(path for path in folder.glob("*.md") if fits.fullmatch(path.name))
    if not found:
        raise FileNotFoundError(f"{folder}: no report {name}")
    return Measured(found[-1], list(_tables(found[-1].read_text(encoding="utf-8"))))


def _tables(text: str) -> Iterator[tuple[str, Sequence[Row]]]:
    heading, head, rows = "", list[str](), list[Row]()
    for line in [*text.splitlines(), ""]:
        if not line.startswith("|"):
            if head:
                yield heading, rows
            head, rows = [], []
            heading = line.lstrip("# ") if line.startswith("#") else heading
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not head:
            # Of heads that stand twice the first counts.
            head = [f"{cell}{at}" if cell in cells[:at] else cell for at, cell in enumerate(cells)]
        elif not set(line) <= set("|:- "):
            rows.append(dict(zip(head, cells, strict=True)))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *reports: Measured) -> str:
    """A table, texts to the left and the rest to the right, and the reports that it is from."""
    lines = [
        f"| {' | '.join(head)} |",
        f"|---|{'--:|' * (len(head) - 1)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    sources = "Report: " if len(reports) == 1 else "Reports: "
    return "\n".join([*lines, "", sources + ", ".join(each.link for each in reports) + "."]) + "\n"


def coding() -> str:
    """Bytes sent, error of one rounding, and speed of the kernels."""
    found = newest("codecs")
    speeds, sizes = found.tables[0][1], found.tables[1][1]
    rates = {
        (row["codec"], row["operation"]): row["in(GB/s)"] for row in speeds if row["MiB"] == "64"
    }
    rows = []
    for row in sizes:
        name = row["codec"]
        if name == "none":
            continue
        exchanged = rates.get((name, "exchange"))
        rows.append(
            [
                f"`{name}`",
                row["coded/raw"],
                f"{float(row['error normal']):.2g}",
                rates.get((name, "encode"), "-"),
                rates.get((name, "decode_add"), "-"),
                exchanged or "-",
            ]
        )
    head = (
        "codec",
        "bytes of FP32's",
        "error of one coding",
        "encode, GB/s",
        "decode and add, GB/s",
        "both, GB/s",
    )
    return table(head, rows, found)


def loss() -> str:
    """Held-out loss against no codec."""
    found = newest("learning")
    rows = []
    for row in found.tables[0][1]:
        name, *settings = row["codec"].split("/")
        told = " ".join(f"`{setting}`" for setting in settings)
        rows.append([f"`{name}` {told}".strip(), row["sent(%)"], row["mean(%)"], row["worst(%)"]])
    head = ("codec, and keys beside it", "sent, %", "held-out loss, mean %", "worst seed %")
    return table(head, rows, found)


def steps() -> str:
    """A step with int8, without a codec and under torch DDP, by link."""
    rows, reports = [], []
    for name, layout in (("train-codecs-2x1", "2 x 1"), ("train-codecs-2x2", "2 x 2")):
        found = newest(name)
        reports.append(found)
        for heading, entries in found.tables:
            by = {row["contender"]: row["step(ms)"] for row in entries}
            link = _link(heading.removeprefix("Links of "))
            cells = [by[each] for each in ("none", "hpcsync", "hpcsync-int8", "ddp")]
            rows.append([layout, link, *cells])
    head = (
        "nodes x ranks",
        "link",
        "no communication, ms",
        "no codec, ms",
        "`int8`, ms",
        "torch DDP, ms",
    )
    return table(head, rows, *reports)


def sums() -> str:
    """One sum of 25 MiB beside MPI's own and Gloo's."""
    rows, reports = [], []
    for name, place, ours in (
        ("allreduce-1x2", "one node, 2 ranks", "hpcsync direct"),
        ("allreduce-1x4", "one node, 4 ranks", "hpcsync direct"),
        ("allreduce-2x2-1gbit", "2 nodes of 2 ranks, 1 Gbit/s", "hpcsync hierarchical"),
    ):
        found = newest(name)
        reports.append(found)
        by = {
            row["contender"]: float(row["time(us)"]) / 1e3
            for row in found.tables[0][1]
            if row["size(B)"] == str(25 << 20)
        }
        rows.append([place, *(f"{by[each]:.1f}" for each in (ours, "mpi", "gloo"))])
    return table(("25 MiB", "hpcsync, ms", "MPI's own, ms", "Gloo, ms"), rows, *reports)


def waiting() -> str:
    """How busy a rank's core is during a sum over a slow link."""
    found = newest("waiting-2x2-100mbit")
    rows = [[row["contender"], row["cpu(%)"]] for row in found.tables[0][1]]
    return table(("25 MiB, 2 nodes of 2 ranks, 100 Mbit/s", "a core is busy, %"), rows, found)


def tracing() -> str:
    """A step with and without a trace."""
    rows, reports = [], []
    for name, link in (("tracing-2x1-1gbit", "1gbit"), ("tracing-2x1-200mbit", "200mbit")):
        found = newest(name)
        reports.append(found)
        by = {row["contender"]: row for row in found.tables[0][1]}
        rows.append(
            [
                _link(link),
                by["silent"]["step(ms)"],
                by["traced"]["step(ms)"],
                by["traced"]["x_step"],
                by["traced"]["95%"],
            ]
        )
    head = ("link", "silent, ms", "traced, ms", "ratio", "of it 95%")
    return table(head, rows, *reports)


def whatif() -> str:
    """Predicted steps beside those that were run."""
    found = newest("whatif")
    keys = ("case", "predicted(ms)", "run(ms)", "off", "farthest")
    rows = [[row[key] for key in keys] for row in found.tables[0][1]]
    head = ("from a trace at 1 Gbit/s to", "predicted, ms", "run, ms", "off", "farthest of 3")
    return table(head, rows, found)


def newcomer() -> str:
    """How long the first command takes to the first step of training."""
    found = newest("newcomer")
    rows = [[row["start"], row["first step(s)"]] for row in found.tables[0][1]]
    return table(("README's first command", "first step, s"), rows, found)


def reading() -> str:
    """How long reading a large trace takes."""
    found = newest("tracing-512-ranks")
    keys = ("command", "wall(s)", "memory(MiB)")
    rows = [[row[key] for key in keys] for row in found.tables[0][1]]
    return table(("512 ranks, 100 steps", "s", "MiB of memory"), rows, found)


def auto() -> str:
    """What compress.codec=auto chose for the default GPT, by link."""
    found = newest("auto")
    rows = [
        [
            row["layout"].replace("x", " x "),
            _link(row["link"]),
            row["none(ms)"],
            row["bf16(ms)"],
            row["auto(ms)"],
            f"`{row['chose'].partition(',')[0]}`",
        ]
        for row in found.tables[0][1]
        if row["model"] == "gpt-2M"
    ]
    head = ("nodes x ranks", "link", "`none`, ms", "`bf16`, ms", "`auto`, ms", "it chose")
    return table(head, rows, found)


def bounds() -> str:
    """How often compress.codec=auto came near the best choice, over all setups."""
    found = newest("auto")
    lines = found.path.read_text(encoding="utf-8").splitlines()
    told = [line for line in lines if line.startswith("- at most")]
    return "\n".join([*told, "", f"Report: {found.link}."]) + "\n"


def _link(text: str) -> str:
    """``1gbit`` as ``1 Gbit/s``."""
    found = re.fullmatch(r"(\d+)([gm])bit", text)
    return f"{found[1]} {found[2].upper()}bit/s" if found else "not shaped"


TABLES: dict[str, Callable[[], str]] = {
    "auto": auto,
    "bounds": bounds,
    "coding": coding,
    "loss": loss,
    "steps": steps,
    "newcomer": newcomer,
    "reading": reading,
    "sums": sums,
    "tracing": tracing,
    "waiting": waiting,
    "whatif": whatif,
}
