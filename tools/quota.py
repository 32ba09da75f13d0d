"""A quota of processor time for a node of a virtual cluster: a machine that is slow.

The kernel's control groups, version 1 or 2, hold it; whatever runs in the node is moved there as
it starts.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tools.namespaces import ClusterError, network_of
from tools.virtual_cluster import VirtualCluster

ROOT = Path("/sys/fs/cgroup")
_PERIOD_US = 100_000
_LOOK_S = 0.05


def missing() -> str | None:
    """Why there can be no quota here, in one line; None when there can."""
    try:
        made = _make()
    except OSError as error:
        return (
            f"no control group for processor time: {error.strerror} ({error.filename}); mount one"
        )
    made.rmdir()
    return None


class Quota:
    """Gives a node so much of a core while the context lasts.

    Raises ClusterError when there are no control groups.
    """

    def __init__(self, cluster: VirtualCluster, host: str, cores: float) -> None:
        self._network = network_of(cluster.pid(host))
        try:
            self._group = _make()
        except OSError as error:
            raise ClusterError(f"quota: {error}") from None
        quota_us = int(cores * _PERIOD_US)
        if (ROOT / "cpu").is_dir():
            (self._group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (self._group / "cpu.cfs_quota_us").write_text(str(quota_us))
        else:
            (self._group / "cpu.max").write_text(f"{quota_us} {_PERIOD_US}")
        self._over = threading.Event()
        self._mover = threading.Thread(target=self._move, name="quota", daemon=True)

    def __enter__(self) -> Quota:
        self._mover.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._mover.join()
        limit = time.monotonic() + 10
        while time.monotonic() < limit:
            for pid in (self._group / "cgroup.procs").read_text().split():
                _put(self._group.parent, pid)
            with suppress(OSError):
                self._group.rmdir()
                return
            time.sleep(_LOOK_S)

    def _move(self) -> None:
        """What starts in the node; children are born where their parent is."""
        moved: set[str] = set()
        while not self._over.wait(_LOOK_S):
            for entry in Path("/proc").glob("[0-9]*"):
                if entry.name not in moved and network_of(int(entry.name)) == self._network:
                    moved.add(entry.name)
                    _put(self._group, entry.name)


def _make() -> Path:
    parent = ROOT / "cpu" if (ROOT / "cpu").is_dir() else ROOT
    if parent == ROOT and (ROOT / "cgroup.subtree_control").exists():
        (ROOT / "cgroup.subtree_control").write_text("+cpu")
    group = parent / f"hpcsync-{os.getpid()}-{secrets.token_hex(3)}"
    group.mkdir()
    return group


def _put(group: Path, pid: str) -> None:
    with suppress(OSError):  # it has ended
        (group / "cgroup.procs").write_text(pid)
