"""What preflight tells: tables for people, one object for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from .. import __version__
from ..topology import Topology
from ..wording import ranges
from .compute import Rates
from .judge import NodeFound, Slow
from .survey import Level
from .wire import Fault

_MOST_ROWS = 24
_WORDS = {
    "product": "matrix product",
    "memory": "memory bandwidth",
    "inside": "bandwidth in the node",
    "link": "link",
    "latency": "latency of its link",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """All that was found.

    Attributes:
        levels: node and rail.
        slow_pairs: nodes and their share of the median.
        wrong: nodes that compute or transfer wrong.
        rates: of each rank.
        saved: where costs were written, or why not; not in the text.
    """

    topology: Topology
    nodes: Sequence[NodeFound]
    device: str
    mpi: str
    seconds: float
    levels: dict[str, Level]
    slow: Sequence[Slow]
    slow_pairs: Sequence[tuple[int, int, float]]
    wrong: Sequence[int]
    rates: Sequence[Rates]
    saved: str = ""

    @property
    def wrong_products(self) -> int:
        """Of all ranks."""
        return sum(each.wrong for each in self.rates)

    @property
    def named(self) -> list[str]:
        """Nodes that a job had better not use, in their order."""
        nodes = sorted({slow.node for slow in self.slow} | set(self.wrong))
        return list(dict.fromkeys(self.nodes[node].name for node in nodes))

    @property
    def exclude(self) -> str:
        """As sbatch takes it; empty if there is nothing to exclude."""
        return f"--exclude={','.join(self.named)}" if self.named else ""


def as_json(found: Result) -> str:
    """One object: ranks, nodes, levels, slow, wrong and exclude."""
    whole: dict[str, Any] = {
        "ranks": [
            {"rank": rank, "node": found.nodes[found.topology.node_of(rank)].name, **asdict(each)}
            for rank, each in enumerate(found.rates)
        ],
        "mpi": found.mpi,
        "device": found.device,
        "seconds": found.seconds,
        "nodes": [asdict(node) for node in found.nodes],
        "levels": {name: _level(level) for name, level in found.levels.items() if level.tried},
        "slow": [asdict(slow) | {"name": found.nodes[slow.node].name} for slow in found.slow],
        "slow_pairs": [
            {"nodes": [found.nodes[low].name, found.nodes[high].name], "share": share}
            for low, high, share in found.slow_pairs
        ],
        "wrong": [found.nodes[node].name for node in found.wrong],
        "wrong_products": found.wrong_products,
        "exclude": found.named,
        "saved": found.saved,
    }
    return json.dumps(whole, indent=1)


def _level(level: Level) -> dict[str, Any]:
    together = level.together
    return {
        "pairs": [asdict(pair) for pair in level.pairs],
        "rate": median(pair.rate for pair in level.pairs) if level.pairs else None,
        "latency_s": median(pair.latency_s for pair in level.pairs) if level.pairs else None,
        "all_ranks": asdict(together) if together else None,
        "transfers": level.transfers,
        "faults": [asdict(fault) for fault in level.faults],
        "left_out": level.left_out,
    }


def as_text(found: Result) -> str:
    """Tables, then a line for each thing that is wrong, then what to do."""
    lines = [
        f"hpcsync {__version__} preflight: {found.topology.describe()}, {found.mpi}, "
        f"{found.device}, {found.seconds:.1f} s",
        "",
        *_node_table(found),
    ]
    if table := _level_table(found.levels):
        lines += ["", *table]
    lines += ["", *_complaints(found)]
    if found.exclude:
        lines.append(found.exclude)
    return "\n".join(lines)


def _node_table(found: Result) -> list[str]:
    heads = ["node", "ranks", "product", "memory", "in node", "link", "latency"]
    named = {slow.node for slow in found.slow} | set(found.wrong)
    # Those that are named first, so that they are seen among hundreds.
    order = sorted(range(len(found.nodes)), key=lambda at: at not in named)
    if len(found.nodes) <= _MOST_ROWS:
        order = list(range(len(found.nodes)))
    rows = [_row(found.nodes[at]) for at in order[:_MOST_ROWS]]
    if len(found.nodes) > 1:
        rows.append(["median", "", *_medians(found.nodes)])
    table = _aligned([heads, *rows])
    if (more := len(order) - _MOST_ROWS) > 0:
        table.insert(-1, f"  ... and {more} more (--json tells all)")
    return table


def _row(node: NodeFound) -> list[str]:
    return [
        node.name,
        ranges(node.ranks),
        operations(node.product),
        rate(node.memory),
        rate(node.inside),
        rate(node.link),
        latency(node.latency_s),
    ]


def _medians(nodes: Sequence[NodeFound]) -> list[str]:
    shows = {
        "product": operations,
        "memory": rate,
        "inside": rate,
        "link": rate,
        "latency_s": latency,
    }
    cells = []
    for name, show in shows.items():
        known = [value for node in nodes if (value := getattr(node, name)) is not None]
        cells.append(show(median(known) if known else None))
    return cells


def _level_table(levels: dict[str, Level]) -> list[str]:
    heads = ["level", "one pair", "", "all ranks, each", "alpha", "beta", "transfers"]
    rows = []
    for key, name in (("node", "in a node"), ("rail", "between nodes")):
        level = levels[key]
        if not level.pairs:
            continue
        together = level.together
        rows.append(
            [
                name,
                rate(median(pair.rate for pair in level.pairs)),
                latency(median(pair.latency_s for pair in level.pairs)),
                rate(1 / together.wire_s if together and together.wire_s else None),
                latency(together.latency_s if together else None),
                f"{together.wire_s * 1e9:.3g} ns/B" if together else "-",
                f"{level.transfers}, {len(level.faults) or 'none'} wrong",
            ]
        )
    return _aligned([heads, *rows]) if rows else []


def _complaints(found: Result) -> list[str]:
    names = [node.name for node in found.nodes]
    lines = []
    for slow in found.slow:
        whose = "" if slow.rank is None else f" of rank {slow.rank}"
        show = operations if slow.what == "product" else rate
        told = latency(slow.value) if slow.what == "latency" else show(slow.value)
        share = (
            f"{slow.share:.1f} times the median"
            if slow.what == "latency"
            else f"{slow.share:.0%} of the median"
        )
        lines.append(f"slow: {names[slow.node]}: {_WORDS[slow.what]}{whose} {told}, {share}")
    lines += [
        f"slow: between {names[low]} and {names[high]}: {share:.0%} of the median, though each of "
        "them is fast with others"
        for low, high, share in found.slow_pairs
    ]
    for level in found.levels.values():
        lines += [
            f"wrong: rank {fault.sender} ({names[found.topology.node_of(fault.sender)]}) to rank "
            f"{fault.receiver} ({names[found.topology.node_of(fault.receiver)]}): {_fault(fault)}"
            for fault in level.faults[:_MOST_ROWS]
        ]
        if level.left_out:
            lines.append(
                f"left out: {level.left_out} turns of pairs, for want of time (--seconds gives "
                "more)"
            )
    if found.wrong_products:
        nodes = {found.topology.node_of(at) for at, each in enumerate(found.rates) if each.wrong}
        who = ", ".join(names[node] for node in sorted(nodes))
        lines.append(f"wrong: {found.wrong_products} matrix products were not the same ({who})")
    if not found.named:
        lines.insert(0, "no node is named: none is slow, and nothing was wrong")
    if found.topology.node_count == 2:
        lines.append("of two nodes a slow link cannot be told by its node: three are needed")
    return lines


def _fault(fault: Fault) -> str:
    if fault.stalled_s:
        why = ", and the sender stood still" if fault.late else ""
        return f"nothing came for {fault.stalled_s:.0f} s{why}"
    return f"{fault.words} words of {fault.nbytes} bytes differ, the first at byte {fault.first}"


def operations(value: float | None) -> str:
    """Operations a second, with a unit."""
    return _scaled(value, "FLOP/s")


def rate(value: float | None) -> str:
    """Bytes a second, with a unit."""
    return _scaled(value, "B/s")


def latency(value: float | None) -> str:
    """Seconds as microseconds."""
    return "-" if value is None else f"{value * 1e6:.3g} us"


def _scaled(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value / 1e3:.3g} k{unit}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
