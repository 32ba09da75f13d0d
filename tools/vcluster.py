"""A cluster on one machine: nodes are namespaces, links are shaped veth pairs.

Each node has its own host name, network, /dev/shm, process ids and temporary folder, and cores of
its own where the machine has as many; the file system is shared, as on a real cluster. A head
without ranks holds the bridge and runs mpirun:

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
    python tools/vcluster.py rate 10mbit node1
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
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.namespaces import ClusterError, follow, missing
from tools.virtual_cluster import VirtualCluster

__all__ = ["ClusterError", "VirtualCluster", "missing"]


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
    rate = verbs.add_parser("rate", help="change the shape of all links, or of one node's")
    rate.add_argument("rate")
    rate.add_argument("node", nargs="?", default="")
    verbs.add_parser("bytes", help="what each node has sent and received")
    verbs.add_parser("down", help="end the cluster and all that runs on it")
    return top


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
        cluster.set_rate(options.rate, options.node)
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
