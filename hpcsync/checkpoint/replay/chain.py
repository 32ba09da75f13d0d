"""A rank's part of the log on disk: files that follow each other, each begun at a checkpoint.

    replay/rank-00003-from-00000100.log    steps 101, 102, ... : header, layouts, steps
    replay/rank-00003-from-00000150.log    steps 151, ...      : a later checkpoint's
    replay/rank-00003-slot-0, -slot-1      see ``slots``

A file's first record is its header. A record of the buckets' layout stands before the first step
that has it; a step tells how the exchange goes on (``exchange``) if that has changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .records import Record, scan

FORMAT, VERSION = "hpcsync-replay", 1
_NAME = re.compile(r"rank-(\d{5,})-from-(\d{8,})\.log")
_SLOT = re.compile(r"rank-(\d{5,})-slot-[01]")


def log_path(folder: Path, rank: int, begin: int) -> Path:
    """The file of the steps after ``begin``."""
    return folder / f"rank-{rank:05d}-from-{begin:08d}.log"


def slot_paths(folder: Path, rank: int) -> tuple[Path, Path]:
    first, second = (folder / f"rank-{rank:05d}-slot-{which}" for which in (0, 1))
    return first, second


def logs(folder: Path, rank: int) -> dict[int, Path]:
    """A rank's log files by the step at which they begin."""
    found: dict[int, Path] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and int(match[1]) == rank:
            found[int(match[2])] = path
    return dict(sorted(found.items()))


def strangers(folder: Path, ranks: int) -> list[Path]:
    """Files of ranks that this job does not have."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name) or _SLOT.fullmatch(path.name)
        if match and int(match[1]) >= ranks:
            found.append(path)
    return found


def header(identity: Mapping[str, Any], begin: int) -> dict[str, Any]:
    """The first record of a file."""
    return {"kind": "file", "format": FORMAT, "version": VERSION, "begin": begin, **identity}


@dataclass(frozen=True)
class Logged:
    """One step in the log.

    Attributes:
        layout: the record of the buckets' layout that it goes by.
        exchange: the reducer's ``settled_state`` after it, but for its counts.
    """

    record: Record
    layout: Record
    exchange: Mapping[str, Any]


@dataclass
class Chain:
    """The steps that follow a checkpoint, without a gap.

    Attributes:
        steps: by number.
        problem: why there are none, or no more; empty if the log just ends.
    """

    steps: dict[int, Logged] = field(default_factory=dict)
    problem: str = ""


def follow(folder: Path, rank: int, identity: Mapping[str, Any], step: int) -> Chain:
    """What this rank logged after ``step``; every byte of it is read and checked.

    Args:
        identity: what the header of a log of this run says.
    """
    chain = Chain()
    at, found = step, logs(folder, rank)
    if step not in found:
        begun = f"it begins at step {max(found)}, not at step {step}" if found else "there is none"
        chain.problem = begun
    while not chain.problem and at in found:
        before = at
        at = _read(chain, found[at], identity, at)
        if at == before:
            break
    return chain


def _read(chain: Chain, path: Path, identity: Mapping[str, Any], begin: int) -> int:
    """Add a file's steps to the chain; the last of them."""
    try:
        records, problem = scan(path)
    except OSError as error:
        records, problem = [], f"{error.strerror or error}"
    if problem:
        chain.problem = f"{path.name}: {problem}"
    if not records:
        return begin
    wanted = header(identity, begin)
    told = records[0].meta
    if told != wanted:
        differ = next((key for key in wanted if told.get(key) != wanted[key]), "format")
        chain.problem = f"{path.name}: it is of another {_WORDS.get(differ, differ)}"
        return begin
    layout: Record | None = None
    exchange: Mapping[str, Any] = {}
    last = begin
    for record in records[1:]:
        kind = record.meta.get("kind")
        if kind == "layout":
            layout = record
        elif kind == "step" and layout is not None and record.step == last + 1:
            last, exchange = record.step, record.meta.get("exchange", exchange)
            chain.steps[last] = Logged(record, layout, exchange)
        else:
            chain.problem = f"{path.name}: the record of step {record.step} does not follow"
            break
    return last


_WORDS = {
    "lineage": "run",
    "nodes": "placement of ranks",
    "setup": "model, optimizer, comm or compress section",
    "begin": "checkpoint",
}
