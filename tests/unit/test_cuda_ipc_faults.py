"""Device memory and events that ranks cannot share; ranks that fail or are late; on the double."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from hpcsync.device import dtype_of
from hpcsync.errors import DeviceError, HpcsyncError
from hpcsync.schedules import Kind
from hpcsync.transports.base import Wait
from tests.double.device import DoubleDevice
from tests.double.shared import LIMIT_S, Rank, job, values


def refused(size: int, **options: Any) -> list[str]:
    """What every rank is told when memory is to be shared and cannot be."""
    told: list[str] = []

    def work(rank: Rank) -> None:
        with pytest.raises(DeviceError) as caught:
            rank.region(100, dtype_of("float32"))
        told.append(str(caught.value))

    job(size, work, **options)
    assert len(told) == size
    return told


def test_a_rank_that_fails_ends_the_job() -> None:
    def work(rank: Rank) -> None:
        region = rank.region(16, dtype_of("float32"))
        if rank.rank == 1:
            raise ValueError("of rank 1")
        rank.drive(rank.bind("direct", Kind.ALLREDUCE, region))

    with pytest.raises(ValueError, match="of rank 1"):
        job(3, work)


def test_memory_that_cannot_be_reached_is_told_on_every_rank() -> None:
    told = refused(3, unreachable=frozenset({("double:1", "double:2")}))
    assert len(set(told)) == 1
    assert told[0].startswith("cuda_ipc: rank 1 cannot use the device memory of rank 2: ")
    assert told[0].endswith("use comm.transport.node=mpi_staged")
    assert "\n" not in told[0]


def test_memory_that_is_not_the_peers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(device: DoubleDevice, offer: bytes) -> Any:
        return device.empty(4096, shared=True)

    monkeypatch.setattr(DoubleDevice, "open", own)
    told = refused(2)
    assert len(set(told)) == 1
    assert "rank 0 cannot use the device memory of rank 1: what was written there" in told[0]


@pytest.mark.parametrize("method", ["open_event", "shared_event"])
def test_events_that_cannot_be_shared_are_told_on_every_rank(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def refuse(device: DoubleDevice, *_: object) -> Any:
        raise DeviceError(f"{device.identity} shares no events")

    monkeypatch.setattr(DoubleDevice, method, refuse)
    assert refused(2) == ["double:0 shares no events"] * 2


def test_no_room_is_told_on_every_rank() -> None:
    told: list[str] = []

    def work(rank: Rank) -> None:
        with pytest.raises(DeviceError, match="no room") as caught:
            rank.region((1 << 20) * (rank.rank + 1), dtype_of("float32"))
        told.append(str(caught.value))

    job(2, work, capacity=6 << 20)
    assert len(told) == 2
    assert len(set(told)) == 1


def test_more_streams_than_there_are_events_for() -> None:
    def work(rank: Rank) -> None:
        region = rank.region(16, dtype_of("float32"))
        signals = rank.transport.memories.signals
        streams = [rank.device.new_stream(f"more{index}") for index in range(9)]
        for stream in streams[:8]:
            signals.record(stream)
        with pytest.raises(HpcsyncError, match="more than 8 streams"):
            signals.record(streams[8])
        assert region.count == 16

    job(2, work)


def test_waits_say_who_is_missing() -> None:
    """The last rank is late; the others tell that they wait for it, and for nobody else."""
    told: dict[int, str] = {}
    seen = threading.Barrier(3, timeout=LIMIT_S)

    def work(rank: Rank) -> None:
        region = rank.region(4096, dtype_of("float32"))
        program = rank.bind("direct", Kind.ALLREDUCE, region)
        rank.put(region, values(rank.rank, 4096))
        if rank.rank == 2:
            seen.wait()
            rank.drive(program)
            return
        run = program.run()
        wait: Wait | None = next(run)
        assert wait is not None
        limit = time.monotonic() + LIMIT_S
        while "rank 0 to" in wait.describe() or "rank 1 to" in wait.describe():
            assert time.monotonic() < limit
            time.sleep(1e-3)
        assert not wait.ready()
        told[rank.rank] = wait.describe()
        seen.wait()
        while wait is not None:
            rank.until(wait)
            wait = next(run, None)

    job(3, work)
    assert set(told.values()) == {
        "cuda_ipc: waits for rank 2 to reach step 0 of run 1 (it is at its start)"
    }
