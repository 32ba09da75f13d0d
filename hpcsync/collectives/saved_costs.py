"""What ``python -m hpcsync.preflight`` measured of links, kept in a file for later jobs.

``compress.codec = "auto"`` and ``tools/trace.py whatif`` take a link's cost from it where it fits
the job, and say so. It fits a job on the same shape of nodes, with the same MPI library and
processor, and in the same cluster and partition of the batch system, for ``GOOD_DAYS``. A file that
does not fit is never used.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..topology import Topology
from .costs import LinkCost

FORMAT, VERSION = "hpcsync-costs", 1
GOOD_DAYS = 30
LEVELS = ("node", "rail")
# Seconds of each part of a cost; so much or more is no measurement.
_BELOW = {"latency_s": 10.0, "wire_s": 1e-3, "cpu_s": 1e-3, "message_cpu_s": 10.0}
_MOST_RANKS = 1 << 31
_LONGEST = 200  # characters of what is told of a broken file


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where costs were measured, or where they are to be used.

    Attributes:
        ranks: of the job.
        local: ranks of a node.
        mpi: name and version of the MPI library.
        processor: model, by the kernel.
        partition, cluster: of the batch system; empty if there is none.
    """

    ranks: int
    nodes: int
    local: int
    mpi: str
    processor: str
    partition: str = ""
    cluster: str = ""

    @classmethod
    def here(cls, topology: Topology, mpi: str) -> Place:
        """That of a job which runs on this machine."""
        return cls(
            ranks=topology.size,
            nodes=topology.node_count,
            local=max(len(ranks) for ranks in topology.nodes),
            mpi=mpi,
            processor=processor(),
            partition=os.environ.get("SLURM_JOB_PARTITION", ""),
            cluster=os.environ.get("SLURM_CLUSTER_NAME", ""),
        )

    @classmethod
    def parsed(cls, table: Mapping[str, Any]) -> Place:
        """From what ``asdict`` made of one.

        Raises:
            KeyError, ValueError: it is not one.
        """
        return cls(
            ranks=_natural("ranks", table["ranks"]),
            nodes=_natural("nodes", table["nodes"]),
            local=_natural("local", table["local"]),
            mpi=_text("mpi", table["mpi"]),
            processor=_text("processor", table["processor"]),
            partition=_text("partition", table["partition"]),
            cluster=_text("cluster", table["cluster"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedCosts:
    """What a file holds.

    Attributes:
        made: when it was measured.
        levels: node (ranks of one node) and rail (between nodes), as far as they were there.
    """

    made: datetime.datetime
    place: Place
    levels: Mapping[str, LinkCost]

    def unfit(self, job: Place, now: datetime.datetime | None = None) -> str:
        """Why a job cannot use them, in words; empty if it can.

        Args:
            now: when the job runs, or ran.
        """
        age = (now or datetime.datetime.now(datetime.UTC)) - self.made
        if age.days >= GOOD_DAYS or age.days < -1:
            return (
                f"it was measured on {self.made:%Y-%m-%d}, not within {GOOD_DAYS} days of the run"
            )
        level = "rail" if job.nodes > 1 else "node"
        if level not in self.levels:
            return f"it holds no link {'between nodes' if level == 'rail' else 'in a node'}"
        pairs: list[tuple[str, object, object]] = [
            ("ranks a node", self.place.local, job.local),
            ("MPI library", self.place.mpi, job.mpi),
            ("processor", self.place.processor, job.processor),
            ("cluster", self.place.cluster or "none", job.cluster or "none"),
            ("partition", self.place.partition or "none", job.partition or "none"),
        ]
        for what, then, now_ in pairs:
            if then != now_:
                return f"it was measured with {what} {then}, and here it is {now_}"
        return ""

    def link(self, nodes: int) -> LinkCost:
        """Between nodes; of one node's ranks where there is only one."""
        return self.levels["rail" if nodes > 1 else "node"]

    def describe(self) -> str:
        """Where the numbers are from: ``preflight of 2026-11-21, 4 ranks on 2 nodes, Open MPI``."""
        place = self.place
        ranks, nodes = _count(place.ranks, "rank"), _count(place.nodes, "node")
        return f"preflight of {self.made:%Y-%m-%d %H:%M} UTC, {ranks} on {nodes}, {place.mpi}"

    def write(self, path: Path) -> None:
        """Save, in place of what is there.

        Raises:
            OSError: it cannot be written.
        """
        whole = {
            "format": FORMAT,
            "version": VERSION,
            "made": self.made.strftime("%Y-%m-%dT%H:%M:%SZ"),
            **asdict(self.place),
            "levels": {name: asdict(cost) for name, cost in self.levels.items()},
        }
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            aside.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
            aside.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise


def read(path: Path) -> SavedCosts | None:
    """What a file holds; None if there is no such file.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        return _parsed(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except _BROKEN as error:
        raise _unusable(
            path, f"no {error}" if isinstance(error, KeyError) else str(error)
        ) from None


# A job must not end for what somebody wrote into that file.
_BROKEN = (
    *(OSError, ValueError, RecursionError, KeyError),
    *(TypeError, AttributeError, OverflowError),
)


def usable(cost: LinkCost) -> bool:
    """Whether a cost may be kept: of more ranks than cores, some are measured as nothing."""
    known = all(0 <= value < _BELOW[key] for key, value in asdict(cost).items())
    return known and cost.latency_s > 0 and cost.wire_s > 0


def _unusable(path: Path, reason: str) -> UserError:
    """In one line, whatever the file held."""
    told = " ".join(reason.split())[:_LONGEST]
    return UserError(
        f"{path}: not the costs of links ({told}); remove it, or run `python -m hpcsync.preflight` "
        "again"
    )


def find(path: str, job: Place) -> tuple[SavedCosts | None, str]:
    """What a job may use, and what is to be told if there is a file and it may not.

    Args:
        path: empty for none.
    """
    if not path:
        return None, ""
    try:
        found = read(Path(path))
    except UserError as error:
        return None, str(error)
    if found is None:
        return None, ""
    if why := found.unfit(job):
        return None, f"{path} is not used: {why}; `python -m hpcsync.preflight` measures anew"
    return found, ""


def processor() -> str:
    """The processor's model, as the kernel tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return found[1].strip() if found else os.uname().machine


def _parsed(whole: Any) -> SavedCosts:
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    if whole["version"] != VERSION:
        raise ValueError(f"version {whole['version']!r}, and this hpcsync reads {VERSION}")
    made = datetime.datetime.strptime(whole["made"], "%Y-%m-%dT%H:%M:%SZ")
    place = Place.parsed(whole)
    levels = {
        name: LinkCost(**{key: _seconds(key, value) for key, value in _table(name, cost).items()})
        for name, cost in _table("levels", whole["levels"]).items()
        if name in LEVELS
    }
    if not all(usable(cost) for cost in levels.values()):
        raise ValueError("a latency or a time of a byte is 0")
    return SavedCosts(made=made.replace(tzinfo=datetime.UTC), place=place, levels=levels)


def _natural(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _MOST_RANKS:
        raise ValueError(f"{key} is {value!r}")
    return value


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"{key} is {value!r}")
    return value


def _table(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{key} is {value!r}")
    return value


def _seconds(key: str, value: Any) -> float:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if key not in _BELOW or not known or not 0 <= value < _BELOW[key]:
        raise ValueError(f"{key} is {value!r}")
    return float(value)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
