"""The way of a report: this rank's checks, the meeting of all ranks, their comparison."""

from __future__ import annotations

import dataclasses
import json
import secrets
import socket
import sys
from collections.abc import Collection, Sequence
from typing import Any

from ..children import Answer
from . import checks, facts, ranks, storage
from .base import Finding, Status, System
from .facts import Facts
from .mpi import configured
from .report import Report, merge

# Ranks meet after checks that take one longer than another, some of them a time limit or two.
_MEETING_LIMITS = 3


def examine(system: System, names: Collection[str]) -> Report | None:
    """All ranks' report on rank 0, None on the others; this rank's own where they did not meet."""
    place = system.place
    findings = list(checks.mine(system, names))
    own = facts.gather(system)
    needs_mpi = place.size > 1 or any(name in names for name in checks.JOINED)
    answer = _meet(system, findings, own) if needs_mpi else None
    if answer is not None:
        findings += [each for each in checks.joined(system, answer) if each.check in names]
    reports = answer.data().get("reports") if answer is not None else None
    if place.rank != 0:
        _complain(system, findings)
        return None
    if reports is None:
        reports = [_given(findings, own)]
    else:
        reports[0]["findings"] = [dataclasses.astuple(each) for each in findings]
    return _compare(system, reports, names)


def _meet(system: System, findings: Sequence[Finding], own: Facts) -> Answer:
    limit_s = system.limit_s * (_MEETING_LIMITS if system.place.size > 1 else 1)
    # One that does not answer would keep the ranks from meeting.
    usable = any(each.code in ("folder", "folder.full") for each in findings)
    given = _given(findings, own) | {
        "folder": str(storage.wanted(system)) if usable else "",
        "mark": f".hpcsync-doctor-{secrets.token_hex(4)}",
        "limit_s": limit_s,
    }
    return system.probe("world", text=json.dumps(given), limit_s=limit_s)


def _given(findings: Sequence[Finding], own: Facts) -> dict[str, Any]:
    return {
        "facts": dataclasses.asdict(own),
        "findings": [dataclasses.astuple(each) for each in findings],
    }


def _compare(system: System, reports: Sequence[dict[str, Any]], names: Collection[str]) -> Report:
    every = [Facts(**each["facts"]) for each in reports]
    found = [
        (own.rank, own.host, Finding(code, Status(status), why, fix))
        for own, each in zip(every, reports, strict=True)
        for code, status, why, fix in each["findings"]
    ]
    hosts = {own.rank: own.host for own in every}
    for who, finding in ranks.judge(system, every):
        if finding.check in names:
            found += [(rank, hosts[rank], finding) for rank in who]
    return Report(
        where=system.place.describe(socket.gethostname(), configured(system)),
        entries=merge(found, checks.ORDER),
        ranks=system.place.size,
        heard=len(every),
    )


def _complain(system: System, findings: Sequence[Finding]) -> None:
    """One line of a rank whose own MPI failed: rank 0 cannot hear of it."""
    for each in findings:
        lonely = each.code in ("mpi.broken", "mpi.threads")
        first_of_node = each.code == "mpi.missing" and system.place.local_rank == 0
        if lonely or first_of_node:
            where = f"rank {system.place.rank} on {socket.gethostname()}"
            text = f"hpcsync: doctor: {where}: FAIL mpi: {each.why}; fix: {each.fix}\n"
            sys.stderr.write(text)
            sys.stderr.flush()
