"""All that the summary of a run tells, from its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..file import Trace
from .account import PARTS, STAGES
from .clocks import Arrival, arrival, contradictions, odd
from .exchange import Collective, Exchange, collectives, exchange, waiting_share
from .findings import Finding
from .held import held_back
from .links import slow_links
from .overlap import hiding
from .straggler import Scores, imbalance, own_work, scores, stragglers
from .tables import Chooser, Tables, collect
from .verdict import Verdict, data_bound, judge


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the step: means over ranks and steps, and its range over ranks."""

    name: str
    ms: float
    share: float
    least_ms: float
    most_ms: float
    imbalance: float


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of the exchange. Stages run side by side, so shares may sum to more than 1.

    Attributes:
        share: of the time of communication in which it was busy.
        nbytes: that a rank sent to other nodes in a step; 0 for coding.
    """

    name: str
    ms: float
    share: float
    nbytes: float


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of a rank in bytes; ``growth`` from its first to its last step."""

    rank: int
    resident: int
    peak: int
    growth: int


@dataclass(frozen=True, slots=True)
class Summary:
    """What the trace of a run tells.

    Attributes:
        overlap: communication hidden behind compute over all communication; NaN without any.
        comm_ms: time of a step in which a bucket was being exchanged.
        alone_ms: time that the exchange of a step would take by itself.
        waiting: share of the exposed communication that was waiting for late ranks.
        balance: imbalance of the ranks' own work.
    """

    tables: Tables
    parts: list[Part]
    step_ms: float
    comm_ms: float
    alone_ms: float
    overlap: float
    waiting: float
    balance: float
    stages: list[Stage]
    collectives: list[Collective]
    slowest: list[Scores]
    memory: list[Memory]
    arrival: Arrival
    findings: list[Finding]
    verdict: Verdict


def summarise(trace: Trace, ranks: Sequence[int], choose: Chooser | None = None) -> Summary:
    """The summary of these ranks; ``choose`` as of ``tables.collect``.

    Raises:
        UserError: nothing of them can be looked at.
    """
    tables = collect(trace, ranks, choose)
    found = exchange(tables)
    findings = diagnose(trace, tables, found)
    hidden = hiding(tables, found, trace.facts.links)
    return Summary(
        tables=tables,
        parts=_parts(tables),
        step_ms=tables.mean("whole") / 1e6,
        comm_ms=tables.mean("comm") / 1e6,
        alone_ms=hidden.alone / 1e6,
        overlap=hidden.overlap,
        waiting=waiting_share(tables, found),
        balance=imbalance(own_work(tables)),
        stages=_stages(tables),
        collectives=collectives(tables, found),
        slowest=scores(tables),
        memory=[each for rank in tables.ranks if (each := _memory(trace, rank)) is not None],
        arrival=arrival(tables, _wrong(findings)),
        findings=findings,
        verdict=judge(tables, hidden, findings, trace.facts),
    )


def diagnose(trace: Trace, tables: Tables, found: Exchange) -> list[Finding]:
    """All that is wrong, what costs most first."""
    held = held_back(tables, found)
    spared = [(each.ranks[0], "backward") for each in held]
    findings = [*stragglers(tables, spared), *held, *data_bound(tables)]
    findings += slow_links(tables, trace.facts.links)
    wrong = contradictions(tables)
    hosts = [str(trace.attributes(rank).get("host", "")) for rank in tables.ranks]
    off = [each for each in odd(tables, hosts) if not set(each.ranks) & set(_wrong(wrong))]
    findings.sort(key=lambda each: -each.lost_ms)
    return [*findings, *wrong, *off]


def _wrong(findings: Sequence[Finding]) -> list[int]:
    """Ranks whose clocks say what cannot be."""
    return [
        rank
        for each in findings
        if each.kind == "clock" and each.lane == "wrong"
        for rank in each.ranks
    ]


def _parts(tables: Tables) -> list[Part]:
    whole = tables.mean("whole")
    listed = []
    for name in (*PARTS, "forward", "backward", "checkpoint"):
        values = tables.columns[name]
        by_rank = values.mean(axis=1)
        listed.append(
            Part(
                name=name,
                ms=float(values.mean()) / 1e6,
                share=float(values.mean()) / max(whole, 1.0),
                least_ms=float(by_rank.min()) / 1e6,
                most_ms=float(by_rank.max()) / 1e6,
                imbalance=imbalance(values),
            )
        )
    return listed


def _stages(tables: Tables) -> list[Stage]:
    comm = tables.mean("comm")
    listed = []
    for name in STAGES:
        busy = tables.mean(name)
        if busy > 0:
            nbytes = tables.columns.get(f"bytes.{name}")
            sent = float(nbytes.mean()) if nbytes is not None else 0.0
            listed.append(Stage(name, busy / 1e6, busy / max(comm, 1.0), sent))
    return listed


def _memory(trace: Trace, rank: int) -> Memory | None:
    rows = trace.memory(rank)
    if not rows.shape[0]:
        return None
    rows = rows[np.argsort(rows["step"], kind="stable")]
    resident = rows["resident"]
    return Memory(
        rank, int(resident[-1]), int(rows["peak"].max()), int(resident[-1]) - int(resident[0])
    )
