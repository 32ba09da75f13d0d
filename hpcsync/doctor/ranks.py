"""What comes out only when all ranks are compared."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from ..topology import Topology
from . import cores, gpu, storage
from .base import Finding, System, fail, good, warn
from .facts import Facts
from .mpi import start

SKEW_S = 5.0
_NAMED = 4


def judge(system: System, every: Sequence[Facts]) -> Iterator[tuple[list[int], Finding]]:
    """Findings with the ranks that they are about, from the facts of all ranks, by rank."""
    hosts: dict[str, list[Facts]] = {}
    for each in every:
        hosts.setdefault(each.host, []).append(each)
    for ranks in hosts.values():
        numbers = [each.rank for each in ranks]
        yield from ((numbers, found) for found in cores.judge(system, ranks, len(hosts)))
    everyone = [each.rank for each in every]
    if len(every) > 1:
        for found in (
            *_names(system, every, hosts),
            *_alike(every, hosts),
            *_shared(system, every),
            *gpu.shared(system, every),
        ):
            yield everyone, found
        yield from ((everyone, found) for found in _clocks(every))


def _names(
    system: System, every: Sequence[Facts], hosts: Mapping[str, Sequence[Facts]]
) -> Iterator[Finding]:
    """Ranks are grouped into nodes by host name."""
    width = system.config.topology.ranks_per_node
    topology = Topology.group([each.host for each in every], width)
    for host, ranks in hosts.items():
        machines = {each.boot for each in ranks}
        runs = [len(list(same)) for _, same in itertools.groupby(each.boot for each in ranks)]
        if len(machines) > 1 and not (width and all(run % width == 0 for run in runs)):
            yield fail(
                "nodes.same_name",
                f"{len(machines)} machines are called {host}: their ranks would count as one "
                "node's, and share memory that they do not share",
                system.again(f"topology.ranks_per_node={math.gcd(*runs)}"),
            )
            return
    if not topology.uniform and not width:
        most = max(map(len, topology.nodes))
        each = len(every) // len(hosts)
        yield warn(
            "nodes.uneven",
            f"{topology.describe()}: only {topology.rails} of {most} ranks of a node send to other "
            "nodes, one a rail",
            f"{start(system, each, len(hosts))} {system.again()}",
        )
        return
    yield good("nodes", topology.describe())


def _alike(every: Sequence[Facts], hosts: Mapping[str, Sequence[Facts]]) -> list[Finding]:
    told = []
    first = every[0]
    for name in first.versions:
        kinds: dict[str, list[str]] = {}
        for each in every:
            names = kinds.setdefault(each.versions.get(name, "missing"), [])
            if each.host not in names:
                names.append(each.host)
        if len(kinds) > 1:
            found = ", ".join(f"{text} on {_some(names)}" for text, names in kinds.items())
            told.append(f"{name}: {found}")
    if told:
        why = f"ranks differ in {'; '.join(told)}"
        return [fail("alike.versions", why, f"export PATH={first.prefix}/bin:$PATH")]
    what = "ranks" if len(hosts) == 1 else f"{len(hosts)} hosts"
    return [good("alike", f"all {what} have the same {', '.join(first.versions)}")]


def _shared(system: System, every: Sequence[Facts]) -> Iterator[Finding]:
    blind = list(dict.fromkeys(each.host for each in every if not each.sees))
    if blind:
        yield fail(
            "folder.local",
            f"{storage.wanted(system)} on {_some(blind)} is not that of rank 0: a run's folder "
            "must be on a file system that all nodes share",
            storage.elsewhere(system),
        )


def _clocks(every: Sequence[Facts]) -> Iterator[Finding]:
    first = every[0].clocks
    for each in every:
        # Waking up late makes a difference larger, never smaller, so the least one counts.
        offsets = [mine - its for mine, its in zip(each.clocks, first, strict=False)]
        skew = min(offsets, key=abs, default=0.0)
        if abs(skew) > SKEW_S:
            side = "ahead of" if skew > 0 else "behind"
            yield warn(
                "clock.skew",
                f"the clock of {each.host} is {abs(skew):.0f} s {side} that of {every[0].host}: "
                "times in logs and names of files mislead",
                "sudo chronyc makestep",
            )
            return


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
