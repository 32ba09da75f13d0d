"""The cluster on one machine: real nodes to MPI, shaped links, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import launcher
from tools import namespaces, vcluster
from tools.vcluster import ClusterError, VirtualCluster
from tools.virtual_cluster import shares

TOOL = Path(vcluster.__file__)
needs_cluster = pytest.mark.cluster

PLACES = """
import socket
from mpi4py import MPI
comm = MPI.COMM_WORLD
node = comm.Split_type(MPI.COMM_TYPE_SHARED)
print("place", comm.rank, comm.size, socket.gethostname(), node.rank, node.size, flush=True)
"""

SEND = """
import numpy as np
from mpi4py import MPI
comm = MPI.COMM_WORLD
data = np.zeros(4 << 20, np.uint8)
comm.Send(data, 1) if comm.rank == 0 else comm.Recv(data, 0)
"""

GLOO = """
import os
import torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.full((3,), float(dist.get_rank() + 1))
dist.all_reduce(x)
print("sum", dist.get_rank(), int(x[0]), flush=True)
dist.barrier()
os._exit(0)  # Gloo aborts now and then where a peer has closed its connection first
"""

OWNER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
sys.path.insert(0, {root!r})
from tools.vcluster import VirtualCluster
with VirtualCluster(2, name={name!r}) as cluster:
    cluster.spawn("node1", ["sleep", "600"])
    cluster.spawn_mpi(["sleep", "600"])
    time.sleep(1.5)
    print("up", flush=True)
    {then}
"""


def eventually(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether a condition comes true in time."""
    limit = time.monotonic() + seconds
    while not true() and time.monotonic() < limit:
        time.sleep(0.05)
    return true()


def start_owner(name: str, then: str) -> subprocess.Popen[str]:
    """A process that has a cluster with two sleeping jobs on it."""
    code = OWNER.format(root=str(launcher.ROOT), name=name, then=then)
    env = launcher.environment({launcher.MARK: name})
    pipe = subprocess.PIPE
    owner = subprocess.Popen(
        [sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True, env=env
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "up\n"
    return owner


def is_gone(name: str) -> bool:
    """No folder and no process of a cluster is left."""
    return not (namespaces.base_folder() / name).exists() and not launcher.processes(name)


@pytest.fixture
def name() -> str:
    """A cluster's name that nobody else has."""
    return "test-" + uuid.uuid4().hex[:8]


@needs_cluster
def test_mpi_sees_two_nodes_of_two_ranks() -> None:
    """Host names, ranks that fill node0 first, and Split_type's locality."""
    with VirtualCluster(2, "none") as cluster:
        done = cluster.run_mpi([sys.executable, "-c", PLACES], 2, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("place"))
    assert lines == [
        "place 0 4 node0 0 2",
        "place 1 4 node0 1 2",
        "place 2 4 node1 0 2",
        "place 3 4 node1 1 2",
    ]


@needs_cluster
def test_bytes_count_what_crosses_the_link() -> None:
    """4 MiB sent are 4 MiB and headers at both ends, and next to nothing the other way."""
    with VirtualCluster(2, "none") as cluster:
        before = cluster.bytes()
        done = cluster.run_mpi([sys.executable, "-c", SEND], timeout=60)
        after = cluster.bytes()
        counter = "/sys/class/net/eth0/statistics/tx_bytes"
        seen = cluster.spawn("node0", ["cat", counter], stdout=subprocess.PIPE, text=True)
        assert abs(int(seen.communicate()[0]) - after["node0"].sent) < 5000
    assert done.returncode == 0, done.stderr
    sent = after["node0"].sent - before["node0"].sent
    received = after["node1"].received - before["node1"].received
    assert 4 << 20 < sent < 1.15 * (4 << 20)
    assert 4 << 20 < received < 1.15 * (4 << 20)
    assert after["node1"].sent - before["node1"].sent < 0.3 * (4 << 20)


@needs_cluster
@pytest.mark.parametrize(
    ("cores", "nodes", "wanted"),
    [
        ([0, 1], 2, ["0", "1"]),
        ([0, 2, 5, 7, 9], 2, ["0,2", "5,7,9"]),
        ([0, 1], 1, ["0,1"]),
        ([3, 4], 3, ["3,4"] * 3),
    ],
)
def test_nodes_have_cores_of_their_own_where_there_are_enough(
    cores: list[int], nodes: int, wanted: list[str]
) -> None:
    assert shares(cores, nodes) == wanted


def test_nodes_share_files_but_not_memory_processes_or_temporary_folders() -> None:
    """A file in /dev/shm or TMPDIR of node0 is not in node1."""

    def output(cluster: VirtualCluster, host: str, script: str) -> str:
        argv = ["sh", "-c", script]
        node = cluster.spawn(host, argv, stdout=subprocess.PIPE, text=True)
        return str(node.communicate(timeout=20)[0])

    with VirtualCluster(2, "none", shm="1m") as cluster:
        output(cluster, "node0", 'touch /dev/shm/a "$TMPDIR/b"')
        assert output(cluster, "node0", 'ls /dev/shm "$TMPDIR"').split()[1::2] == ["a", "b"]
        assert len(output(cluster, "node1", 'ls /dev/shm "$TMPDIR"').split()) == 2
        assert output(cluster, "node1", "hostname; pwd").split() == ["node1", os.getcwd()]
        assert "1024" in output(cluster, "node1", "df -k /dev/shm")
        assert output(cluster, "node1", "ls /sys/class/net").split() == ["eth0", "lo"]
    assert not Path("/dev/shm/a").exists()


@needs_cluster
def test_rate_shapes_both_ends_and_changes() -> None:
    """The rate that was asked for stands on the node's side of the link."""

    def shape(cluster: VirtualCluster) -> str:
        argv = ["tc", "qdisc", "show", "dev", "eth0"]
        node = cluster.spawn("node1", argv, stdout=subprocess.PIPE, text=True)
        return str(node.communicate(timeout=20)[0])

    with VirtualCluster(2, "1gbit") as cluster:
        assert "tbf" in shape(cluster)
        assert "1Gbit" in shape(cluster)
        cluster.set_rate("100mbit")
        assert "100Mbit" in shape(cluster)
        cluster.set_rate("none")
        assert "tbf" not in shape(cluster)
        with pytest.raises(ClusterError, match=r"tc: .*rate"):
            cluster.set_rate("fast")


@needs_cluster
def test_the_link_of_one_node_has_a_rate_of_its_own() -> None:
    """Both ends of that link, and no other's."""

    def shapes(cluster: VirtualCluster) -> list[str]:
        argv = ["tc", "qdisc", "show", "dev", "eth0"]
        nodes = [
            cluster.spawn(host, argv, stdout=subprocess.PIPE, text=True) for host in cluster.hosts
        ]
        return [str(node.communicate(timeout=20)[0]) for node in nodes]

    with VirtualCluster(2, "1gbit") as cluster:
        cluster.set_rate("10mbit", "node1")
        first, second = shapes(cluster)
        assert "1Gbit" in first
        assert "10Mbit" in second
        with pytest.raises(ClusterError, match="no node 'node5'"):
            cluster.set_rate("10mbit", "node5")


@needs_cluster
def test_plain_ranks_get_what_torchrun_sets() -> None:
    """One ordinary process a rank: Gloo sums over the nodes."""
    pytest.importorskip("torch")
    env = {"OMP_NUM_THREADS": "1"}
    with VirtualCluster(2, "none") as cluster:
        results = cluster.run_plain([sys.executable, "-c", GLOO], timeout=120, env=env)
    assert [done.returncode for done in results] == [0, 0], results
    assert ["sum 0 3" in results[0].stdout, "sum 1 3" in results[1].stdout] == [True, True]


@needs_cluster
def test_a_failing_plain_rank_ends_the_others() -> None:
    """Nobody waits for a rank that has gone."""
    script = '[ "$RANK" = 1 ] && exit 7; exec sleep 600'
    with VirtualCluster(2, "none") as cluster:
        results = cluster.run_plain(["sh", "-c", script], timeout=60)
    assert results[1].returncode == 7
    assert results[0].returncode != 0


@needs_cluster
def test_time_limit_ends_an_mpi_job() -> None:
    """subprocess' own exception, and the cluster can be used again."""
    with VirtualCluster(2, "none") as cluster:
        with pytest.raises(subprocess.TimeoutExpired):
            cluster.run_mpi(["sleep", "600"], timeout=3)
        assert cluster.run_mpi(["sleep", "0.2"], timeout=60).returncode == 0


@needs_cluster
def test_two_clusters_at_once() -> None:
    """Equal host names and addresses do not meet."""
    with VirtualCluster(2, "none") as one, VirtualCluster(3, "none") as two:
        jobs = [
            cluster.spawn_mpi([sys.executable, "-c", PLACES], stdout=subprocess.PIPE, text=True)
            for cluster in (one, two)
        ]
        texts = [job.communicate(timeout=60)[0] for job in jobs]
    assert [text.count("place") for text in texts] == [2, 3]
    assert "node2" in texts[1]
    assert "node2" not in texts[0]


@needs_cluster
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signalled_owner_leaves_nothing(name: str, number: signal.Signals) -> None:
    """Neither processes nor folders, whatever ended the owner."""
    owner = start_owner(name, "time.sleep(600)")
    assert not is_gone(name)
    owner.send_signal(number)
    owner.communicate(timeout=30)
    assert owner.returncode != 0
    assert eventually(lambda: is_gone(name)), launcher.processes(name)


@needs_cluster
def test_an_exception_leaves_nothing(name: str) -> None:
    """The context manager closes, and the exception goes on."""
    owner = start_owner(name, "raise KeyError('mine')")
    assert "mine" in owner.communicate(timeout=30)[1]
    assert is_gone(name)


@needs_cluster
def test_stale_clusters_are_cleared(name: str) -> None:
    """A cluster whose processes were all killed goes with the next start."""
    stale = VirtualCluster(2, "none", name=name, owned=False)
    stale.start()
    stale.detach()
    namespaces.kill_all(stale.state)
    assert (namespaces.base_folder() / name).exists()
    with VirtualCluster(1, "none"):
        assert not (namespaces.base_folder() / name).exists()


@needs_cluster
def test_command_line(name: str) -> None:
    """up, run, exec, rate, bytes and down, each a process of its own."""

    def tool(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(TOOL), "--name", name, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)

    both = ("sh", "-c", "hostname; sleep 0.2")
    try:
        assert "node1" in tool("up", "--nodes", "2").stdout
        assert "is up already" in tool("up").stderr
        assert tool("run", "--ranks-per-node", "2", "--", *both).stdout.count("node1") == 2
        assert tool("run", "--plain", "--", "sh", "-c", "exit 5").returncode == 5
        assert tool("exec", "node1", "--", "hostname").stdout == "node1\n"
        assert "no node 'node7'" in tool("exec", "node7", "--", "true").stderr
        assert tool("rate", "100mbit").returncode == 0
        assert tool("bytes").stdout.count("received") == 2
    finally:
        assert tool("down").returncode == 0
    gone = tool("bytes")
    assert gone.returncode == 2
    assert gone.stderr.count("\n") == 1
    assert "is up" in gone.stderr
    assert is_gone(name)


def test_the_lack_of_root_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, before anything is made."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "needs root" in (vcluster.missing() or "")
    with pytest.raises(ClusterError, match="needs root"):
        VirtualCluster(2).start()


def test_a_missing_tool_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tool and its package."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    found = shutil.which
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "tc" else found(tool) or "x")
    assert vcluster.main(["run", "--nodes", "2", "--", "true"]) == 2
    assert capsys.readouterr().err == "vcluster: tc is missing: install iproute2\n"


def test_names_are_checked() -> None:
    """A name is a folder's."""
    with pytest.raises(ClusterError, match="letters"):
        VirtualCluster(2, name="../etc")


@pytest.mark.parametrize("nodes", [0, -1, 1001])
def test_node_counts_are_checked(nodes: int) -> None:
    """At least one node; addresses for a thousand."""
    with pytest.raises(ClusterError, match="nodes must be"):
        VirtualCluster(nodes)
