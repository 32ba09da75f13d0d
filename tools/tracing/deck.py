"""What a traced run was told, and where its ranks were."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from typing import Any

from hpcsync.config import CommConfig, CompressConfig, TraceConfig
from hpcsync.topology import Topology
from hpcsync.trace.file import RunFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Deck:
    """What the traced run was told."""

    comm: CommConfig
    compress: CompressConfig
    trace: TraceConfig

    @classmethod
    def of(cls, text: str) -> Deck:
        """From the TOML of the trace; keys that this hpcsync does not know are left out."""
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError:
            table = {}

        def section(kind: Any, name: str) -> Any:
            known = {each.name for each in fields(kind)}
            given = table.get(name, {})
            return kind(**{key: value for key, value in given.items() if key in known})

        return cls(
            comm=section(CommConfig, "comm"),
            compress=section(CompressConfig, "compress"),
            trace=section(TraceConfig, "trace"),
        )


def topology_of(facts: RunFacts) -> Topology:
    """The traced one, or evenly spread ranks if the trace does not hold it."""
    if facts.topology:
        names = tuple(f"node{node}" for node in range(len(facts.topology)))
        return Topology(facts.topology, names)
    return even(facts.ranks, facts.nodes)


def even(ranks: int, nodes: int) -> Topology:
    """Ranks spread over nodes block by block."""
    return Topology.group([f"node{rank * nodes // ranks:06d}" for rank in range(ranks)])
