"""Why a job hangs, from the dumps of its ranks (``hpcsync.trace.hang``).

A collective ends when all ranks have come to it, so ranks that have not begun it are those that the
others wait for. Where all have come, one follows who waits for whom: who is waited for and waits
for nobody holds the others up, and where all wait in a ring a message is lost. Outside of
collectives of gradients the stack tells: a rank in ``hpcsync/runtime.py`` waits for a control
message, and those that stand elsewhere are missing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...wording import ranges
from ..events import NAMES
from ..hang import Dump, Frame, Under

_CONTROL = "hpcsync/runtime.py"
# Whoever waits does rounds meanwhile: where in one it is caught says nothing; nor does the dumping.
_WAITING = ("hpcsync/collectives/progress.py", "hpcsync/hangs.py", _CONTROL)
_FOREIGN = ("/site-packages/", "/lib/python", "<frozen ", "<string>")
_DEPTH = 6
_OUTSIDE = "outside of communication"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Ranks that stand at the same place.

    Attributes:
        at: the collective and its level, or the control message, or that it is none.
        waits_for: ranks that they wait for, where known.
        waits: for what, in the words of the first of them.
        last: the last thing that the first of them finished, and how long ago.
        stack: of the first one's main thread, outermost first.
    """

    ranks: tuple[int, ...]
    at: str
    waits_for: tuple[int, ...] = ()
    waits: str = ""
    last: str = ""
    stack: tuple[Frame, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the dumps say together.

    Attributes:
        ranks: of the job; ``dumped`` of them left a dump, ``absent`` are the others.
        reasons: of the dumps, the most frequent first; "request" only if there is no other.
        steps: lowest and highest step in progress.
        stuck: what most ranks wait in; empty if none does.
        sequence: which run of it.
        inside: ranks that are in it.
        missing: ranks that have not come to it, as far as their dumps tell.
        holding: ranks that have come, are waited for, and wait for nobody themselves.
        ring: ranks that wait for each other, if none is missing and none holds the others up.
        also: other collectives that are under way.
        places: where all ranks stand: the ones to blame first, then large groups first.
    """

    ranks: int
    dumped: tuple[int, ...]
    absent: tuple[int, ...]
    reasons: tuple[str, ...]
    steps: tuple[int, int]
    stuck: str = ""
    sequence: int = 0
    inside: tuple[int, ...] = ()
    missing: tuple[int, ...] = ()
    holding: tuple[int, ...] = ()
    ring: tuple[int, ...] = ()
    also: tuple[str, ...] = ()
    places: tuple[Place, ...] = ()

    @property
    def blamed(self) -> tuple[int, ...]:
        """The ranks that the others wait for."""
        return tuple(sorted({*self.missing, *self.holding, *(self.absent if self.stuck else ())}))


@dataclass(frozen=True, slots=True)
class _Stuck:
    """What most ranks wait in."""

    name: str = ""
    sequence: int = 0
    inside: frozenset[int] = frozenset()
    missing: frozenset[int] = frozenset()
    control: bool = False


def report(dumps: Sequence[Dump], ranks: int) -> Report:
    """What the dumps of a job say.

    Args:
        dumps: at least one, of one run, at most one a rank.
        ranks: of the job.
    """
    dumped = {dump.rank for dump in dumps}
    stuck = _collective(dumps) or _control_message(dumps) or _Stuck()
    absent = set(range(ranks)) - dumped
    holding: set[int] = set()
    ring: set[int] = set()
    if stuck.name and not stuck.control and not stuck.missing and not absent:
        holding, ring = _follow(dumps, stuck)
    blamed = stuck.missing | holding
    steps = [dump.step for dump in dumps]
    return Report(
        ranks=ranks,
        dumped=tuple(sorted(dumped)),
        absent=tuple(sorted(absent)),
        reasons=_reasons(dumps),
        steps=(min(steps), max(steps)),
        stuck=stuck.name,
        sequence=stuck.sequence,
        inside=tuple(sorted(stuck.inside)),
        missing=tuple(sorted(stuck.missing)),
        holding=tuple(sorted(holding)),
        ring=tuple(sorted(ring)),
        also=_others(dumps, stuck),
        places=_places(dumps, stuck, blamed),
    )


def _reasons(dumps: Sequence[Dump]) -> tuple[str, ...]:
    counts = Counter(dump.reason for dump in dumps)
    found = tuple(reason for reason, _ in counts.most_common() if reason != "request")
    return found or tuple(counts)


# -- what is stuck ------------------------------------------------------------------------


def _collective(dumps: Sequence[Dump]) -> _Stuck | None:
    """The collective that most ranks are in; of several the one that began first."""
    inside: dict[tuple[str, int], set[int]] = {}
    for dump in dumps:
        for each in dump.active:
            inside.setdefault((each.collective, each.sequence), set()).add(dump.rank)
    if not inside:
        return None
    name, sequence = min(inside, key=lambda key: (-len(inside[key]), key[1], _natural(key[0])))
    found = inside[name, sequence]
    step = max(dump.step for dump in dumps if dump.rank in found)
    missing = {
        dump.rank
        for dump in dumps
        if dump.rank not in found and _before(dump, name, sequence, step)
    }
    return _Stuck(name, sequence, frozenset(found), frozenset(missing))


def _before(dump: Dump, name: str, sequence: int, step: int) -> bool:
    """Whether a rank that is not in a collective has yet to come to it."""
    if name in dump.reached:
        return dump.reached[name] < sequence
    return bool(dump.reached) or dump.step <= step


def _control_message(dumps: Sequence[Dump]) -> _Stuck | None:
    """The control message that most ranks wait in, by their stacks."""
    inside: dict[str, set[int]] = {}
    for dump in dumps:
        call = _call(_main(dump))
        if call:
            inside.setdefault(call, set()).add(dump.rank)
    if not inside:
        return None
    name = min(inside, key=lambda call: (-len(inside[call]), call))
    found = inside[name]
    missing = frozenset(dump.rank for dump in dumps) - found
    steps = [dump.step for dump in dumps if dump.rank in found]
    return _Stuck(name, max(steps), frozenset(found), missing, control=True)


def _call(stack: Sequence[Frame]) -> str:
    """The control message that a stack ends in: ``allreduce_scalar of agree``; empty if none."""
    at = len(stack)
    while at and stack[at - 1].file.endswith(_CONTROL):
        at -= 1
    if at == len(stack):
        return ""
    caller = f" of {stack[at - 1].function}" if at else ""
    return f"{stack[at].function}{caller}"


def _follow(dumps: Sequence[Dump], stuck: _Stuck) -> tuple[set[int], set[int]]:
    """Of ranks that have all come: (who is waited for and waits for nobody, who wait in a ring)."""
    waits = {
        dump.rank: {peer for each in _entries(dump, stuck) for peer in each.peers} - {dump.rank}
        for dump in dumps
    }
    awaited = set().union(*waits.values()) if waits else set()
    holding = {rank for rank in awaited if not waits.get(rank)}
    ring = {rank for rank, peers in waits.items() if any(rank in waits.get(p, ()) for p in peers)}
    return holding, set() if holding else ring


def _entries(dump: Dump, stuck: _Stuck) -> list[Under]:
    """A rank's pieces of what is stuck, the first segment first."""
    key = (stuck.name, stuck.sequence)
    found = [each for each in dump.active if (each.collective, each.sequence) == key]
    return sorted(found, key=lambda each: each.segment)


def _others(dumps: Sequence[Dump], stuck: _Stuck) -> tuple[str, ...]:
    names = {each.collective for dump in dumps for each in dump.active} - {stuck.name}
    return tuple(sorted(names, key=_natural))


def _natural(label: str) -> list[tuple[int, str]]:
    """Sorts ``bucket 9`` before ``bucket 10``."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", label)]


# -- where ranks stand --------------------------------------------------------------------


def _places(dumps: Sequence[Dump], stuck: _Stuck, blamed: Iterable[int]) -> tuple[Place, ...]:
    groups: dict[tuple[str, tuple[tuple[str, str], ...], bool], list[Dump]] = {}
    guilty = set(blamed)
    for dump in sorted(dumps, key=lambda each: each.rank):
        stack = tuple((frame.file, frame.function) for frame in shown(_main(dump)))
        key = (_at(dump, stuck), stack, dump.rank in guilty)
        groups.setdefault(key, []).append(dump)
    order = sorted(groups, key=lambda key: (not key[2], -len(groups[key]), groups[key][0].rank))
    return tuple(_place(key[0], groups[key], stuck) for key in order)


def _place(at: str, members: Sequence[Dump], stuck: _Stuck) -> Place:
    first = members[0]
    waits_for = {
        peer
        for dump in members
        for each in _entries(dump, stuck) or dump.active
        for peer in each.peers
    }
    entries = _entries(first, stuck) or list(first.active)
    return Place(
        ranks=tuple(dump.rank for dump in members),
        at=at,
        waits_for=tuple(sorted(waits_for)),
        waits=entries[0].waits if entries else "",
        last=_last(first),
        stack=_main(first),
    )


def _at(dump: Dump, stuck: _Stuck) -> str:
    entries = _entries(dump, stuck) or sorted(
        dump.active, key=lambda each: (each.sequence, _natural(each.collective), each.segment)
    )
    if entries:
        level = entries[0].level
        return entries[0].collective + (f" at {level}" if level else "")
    return _call(_main(dump)) or _OUTSIDE


def _main(dump: Dump) -> tuple[Frame, ...]:
    return dump.stacks[0].frames if dump.stacks else ()


def _last(dump: Dump) -> str:
    """What the main thread finished last, and how long before the dump."""
    own = dump.events[dump.events["thread"] == 0]
    if not own.shape[0]:
        return ""
    event = own[own["end"].argmax()]
    text = f"{NAMES[int(event['name'])][0]} of step {int(event['step'])}"
    if dump.clock_ns:
        text += f", {max(0.0, (dump.clock_ns - int(event['end'])) / 1e9):.1f} s before"
    return text


def shown(stack: Sequence[Frame]) -> tuple[Frame, ...]:
    """The frames worth showing, outermost first: the user's and hpcsync's, and the innermost."""
    for index, frame in enumerate(stack):
        if frame.file.endswith(_WAITING):
            stack = stack[: index + 1]
            break
    own = [
        frame
        for index, frame in enumerate(stack)
        if index == len(stack) - 1 or not any(part in frame.file for part in _FOREIGN)
    ]
    return tuple(own[-_DEPTH:])


# -- on one page --------------------------------------------------------------------------


def render(found: Report, lines: int = 40, width: int = 110) -> list[str]:
    """The report as lines of text, at most so many of at most that width."""
    head = _head(found)
    room = lines - len(head) - 2
    body: list[str] = []
    for index, place in enumerate(found.places):
        block = _block(place)
        rest = found.places[index:]
        if len(body) + len(block) > room - (len(rest) > 1):
            count = sum(len(each.ranks) for each in rest)
            body.append(f"  and {len(rest)} more places of {_count(count)}; --json has them all")
            break
        body += block
    return [_cut(line, width) for line in [*head, "", "where they stand", *body]]


def _head(found: Report) -> list[str]:
    low, high = found.steps
    step = f"step {low}" if low == high else f"steps {low} to {high}"
    head = [
        f"{_count(found.ranks)} at {step}, dumped for {', '.join(found.reasons)}; "
        f"dumps of {len(found.dumped)}"
    ]
    if not found.stuck:
        head.append("nothing is stuck: no rank waits in communication")
    else:
        run = f" (its run {found.sequence})" if found.sequence else ""
        head.append(
            f"stuck: {found.stuck}{run}; {_count(len(found.inside))} in it: {ranges(found.inside)}"
        )
    if found.missing:
        head.append(f"missing: {_named(found.missing)}: not come to it")
    if found.holding:
        head.append(f"missing: {_named(found.holding)}: come to it, but others wait for it in vain")
    if found.absent:
        head.append(
            f"{'missing' if found.stuck else 'no dump'}: {_named(found.absent)}: left no dump; "
            "dead, or its node is, or the job ended first"
        )
    if found.ring:
        head.append(
            f"all have come, and {_named(found.ring)} wait for each other: a message is lost, or "
            "the link between them is down"
        )
    if found.also:
        more = f" and {len(found.also) - 4} more" if len(found.also) > 4 else ""
        head.append(f"under way too: {', '.join(found.also[:4])}{more}")
    return head


def _block(place: Place) -> list[str]:
    waits = f", waiting for {_named(place.waits_for)}" if place.waits_for else ""
    last = f"; finished last: {place.last}" if place.last else ""
    block = [f"  {_named(place.ranks)} ({len(place.ranks)}): {place.at}{waits}{last}"]
    frames = [f"{_short(each.file)}:{each.line} {each.function}" for each in shown(place.stack)]
    if frames:
        block.append("      " + " < ".join(reversed(frames)))
    return block


def _named(numbers: Sequence[int]) -> str:
    return f"{'rank' if len(numbers) == 1 else 'ranks'} {ranges(numbers)}"


def _count(number: int) -> str:
    return f"{number} {'rank' if number == 1 else 'ranks'}"


def _short(file: str) -> str:
    return "/".join(file.split("/")[-2:])


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
