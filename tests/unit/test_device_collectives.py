"""Collectives over the memory of devices: placements, transports, and what is told of them.

All on the double, whose ranks are threads.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any
from unittest import mock

import numpy as np
import pytest

from hpcsync.collectives import Collectives
from hpcsync.collectives.collective import Collective, Stage
from hpcsync.collectives.kept import CodedProgram
from hpcsync.collectives.progress import Progress
from hpcsync.collectives.routes import Facts
from hpcsync.config import CommConfig
from hpcsync.device import dtype_of, host
from hpcsync.errors import CollectiveTimeout, DeviceError, HpcsyncError, UserError
from hpcsync.runtime import AgreedError
from hpcsync.trace.recorder import Recorder
from tests.double.job import Rank, job

Array = np.ndarray[Any, Any]
Way = tuple[str, Facts]

IPC = Facts()
STAGED = Facts(cuda_ipc="no peer access")
AWARE = Facts(cuda_ipc="no peer access", mpi_device="")
BOTH = Facts(mpi_device="")
COUNT = 3000
TINY = {"segment_mb": 0.002}


def values(rank: int, seed: int) -> Array:
    return np.random.default_rng([seed, rank]).integers(-9, 10, COUNT).astype(np.float32)


def sums(rank: Rank, collectives: Collectives, **how: Any) -> None:
    """Several runs on the same memory, each begun when the computation has made the values."""
    dtype = dtype_of("float32")
    buffer = collectives.arena(4 * COUNT)
    assert buffer.queued
    collective = collectives.allreduce(buffer, dtype, count=COUNT, **how)
    array = buffer.own[: 4 * COUNT].view(np.float32)
    device = rank.device
    compute = device.current()
    for seed in range(3):
        device.write(array, values(rank.rank, seed), compute)
        collective.start(after=[compute.record()])
        collective.wait()
        collective.join(compute)
        copy = device.empty(4 * COUNT).view(np.float32)
        compute.copy(copy, array)
        wanted = np.sum([values(who, seed) for who in range(rank.size)], axis=0)
        np.testing.assert_array_equal(device.read(copy), wanted)
    collective.close()


@pytest.mark.parametrize("facts", [IPC, STAGED, AWARE, BOTH], ids=["ipc", "staged", "mpi", "both"])
@pytest.mark.parametrize(("size", "per_node"), [(2, 2), (4, 2), (3, 1), (3, 2), (1, 1)])
def test_sums_on_any_placement(size: int, per_node: int, facts: Facts) -> None:
    def body(rank: Rank) -> None:
        sums(rank, rank.collectives(facts=facts))

    with job(size, (size, per_node), per_node=per_node, comm=TINY) as ranks:
        ranks.run(body)


@pytest.mark.parametrize("algorithm", ["direct", "ring", "halving", "doubling"])
@pytest.mark.parametrize("facts", [IPC, STAGED, AWARE], ids=["ipc", "staged", "mpi"])
def test_flat_algorithms(facts: Facts, algorithm: str) -> None:
    def body(rank: Rank) -> None:
        sums(rank, rank.collectives(facts=facts))

    with job(4, algorithm, per_node=2, comm={**TINY, "algorithm": algorithm}) as ranks:
        ranks.run(body)


@pytest.mark.parametrize(("size", "per_node"), [(3, 3), (5, 3)])
def test_gpus_that_do_not_reach_each_other_are_found_when_it_starts(
    size: int, per_node: int
) -> None:
    """A trial before saw the GPUs of one process only."""

    def body(rank: Rank) -> str:
        collectives = rank.collectives(facts=IPC)
        sums(rank, collectives)
        return collectives.describe_transports()["node"]

    apart = frozenset({("double:1", "double:2")})
    with job(size, size, per_node=per_node, comm=TINY, unreachable=apart) as ranks:
        told = ranks.run(body)
        asked = CommConfig(**TINY, node_transport="cuda_ipc")

        def explicit(rank: Rank) -> None:
            with pytest.raises(DeviceError, match="cuda_ipc: rank 1 cannot use the device memory"):
                rank.collectives(asked, facts=IPC).arena(4 * COUNT)

        ranks.run(explicit)
    assert len(set(told)) == 1
    assert told[0].startswith(
        "mpi_staged (no cuda_ipc: rank 1 cannot use the device memory of rank 2: "
    )
    assert "comm.transport" not in told[0]
    assert "\n" not in told[0]


def test_the_transports_are_told_with_why() -> None:
    def body(rank: Rank) -> dict[str, str]:
        return rank.collectives(facts=STAGED).describe_transports()

    with job(4, per_node=2) as ranks:
        told = ranks.run(body)
    why = "no mpi_device: MPI was not tried on device memory"
    assert told == 4 * [
        {
            "node": f"mpi_staged (no cuda_ipc: no peer access; {why})",
            "rail": f"mpi_staged ({why})",
        }
    ]


def test_what_one_rank_cannot_use_no_rank_uses() -> None:
    def body(rank: Rank) -> dict[str, str]:
        return rank.collectives(facts=STAGED if rank.rank == 1 else IPC).describe_transports()

    with job(2) as ranks:
        told = ranks.run(body)
    assert told[0] == told[1]
    assert told[0]["node"].startswith("mpi_staged (no cuda_ipc: no peer access")


@pytest.mark.parametrize(
    ("comm", "text"),
    [
        ({"node_transport": "cuda_ipc"}, "cuda_ipc cannot be used: no peer access; use "),
        ({"node_transport": "shared_memory"}, "shared_memory does not join device memory"),
        ({"rail_transport": "mpi_device"}, "mpi_device cannot be used: MPI was not tried"),
        ({"algorithm": "native"}, "adds host memory only; on a device use comm.algorithm=auto"),
        ({"rail_algorithm": "native"}, "on a device use comm.rail_algorithm=auto"),
    ],
)
def test_what_cannot_work_ends_the_job_on_all_ranks(comm: dict[str, str], text: str) -> None:
    def body(rank: Rank) -> None:
        with pytest.raises(UserError, match=text):
            rank.collectives(facts=STAGED)

    with job(2, comm=comm) as ranks:
        ranks.run(body)


def test_an_override_is_followed() -> None:
    def body(rank: Rank) -> dict[str, str]:
        collectives = rank.collectives(facts=BOTH)
        sums(rank, collectives)
        return collectives.describe_transports()

    comm = {**TINY, "node_transport": "mpi_staged", "rail_transport": "mpi_staged"}
    with job(4, per_node=2, comm=comm) as ranks:
        assert ranks.run(body)[0] == {"node": "mpi_staged", "rail": "mpi_staged"}


def test_transports_of_devices_are_refused_on_the_host() -> None:
    def body(rank: Rank) -> None:
        config = CommConfig(node_transport="cuda_ipc")
        with pytest.raises(UserError, match=r"comm\.transport\.node: cuda_ipc .* on the host"):
            Collectives(rank.runtime, config, device=host())
        # Where no gradients are exchanged, it is not asked for.
        assert Collectives(rank.runtime, config).describe_transports() == {"node": "shared_memory"}

    with job(2) as ranks:
        ranks.run(body)


@pytest.mark.parametrize("facts", [IPC, STAGED], ids=["shared", "private"])
def test_a_device_without_room_is_told_on_all_ranks(facts: Facts) -> None:
    def body(rank: Rank) -> None:
        collectives = rank.collectives(facts=facts)
        with pytest.raises(AgreedError, match="no room") as raised:
            collectives.arena(1 << 20)
        assert isinstance(raised.value, DeviceError)

    with job(2, capacity=1 << 18) as ranks:
        ranks.run(body)


def test_memory_is_zero_and_shared_where_ranks_read_each_other() -> None:
    def body(rank: Rank) -> None:
        ipc, staged = rank.collectives(facts=IPC), rank.collectives(facts=STAGED)
        assert ipc.arena(1000).shared
        assert not staged.arena(1000).shared
        assert not ipc.buffer(1000).queued
        for made in (ipc.arena(1000), staged.arena(1000)):
            assert not rank.device.read(made.own).any()

    with job(2) as ranks:
        ranks.run(body)


def _taken(rank: Rank) -> int:
    """Bytes of device memory that ranks share, in use."""
    return rank.machine.pool.used.get("shared", 0)


def test_memory_is_freed_when_no_rank_works_on_it_any_more() -> None:
    """At the job's end rank 1's device is still at work when all hosts have come."""
    ended = threading.Event()

    def work() -> None:
        time.sleep(0.3)
        ended.set()

    def body(rank: Rank) -> None:
        collectives = rank.collectives(facts=IPC)
        buffer = collectives.arena(4 * COUNT)
        collective = collectives.allreduce(buffer, dtype_of("float32"), count=COUNT)
        for turn in range(2):
            collective.start(after=[rank.device.current().record()])
            collective.wait()
            if rank.rank == 1 and not turn:
                for stream in rank.device.streams:
                    stream.give(work)
        del buffer
        collectives.close()
        assert ended.is_set()

    with job(3, comm=TINY) as ranks:
        ranks.run(body)
        assert ranks.machine.pool.used["shared"] == 0


@pytest.mark.parametrize("failure", ["exception", "collective"])
def test_memory_is_kept_when_a_rank_fails(failure: str) -> None:
    """Its peers' devices may still use it; and nobody waits for a rank that failed."""
    left = threading.Event()

    def body(rank: Rank) -> None:
        collectives = rank.collectives(facts=IPC)
        sums(rank, collectives)
        if rank.rank != 1:
            assert left.wait(60)
            collectives.close()
        elif failure == "exception":
            with contextlib.suppress(ValueError):
                try:
                    raise ValueError("a rank fails")
                finally:
                    collectives.close()
        else:
            collectives.progress.close()  # as after an error
            collectives.close()
        left.set()
        assert _taken(rank) > 0

    with job(3, comm=TINY) as ranks:
        ranks.run(body)


@pytest.mark.parametrize("failed", [True, False])
def test_a_device_that_waits_for_a_lost_rank_does_not_hold_up_the_end(failed: bool) -> None:
    def body(rank: Rank) -> None:
        lost = threading.Event()
        progress = Progress(1, 0.2)
        stream = rank.device.stream()
        collective = Collective(progress, "coded", 0, "direct", Recorder())
        program = mock.Mock(spec=CodedProgram)
        collective.add_segment(0, [Stage("world", program, 0, 0)], stream)
        stream.give(lambda: lost.wait(60))
        if failed:
            progress._error = HpcsyncError("another rank is gone")
            collective.close()
        else:
            with pytest.raises(CollectiveTimeout, match="a rank is missing"):
                collective.close()
        assert not program.close.called
        lost.set()

    with job(1) as ranks:
        ranks.run(body)


def test_the_end_of_a_script_waits_for_its_device() -> None:
    with job(2, 0) as jobs:

        def body(rank: Rank) -> bool:
            collectives = rank.collectives()
            slow = rank.device.current()
            slow.apply(lambda: time.sleep(0.3))
            last = slow.record()
            collectives.halt()
            return last.ready()

        assert jobs.run(body) == [True, True]
