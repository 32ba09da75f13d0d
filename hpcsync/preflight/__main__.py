"""``python -m hpcsync.preflight``: the command.

    processors and memory -> pairs in nodes -> pairs between nodes -> all ranks at once -> verdict

What looks slow is measured again before a node is named for it; processors and memory, which
others on a node use for seconds, a third time after a while, and they must be slow each time.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from .. import interpreter

if not interpreter.fits("mpi4py", "numpy", "torch"):
    sys.exit(2)

from .. import launch
from ..collectives import saved_costs
from ..config import TopologyConfig
from ..errors import HpcsyncError, UserError
from ..launch import AgreedError
from ..runtime import Runtime
from .options import parse

if TYPE_CHECKING:
    from . import judge, report
    from .compute import Rates

NAMED = 4  # exit status: some nodes are slow or wrong
_AGAIN_S = (0.0, 2.0)  # waits before what looks slow is measured again
_IMPORTS_S = 300.0  # limit until all have imported, which takes long from a network file system


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command: ends the process, and with it the job."""
    words = list(sys.argv[1:] if argv is None else argv)
    launch.guard(lambda: command(words))


def command(argv: Sequence[str]) -> int:
    """Measure on all ranks of this job; the exit status."""
    if {"-h", "--help"} & set(argv):  # which needs no MPI
        parse(argv)
    with launch.start(TopologyConfig(), _IMPORTS_S) as job, _told(job, "--json" in argv):
        options = _read(job, argv)
    topology = TopologyConfig(ranks_per_node=options.ranks_per_node)
    limit_s = max(_IMPORTS_S, options.timeout)
    with launch.start(topology, limit_s) as runtime, _told(runtime, options.json):
        return preflight(runtime, options)


@contextlib.contextmanager
def _told(job: Runtime, as_json: bool) -> Iterator[None]:
    """Programs that read an object get one in any case, if rank 0 lives to tell."""
    if not as_json or job.rank:
        yield
        return
    before = signal.signal(signal.SIGTERM, _ended)
    try:
        yield
    except Exception as error:
        print(json.dumps({"error": str(error) or type(error).__name__}), flush=True)
        raise
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _ended(number: int, _: FrameType | None) -> None:
    """Launchers send it to all ranks when one has died."""
    raise HpcsyncError(f"preflight: ended by signal {number}: a rank died, or the job was stopped")


def _read(job: Runtime, argv: Sequence[str]) -> argparse.Namespace:
    """Rank 0 understands the command line and tells the others."""
    outcome: argparse.Namespace | str = ""
    if job.rank == 0:
        try:
            outcome = parse(argv)
        except UserError as error:
            outcome = str(error)
    outcome = job.bcast(outcome)
    if isinstance(outcome, str):
        raise AgreedError(outcome)
    return outcome


def preflight(runtime: Runtime, options: argparse.Namespace) -> int:
    """Measure, tell and save; collective."""
    import torch  # late: a wrong command line should be told at once

    from . import report

    runtime.barrier()
    runtime.timeout_s = options.timeout
    if options.threads:
        torch.set_num_threads(options.threads)
    began = time.perf_counter()
    found = _measure(runtime, options, began)
    if runtime.rank == 0:
        if not options.json:
            print(report.as_text(found), flush=True)
        saved = _save(runtime, options, found)
        print(report.as_json(replace(found, saved=saved)) if options.json else saved, flush=True)
    return NAMED if found.named else 0


def _measure(runtime: Runtime, options: argparse.Namespace, began: float) -> report.Result:
    from . import judge, report
    from .survey import Budget, Survey

    topology = runtime.topology
    told = runtime.allgather_object((_name(runtime), launch.machine()))
    names = [told[ranks[0]][0] for ranks in topology.nodes]
    measuring = Survey(
        runtime, [told[ranks[0]][1] for ranks in topology.nodes], Budget(runtime, options.seconds)
    )
    looks = [measuring.compute()]
    levels = {"node": measuring.in_nodes(), "rail": measuring.between_nodes()}

    def judged(rates: list[Rates]) -> tuple[list[judge.NodeFound], list[judge.Slow]]:
        nodes = judge.nodes_of(topology, names, rates, levels["node"], levels["rail"])
        return nodes, judge.slow_nodes(nodes, options.slow)

    def verdict() -> tuple[list[judge.NodeFound], list[judge.Slow]]:
        nodes, slow = judged(judge.best_of(looks))
        return nodes, judge.lasting(slow, [judged(rates)[1] for rates in looks])

    nodes, slow = verdict()
    for wait_s in _AGAIN_S:
        suspected = {each.what for each in slow}
        if judge.slow_pairs(topology, levels["rail"], options.slow):
            suspected.add("link")
        if wait_s:
            suspected &= {"product", "memory"}
        if not suspected:
            break
        time.sleep(wait_s)
        if suspected & {"product", "memory"}:
            looks.append(measuring.compute())
        if "inside" in suspected:
            levels["node"].look_again(measuring.in_nodes())
        if suspected & {"link", "latency"}:
            levels["rail"].look_again(measuring.between_nodes())
        nodes, slow = verdict()
    measuring.close()
    faults = [fault for level in levels.values() for fault in level.faults]
    rates = judge.odd_products(judge.best_of(looks))
    wrong = judge.wrong_nodes(topology, faults, rates)
    return report.Result(
        topology=topology,
        nodes=nodes,
        device=rates[0].device,
        mpi=launch.mpi_library()[0],
        seconds=time.perf_counter() - began,
        levels=levels,
        slow=slow,
        slow_pairs=judge.slow_pairs(topology, levels["rail"], options.slow),
        wrong=wrong,
        rates=rates,
    )


def _name(runtime: Runtime) -> str:
    """This node as the batch system calls it, which its host need not be called."""
    return (
        os.environ.get("SLURMD_NODENAME")
        or runtime.topology.names[runtime.topology.node_of(runtime.rank)]
    )


def _save(runtime: Runtime, options: argparse.Namespace, found: report.Result) -> str:
    """Keep the costs of links; what is to be told of it."""
    costs = {name: level.together for name, level in found.levels.items()}
    known = {name: cost for name, cost in costs.items() if cost is not None}
    kept = {name: cost for name, cost in known.items() if saved_costs.usable(cost)}
    if not options.save:
        return "costs of links: not saved, as --save says"
    if not known:
        return "costs of links: not saved, since there are none between these ranks"
    if not kept:
        return (
            "costs of links: not saved, since they were measured as nothing: are there more ranks "
            "than cores?"
        )
    if found.named:
        return (
            "costs of links: not saved, since a job had better not use the nodes named above; run "
            "again without them"
        )
    place = saved_costs.Place.here(runtime.topology, found.mpi)
    made = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    whole = saved_costs.SavedCosts(made=made, place=place, levels=kept)
    try:
        whole.write(Path(options.save))
    except OSError as error:
        return f"costs of links: not saved: {options.save}: {error.strerror or error}"
    return f"costs of links: saved in {options.save} for compress.codec=auto and trace.py whatif"


if __name__ == "__main__":
    main()
