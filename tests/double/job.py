"""A job of several ranks in one process: a thread a rank, devices and MPI of the test double."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hpcsync.collectives import Collectives
from hpcsync.collectives.routes import Facts
from hpcsync.config import CommConfig
from hpcsync.runtime import Runtime
from hpcsync.topology import Topology
from tests.double import network
from tests.double.device import DoubleDevice, Machine
from tests.double.device import machine as new_machine


class Rank:
    """What one rank has.

    Attributes:
        device: this rank's; other ranks' memory is reached by ``offer`` and ``open``.
    """

    def __init__(self, job: Job, rank: int, identity: str) -> None:
        self.job, self.rank, self.size = job, rank, job.size
        self.machine: Machine = job.machine
        self.device: DoubleDevice = job.machine.device(rank, identity)
        self.comm = job.network.comm(rank)
        self.runtime: Runtime = Any

    def collectives(
        self,
        config: CommConfig | None = None,
        *,
        device: bool = True,
        facts: Facts | None = None,
    ) -> Collectives:
        """Collectives on the device, or on the host."""
        made = config or CommConfig(**self.job.comm)
        own = self.device if device else None
        return Collectives(self.runtime, made, device=own, facts=facts)


class Job:
    """Ranks that run one function after another; made by ``job``."""

    def __init__(
        self,
        machine: Machine,
        size: int,
        per_node: int,
        aware: bool,
        one_device: bool,
        crowding: float,
        comm: dict[str, Any],
    ) -> None:
        self.machine, self.size, self.comm = machine, size, comm
        self.network = network.Network(machine, size, aware=aware)
        self.topology = Topology.group([f"host{rank // per_node}" for rank in range(size)], 0)
        self.ranks = [
            Rank(self, rank, "double:0" if one_device else f"double:{rank}") for rank in range(size)
        ]
        self._crowding = crowding

    def reseed(self, seed: object) -> None:
        """Other delays from now on; between two runs."""
        self.machine.reseed(seed)
        self.network.reseed()

    def run(self, body: Callable[[Rank], Any], timeout_s: float = 120.0) -> list[Any]:
        """Call ``body`` on every rank, each in a thread; its results by rank.

        Raises:
            Exception: what the first rank that failed raised.
            AssertionError: a rank did not come to its end.
        """
        results: list[Any] = [None] * self.size
        errors: list[BaseException] = []

        def main(rank: Rank) -> None:
            try:
                results[rank.rank] = body(rank)
            except BaseException as error:
                if not isinstance(error, network.JobEndedError):
                    errors.append(error)
                self.network.abort(error)

        threads = [
            threading.Thread(target=main, args=(rank,), name=f"rank {rank.rank}", daemon=True)
            for rank in self.ranks
        ]
        for thread in threads:
            thread.start()
        limit = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, limit - time.monotonic()))
        late = [thread for thread in threads if thread.is_alive()]
        if late and not errors:
            self.network.abort(TimeoutError("a rank hangs"))
            raise AssertionError(f"after {timeout_s:g} s still at work:\n{_stacks(late)}")
        if errors:
            raise errors[0]
        self.machine.check()
        if self.network.error is not None:
            raise self.network.error
        return results

    def _open(self, rank: Rank) -> None:
        rank.runtime = Runtime(rank.comm, self.topology, 60.0, self._crowding)  # type: ignore[arg-type]


def _stacks(threads: Sequence[threading.Thread]) -> str:
    frames = sys._current_frames()
    return "\n".join(
        f"{thread.name}:\n{''.join(traceback.format_stack(frames[thread.ident or 0]))}"
        for thread in threads
        if thread.ident in frames
    )


@contextlib.contextmanager
def job(
    size: int,
    seed: object = 0,
    *,
    per_node: int | None = None,
    aware: bool = True,
    one_device: bool = False,
    crowding: float = 0.5,
    comm: dict[str, Any] | None = None,
    **machine: Any,
) -> Iterator[Job]:
    """Ranks with a device each, whose runtimes are open.

    Args:
        seed: of all delays.
        per_node: ranks a node; all on one if not given.
        aware: MPI takes device memory.
        one_device: all ranks share one device's hardware.
        crowding: ranks a core, as ``Runtime`` has it.
        comm: keys of the ``comm`` section.
        machine: further arguments of ``Machine``.
    """
    with network.installed(), new_machine(seed, **machine) as made:
        self = Job(made, size, per_node or size, aware, one_device, crowding, comm or {})
        try:
            self.run(self._open)
            yield self
            self.run(lambda rank: rank.runtime.close())
        finally:
            self.network.close()
