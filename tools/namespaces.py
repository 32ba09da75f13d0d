"""What a virtual cluster stands on: first processes that hold namespaces, and their end.

The state of a cluster is a folder under /run. Its processes are found again by id and start
time, so that a number that the kernel has given to another process is left alone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

NODE_SPACES = ("--net", "--uts", "--ipc", "--mount", "--pid")
HEAD_SPACES = ("--net", "--uts", "--mount")

# The first process of a node. Its host-side pid is read before /proc is the node's own.
NODE_INIT = r"""
set -e
read -r pid rest </proc/self/stat
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs -o "$SHM" tmpfs /dev/shm
mount -t tmpfs -o mode=1777 tmpfs "$STATE/tmp"
mount --bind "$STATE/hosts" /etc/hosts
echo "$NAME" >/proc/sys/kernel/hostname
echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6 2>/dev/null || :
ip link set lo up
trap '' CHLD
echo "$pid"
exec $HOLD >/dev/null
"""

# The first process of the head. Its second half runs only when the owner died without a close:
# the nodes, each with process ids of its own, have gone by then with all they ran.
HEAD_INIT = r"""
set -e
mount --bind "$STATE/hosts" /etc/hosts
echo head >/proc/sys/kernel/hostname
echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6 2>/dev/null || :
ip link set lo up
echo "$$"
$HOLD >/dev/null
set +e
own=$(readlink /proc/self/ns/net | tr -dc 0-9)
mine=$(ls -l /proc/[0-9]*/ns/net 2>/dev/null |
    sed -n "s|.*/proc/\([0-9]*\)/ns/net -> net:.$own.\$|\1|p")
for process in $mine; do
    [ "$process" = "$$" ] || kill -KILL "$process" 2>/dev/null
done
rm -rf "$STATE"
"""

# What mpirun calls instead of ssh: [options] HOST COMMAND...
AGENT = r"""#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
host=$1; shift
read -r pid cores <"@STATE@/pids/$host" || { echo "vcluster: no node $host" >&2; exit 255; }
exec taskset -c "$cores" nsenter --target "$pid" @SPACES@ -- sh -c "$*"
"""


class ClusterError(RuntimeError):
    """The cluster cannot be made or used; one line for the user."""


@dataclass
class State:
    """What is written to STATE/state.json, so that another command finds the cluster."""

    name: str
    rate: str
    burst: str
    queue: str
    owner: int = 0  # 0: made by `up`, stays until `down`
    owner_start: str = ""
    head: int = 0
    nodes: list[int] = field(default_factory=list)
    cores: list[str] = field(default_factory=list)  # of each node, as taskset takes them
    starts: dict[str, str] = field(default_factory=dict)  # pid -> start time, against reuse


def missing() -> str | None:
    """Why no cluster can be made here, in one line; None when one can."""
    if sys.platform != "linux":
        return "a virtual cluster needs Linux"
    if os.geteuid() != 0:
        return "a virtual cluster needs root (network namespaces)"
    needed = {"ip": "iproute2", "tc": "iproute2"}
    needed |= dict.fromkeys(("unshare", "nsenter", "taskset"), "util-linux")
    for tool, package in needed.items():
        if shutil.which(tool) is None:
            return f"{tool} is missing: install {package}"
    probe = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "true"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"namespaces are not allowed here: {done.stderr.strip()}"
    return None


def base_folder() -> Path:
    """Where clusters keep their state; root's alone."""
    run = Path("/run")
    root = run if os.access(run, os.W_OK) else Path(tempfile.gettempdir())
    folder = root / "hpcsync-vcluster"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def start_time(pid: int) -> str:
    """The kernel's start tick of a process; empty when it is gone or only a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


class NodeProcess(subprocess.Popen[Any]):
    """A process in a node; signals go to it and not to the nsenter that waits for it."""

    def send_signal(self, sig: int) -> None:
        """Send `sig` to the command itself."""
        if self.poll() is not None:
            return
        try:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        except OSError:
            children = []
        if not children:
            super().send_signal(sig)
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(int(child), sig)


def kill_all(state: State) -> None:
    """Kill what a cluster runs, as far as the recorded processes are still the same ones."""
    live = [
        pid
        for pid in (state.head, *state.nodes)
        if state.starts.get(str(pid)) == start_time(pid) != ""
    ]
    spaces = {network_of(state.head)} if state.head in live else set()
    spaces -= {"", network_of(os.getpid())}
    for pid in live:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # a node's first process takes the node's others along
    if spaces:
        for entry in Path("/proc").glob("[0-9]*"):
            if network_of(int(entry.name)) in spaces:
                with suppress(ProcessLookupError):
                    os.kill(int(entry.name), signal.SIGKILL)
    limit = time.monotonic() + 10
    while any(start_time(pid) for pid in live) and time.monotonic() < limit:
        time.sleep(0.005)


def network_of(pid: int) -> str:
    """The network namespace of a process; empty when it has gone."""
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return ""


def clear_stale() -> None:
    """Remove clusters whose owner was killed, or, with no owner, whose processes have gone."""
    for folder in base_folder().iterdir():
        try:
            state = State(**json.loads((folder / "state.json").read_text()))
        except (OSError, ValueError, TypeError):
            with suppress(OSError):  # another may be making or clearing it just now
                if time.time() - folder.stat().st_mtime > 60:
                    shutil.rmtree(folder, ignore_errors=True)
            continue
        pid, start = (state.owner, state.owner_start) if state.owner else (state.head, "")
        start = start or state.starts.get(str(pid), "")
        if not pid or start_time(pid) == start:
            continue
        kill_all(state)
        shutil.rmtree(folder, ignore_errors=True)


def end(processes: Sequence[subprocess.Popen[Any]], grace: float = 5.0) -> None:
    """SIGTERM, then after `grace` seconds SIGKILL, to all that still run."""
    for process in processes:
        process.terminate()
    limit = time.monotonic() + grace
    for process in processes:
        try:
            process.wait(max(0.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_all(processes: Sequence[subprocess.Popen[Any]], timeout: float | None = None) -> None:
    """Wait for all; when one fails or the time is over, end the others.

    Raises subprocess.TimeoutExpired.
    """
    limit = time.monotonic() + timeout if timeout is not None else float("inf")
    try:
        while None in (states := [process.poll() for process in processes]):
            if any(states):
                time.sleep(1.0)  # the others may be about to say why
                break
            if time.monotonic() > limit:
                assert timeout is not None
                raise subprocess.TimeoutExpired(processes[0].args, timeout)
            time.sleep(0.02)
    finally:
        end(processes)


def follow(processes: Sequence[subprocess.Popen[Any]]) -> int:
    """Wait for the processes, hand SIGTERM and SIGHUP on to them; their exit status."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        wait_all(processes)
    except KeyboardInterrupt:
        return 130
    status = next((p.returncode for p in processes if p.returncode), 0)
    return status if status >= 0 else 128 - status
