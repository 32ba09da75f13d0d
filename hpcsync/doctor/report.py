"""All ranks' findings as one report: for people, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .. import __version__
from ..wording import ranges
from .base import Finding, Status
from .oldest import FORMAT as FORMAT

_WORDS = {Status.PASS: "passed", Status.WARN: "warned", Status.FAIL: "failed"}
_HOSTS_NAMED = 4


@dataclass(kw_only=True)
class Entry:
    """A finding, and the ranks and hosts that have it."""

    finding: Finding
    ranks: list[int] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found.

    Attributes:
        where: this place, in words.
        entries: in the order of the checks.
        ranks: how many the job has.
        heard: how many of them are in the report.
    """

    where: str
    entries: Sequence[Entry]
    ranks: int
    heard: int

    @property
    def worst(self) -> Status:
        return max((entry.finding.status for entry in self.entries), default=Status.PASS)

    @property
    def exit_status(self) -> int:
        """1 if anything failed, else 0."""
        return int(self.worst == Status.FAIL)


def merge(findings: Iterable[tuple[int, str, Finding]], order: Sequence[str]) -> list[Entry]:
    """One entry a fault, with all ranks that have it; what passed, once a check if nothing did not.

    Args:
        findings: rank, host and what was found there.
        order: names of the checks.
    """
    entries: dict[tuple[str, str], Entry] = {}
    for rank, host, finding in findings:
        # Sizes and times differ from host to host: the same fault is told once all the same.
        key = (finding.code, finding.fix)
        entry = entries.setdefault(key, Entry(finding=finding))
        if rank not in entry.ranks:
            entry.ranks.append(rank)
        if host not in entry.hosts:
            entry.hosts.append(host)
    faulty = {e.finding.check for e in entries.values() if e.finding.status != Status.PASS}
    kept = [
        entry
        for entry in entries.values()
        if entry.finding.status != Status.PASS or entry.finding.check not in faulty
    ]
    place = {name: index for index, name in enumerate(order)}
    return sorted(kept, key=lambda entry: place.get(entry.finding.check, len(place)))


def render(report: Report) -> str:
    """For people: a line a finding, and the command below what is not right."""
    width = max((len(entry.finding.check) for entry in report.entries), default=0)
    lines = [f"hpcsync doctor {__version__}: {report.where}"]
    for entry in report.entries:
        finding = entry.finding
        text = finding.why + _where(report, entry)
        lines.append(f"  {finding.status.name}  {finding.check:<{width}}  {text}")
        if finding.fix:
            lines.append(f"  {'':4}  {'':<{width}}  fix: {finding.fix}")
    counts = [
        f"{sum(entry.finding.status == status for entry in report.entries)} {word}"
        for status, word in _WORDS.items()
    ]
    lines.append(f"  {', '.join(counts)}")
    return "\n".join(lines)


def _where(report: Report, entry: Entry) -> str:
    if entry.finding.status == Status.PASS or len(entry.ranks) in (0, report.heard):
        return ""
    names = entry.hosts[:_HOSTS_NAMED]
    more = len(entry.hosts) - len(names)
    hosts = ", ".join(names) + (f" and {more} more" if more else "")
    word = "rank" if len(entry.ranks) == 1 else "ranks"
    return f" [{word} {ranges(sorted(entry.ranks))} on {hosts}]"


def document(report: Report) -> str:
    """As JSON; ``format`` grows when a key changes its meaning."""
    findings = [
        {
            "check": entry.finding.check,
            "code": entry.finding.code,
            "status": entry.finding.status.name,
            "why": entry.finding.why,
            "fix": entry.finding.fix,
            "ranks": sorted(entry.ranks),
            "hosts": entry.hosts,
        }
        for entry in report.entries
    ]
    return json.dumps(
        {
            "format": FORMAT,
            "hpcsync": __version__,
            "where": report.where,
            "ranks": report.ranks,
            "heard": report.heard,
            "status": report.worst.name,
            "exit_status": report.exit_status,
            "findings": findings,
        },
        indent=2,
    )
