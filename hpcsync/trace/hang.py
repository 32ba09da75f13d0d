"""Dumps of ranks that no longer move: RUN/trace/hang-7.json, one a rank.

    stacks() and what communication says of itself -> Dump -> save
                                                   load -> analysis.stuck.report -> one page

A dump is self-contained: a rank may be killed right after. What dumps say together is told by
``analysis.stuck``.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from .events import EVENT, LANE, LANES, NAMES, Events
from .file import FOLDER

FORMAT = "hpcsync-hang"
VERSION = 1
_FILE = re.compile(r"hang-(\d+)\.json")
_COLUMNS = tuple(name for name in EVENT.names or () if name != "spare")
# "from rank 3, 12 bytes to rank 5" names 3 and 5; "from rank 3, 5" both.
_RANKS = re.compile(r"\branks? (\d+(?:, \d+\b(?! bytes))*)")


class Frame(NamedTuple):
    """A line of a stack."""

    file: str
    line: int
    function: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Where a thread stands.

    Attributes:
        thread: its name.
        frames: outermost first.
    """

    thread: str
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Under:
    """A piece of a collective that is under way on a rank.

    Attributes:
        collective: its label, the same on all ranks: ``bucket 3``.
        sequence: how many runs of it this rank had started; the same run has the same number on
            all ranks.
        segment: of the collective, from 0.
        level: ``node``, ``rail``, ``world``, or "not started" where it waits to be admitted.
        waits: for what, in words.
        ranks: those that it waits for; read out of ``waits`` if not given.
    """

    collective: str
    sequence: int
    segment: int = 0
    level: str = ""
    waits: str = ""
    ranks: tuple[int, ...] = ()

    @property
    def peers(self) -> tuple[int, ...]:
        """The ranks that it waits for, ascending."""
        return tuple(sorted(set(self.ranks or waited_for(self.waits))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Dump:
    """What one rank was at when it stood still.

    Attributes:
        ranks: of the job.
        time: Unix time in s; ``clock_ns`` is the rank's own clock at that moment.
        offset_ns: what to add to times of that clock to get rank 0's.
        reason: why the dump was made: ``timeout``, ``SIGQUIT``.
        step: in progress, from 1; 0 before the first.
        events: the last spans, oldest first, dtype ``events.EVENT``.
        active: pieces of collectives that are under way or wait to be admitted.
        reached: by label, how many runs of a collective were started here; so that one that is
            not under way is known to have ended, or not to have begun.
        stacks: of all threads, the main thread's first.
    """

    rank: int
    ranks: int
    node: int
    host: str
    pid: int
    time: float
    reason: str
    step: int
    run_id: str = ""
    clock_ns: int = 0
    offset_ns: int = 0
    events: Events = field(default_factory=lambda: np.zeros(0, EVENT))
    active: tuple[Under, ...] = ()
    reached: Mapping[str, int] = field(default_factory=dict)
    stacks: tuple[Stack, ...] = ()

    def to_json(self) -> str:
        """As text; events are rows of plain numbers and names."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["events"] = {"columns": _COLUMNS, "rows": _rows(self.events)}
        values["active"] = [asdict(each) for each in self.active]
        values["stacks"] = [asdict(each) for each in self.stacks]
        values["reached"] = dict(self.reached)
        return json.dumps({"format": FORMAT, "version": VERSION, **values})

    @classmethod
    def from_json(cls, text: str) -> Dump:
        """Read it back.

        Raises:
            ValueError: it is no dump, or an incomplete one.
        """
        found = json.loads(text)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError("no dump of hpcsync")
        if found.get("version", 0) > VERSION:
            raise ValueError(f"version {found['version']}, newer than this hpcsync ({VERSION})")
        try:
            values = {name: found[name] for name in cls.__dataclass_fields__}
            values["events"] = _events(values["events"])
            values["active"] = tuple(
                Under(**{**each, "ranks": tuple(each["ranks"])}) for each in values["active"]
            )
            values["stacks"] = tuple(
                Stack(thread=each["thread"], frames=tuple(Frame(*one) for one in each["frames"]))
                for each in values["stacks"]
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"incomplete ({type(error).__name__}: {error})") from error
        return cls(**values)


class Dumps(NamedTuple):
    """Dumps of one run, by rank, and what could not be read, a line each."""

    dumps: list[Dump]
    problems: list[str]


def save(dump: Dump, folder: Path) -> Path:
    """Write a dump into RUN/trace, whole or not at all; returns the file.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"hang-{dump.rank}.json"
    aside = folder / f".{path.name}.part"
    aside.write_text(dump.to_json(), encoding="utf-8")
    os.replace(aside, path)
    return path


def load(folder: str | Path) -> Dumps:
    """The dumps of a run.

    Args:
        folder: of the run, or its trace folder.

    Raises:
        UserError: there are none, or none can be read.
    """
    paths = _find(Path(folder))
    found: list[Dump] = []
    problems: list[str] = []
    for path in paths:
        try:
            found.append(Dump.from_json(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            problems.append(f"{path}: not readable ({str(error).partition(chr(10))[0]}); left out")
    if not found:
        raise UserError("; ".join(problems))
    newest = max(found, key=lambda dump: dump.time)
    problems += [
        f"rank {dump.rank}: its dump is of another run; left out"
        for dump in found
        if dump.run_id != newest.run_id
    ]
    dumps = [dump for dump in found if dump.run_id == newest.run_id]
    return Dumps(sorted(dumps, key=lambda dump: dump.rank), problems)


def stacks(current: FrameType | TracebackType | None = None) -> tuple[Stack, ...]:
    """Where all threads of this process stand, the main thread first.

    Args:
        current: frame at which the calling thread is told to stand, such as the one that a
            signal handler is given, or where it stood when an exception was raised; its caller's
            if not given.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = {ident: _frames(frame) for ident, frame in sys._current_frames().items()}
    mine = threading.get_ident()
    if isinstance(current, TracebackType):
        found[mine] = _raised(current)
    else:
        found[mine] = _frames(current or sys._getframe(1))
    main = threading.main_thread().ident
    order = sorted(found, key=lambda ident: (ident != main, names.get(ident, "")))
    return tuple(
        Stack(thread=names.get(ident, f"thread {ident}"), frames=found[ident]) for ident in order
    )


def waited_for(words: str) -> tuple[int, ...]:
    """The ranks that a text names: ``4096 bytes from rank 3, 12 bytes to rank 5``."""
    found = {int(one) for match in _RANKS.findall(words) for one in match.split(", ")}
    return tuple(sorted(found))


def _frames(frame: FrameType | None) -> tuple[Frame, ...]:
    found: list[Frame] = []
    while frame is not None:
        found.append(Frame(frame.f_code.co_filename, frame.f_lineno or 0, frame.f_code.co_name))
        frame = frame.f_back
    return tuple(reversed(found))


def _raised(trace: TracebackType) -> tuple[Frame, ...]:
    """Where an exception was raised, from the outermost frame on, not only from its handler's."""
    inner = [
        Frame(frame.f_code.co_filename, line, frame.f_code.co_name)
        for frame, line in traceback.walk_tb(trace)
    ]
    return (*_frames(trace.tb_frame.f_back), *inner)


def _find(folder: Path) -> list[Path]:
    for place in (folder / FOLDER, folder):
        found = [(match, path) for path in place.glob("hang-*.json") if (match := _match(path))]
        if found:
            return [path for _, path in sorted(found, key=lambda each: int(each[0][1]))]
    if not folder.exists():
        raise UserError(f"{folder}: no such run folder")
    raise UserError(
        f"{folder}: no dumps in it (trace/hang-*.json); they are made after comm.timeout_s without "
        "progress, or on SIGQUIT"
    )


def _match(path: Path) -> re.Match[str] | None:
    return _FILE.fullmatch(path.name)


def _rows(events: Events) -> list[list[Any]]:
    """Events with their names in place of indices."""
    columns = {name: events[name].tolist() for name in _COLUMNS}
    columns["lane"] = [LANES[index] for index in columns["lane"]]
    columns["name"] = [NAMES[index][0] for index in columns["name"]]
    return [list(row) for row in zip(*(columns[name] for name in _COLUMNS), strict=True)]


def _events(table: Mapping[str, Sequence[Any]]) -> Events:
    """Rows as an array; spans whose name this version does not know are left out."""
    known = {pair: index for index, pair in enumerate(NAMES)}
    columns = list(table["columns"])
    kept = []
    for row in table["rows"]:
        values = dict(zip(columns, row, strict=True))
        index = known.get((values["name"], values["lane"]))
        if index is not None:
            values.update(name=index, lane=LANE[values["lane"]])
            kept.append(tuple(values.get(name, 0) for name in EVENT.names or ()))
    return np.array(kept, EVENT)
