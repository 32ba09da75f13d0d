"""What is known of links besides the trace: what ``python -m hpcsync.preflight`` has saved."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hpcsync.collectives import saved_costs
from hpcsync.collectives.saved_costs import Place, SavedCosts
from hpcsync.errors import UserError
from hpcsync.topology import Topology
from hpcsync.trace.file import RunFacts


@dataclass(frozen=True, slots=True)
class Known:
    """Saved costs beside a trace.

    Attributes:
        place: where the traced run was; None if the trace does not say.
        saved: what the file holds; None if there is none.
        why: they are not used, in words; empty if they are, or if there are none.
    """

    facts: RunFacts
    place: Place | None = None
    saved: SavedCosts | None = None
    why: str = ""

    @classmethod
    def of(cls, facts: RunFacts, path: str) -> Known:
        """What the file at ``path`` says to a traced run; empty for none."""
        if not path:
            return cls(facts)
        try:
            saved = saved_costs.read(Path(path))
        except UserError as error:
            return cls(facts, why=str(error))
        if saved is None:
            return cls(facts)
        place = _place(facts)
        if place is None:
            return cls(facts, why=f"{path} is not used: the trace does not say where it was made")
        unfit = saved.unfit(place, _date(facts, saved))
        return cls(facts, place, saved, f"{path} is not used: {unfit}" if unfit else "")

    def told(self, bits: float) -> RunFacts:
        """What the trace says, with the saved link where it fits and no rate is given."""
        if bits or self.saved is None or self.why or self.facts.nodes < 2:
            return self.facts
        link = asdict(self.saved.link(self.facts.nodes))
        return replace(self.facts, links={**self.facts.links, "rail": link})

    def lines(self, bits: float) -> list[str]:
        """What is to be told of it, for a run that had links."""
        if bits or self.facts.nodes < 2:
            return []
        if self.saved is None or self.why:
            return [self.why] if self.why else []
        return [f"the traced link costs what is known by {self.saved.describe()}"]

    def between_nodes(self, new: Topology) -> SavedCosts | None:
        """The saved costs, if they are those of a link between nodes like these."""
        if self.saved is None or self.place is None:
            return None
        local = max(len(ranks) for ranks in new.nodes)
        there = replace(self.place, ranks=new.size, nodes=new.node_count, local=local)
        return None if self.saved.unfit(there, _date(self.facts, self.saved)) else self.saved


def _place(facts: RunFacts) -> Place | None:
    told = facts.links.get("place")
    if not isinstance(told, Mapping):
        return None
    try:
        return Place.parsed(told)
    except (KeyError, ValueError):
        return None


def _date(facts: RunFacts, saved: SavedCosts) -> datetime.datetime:
    """When the traced run was, for costs that may be of a day before or behind it."""
    try:
        traced = datetime.datetime.fromisoformat(facts.created).astimezone(datetime.UTC)
        return saved.made + abs(traced - saved.made)
    except (ValueError, OverflowError):  # no date, or one of another age
        return datetime.datetime.now(datetime.UTC)
