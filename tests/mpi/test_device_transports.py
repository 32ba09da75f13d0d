"""Messages between device memory over real MPI; each rank's device is the test double.

Ranks of processes cannot read each other's double, so nodes exchange by messages, too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from hpcsync import schedules
from hpcsync.collectives import Collectives
from hpcsync.collectives.routes import Facts
from hpcsync.config import CommConfig
from hpcsync.device import dtype_of
from hpcsync.launch import Runtime
from hpcsync.schedules import Kind
from hpcsync.topology import Topology
from hpcsync.transports.base import Parcel, Region, Transport, Wait, device_buffer
from hpcsync.transports.mpi_device import MpiDevice
from hpcsync.transports.mpi_staged import MpiStaged
from tests.double.device import DoubleDevice, machine

pytestmark = pytest.mark.mpi

Array = np.ndarray[Any, Any]

STEPWISE = ("direct", "ring", "halving", "doubling")
NAMES = ("mpi_staged", "mpi_device")
LIMIT_S = 60.0
# Longer messages than MPI sends at once, in many cells and in few.
COUNTS = (1, 1000, 100_003)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[DoubleDevice]:
    with machine(f"{request.node.name} {MPI.COMM_WORLD.rank}") as made:
        yield made.device(MPI.COMM_WORLD.rank)


def transport_of(name: str, comm: MPI.Intracomm, device: DoubleDevice) -> Transport:
    if name == "mpi_device":
        return MpiDevice(comm, range(comm.size), device)
    return MpiStaged(comm, range(comm.size), device, piece_bytes=20_000)


def drive(waits: Iterator[Wait]) -> None:
    limit = time.monotonic() + LIMIT_S
    for wait in waits:
        while not wait.ready():
            assert time.monotonic() < limit, wait.describe()
            time.sleep(5e-5)


def values(rank: int, count: int, seed: int) -> Array:
    return np.random.default_rng([seed, rank]).integers(-9, 10, count).astype(np.float32)


def total(count: int, seed: int) -> Array:
    every = [values(rank, count, seed) for rank in range(MPI.COMM_WORLD.size)]
    return np.sum(every, axis=0, dtype=np.float32)


@pytest.mark.parametrize("schedule", STEPWISE)
@pytest.mark.parametrize("name", NAMES)
def test_sums(comm: MPI.Intracomm, device: DoubleDevice, name: str, schedule: str) -> None:
    transport = transport_of(name, comm, device)
    dtype = dtype_of("float32")
    every = schedules.everyone(schedule, Kind.ALLREDUCE, comm.size)
    for tag, count in enumerate(COUNTS):
        buffer = device_buffer(device, 4 * count)
        region = Region(buffer, 0, count, dtype, stream=device.stream())
        program = transport.bind(every, region, tag)
        for seed in range(2):
            device.write(region.array, values(comm.rank, count, seed), region.stream)
            drive(program.run())
            np.testing.assert_array_equal(device.read(region.array), total(count, seed))
        program.close()


@pytest.mark.parametrize("name", NAMES)
def test_mail(comm: MPI.Intracomm, device: DoubleDevice, name: str) -> None:
    transport, stream = transport_of(name, comm, device), device.stream()
    others = [who for who in range(comm.size) if who != comm.rank]
    room = 90_000
    sends = [Parcel(who, device.empty(room)) for who in others]
    receives = [Parcel(who, device.empty(room)) for who in others]
    mail = transport.mail(sends, receives, 3, stream)
    for turn, nbytes in enumerate((0, 1, 20_000, room)):
        waits = [mail.expect(range(len(receives)))]
        for index, parcel in enumerate(sends):
            data = np.full(nbytes, 10 * comm.rank + turn, np.uint8)
            device.write(parcel.memory[:nbytes], data, stream)
            waits.append(mail.send(index, nbytes))
        drive(iter(waits))
        for parcel in receives:
            got = device.read(parcel.memory)[:nbytes]
            assert (got == 10 * parcel.peer + turn).all()
    mail.close()


@pytest.mark.parametrize("width", [0, 1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_collectives(device: DoubleDevice, name: str, width: int) -> None:
    """Several buckets in flight, from the progress thread."""
    size, count = MPI.COMM_WORLD.size, 50_001
    topology = Topology.group(["host"] * size, width)
    facts = Facts(cuda_ipc="ranks are processes", mpi_device="" if name == "mpi_device" else "no")
    with Runtime(MPI.COMM_WORLD.Dup(), topology, LIMIT_S) as runtime:
        config = CommConfig(segment_mb=0.05, timeout_s=LIMIT_S)
        collectives = Collectives(runtime, config, device=device, facts=facts)
        buffer = collectives.arena(4 * 4 * count, pieces=4)
        dtype = dtype_of("float32")
        buckets = [
            collectives.allreduce(buffer, dtype, count=count, offset=4 * count * index)
            for index in range(4)
        ]
        compute = device.current()
        for seed in range(2):
            for index, bucket in enumerate(buckets):
                part = buffer.own[4 * count * index :][: 4 * count].view(np.float32)
                device.write(part, values(runtime.rank, count, 10 * seed + index), compute)
                bucket.start(priority=-index, after=[compute.record()])
            for index, bucket in enumerate(buckets):
                bucket.wait()
                bucket.join(compute)
                part = buffer.own[4 * count * index :][: 4 * count].view(np.float32)
                copy = device.empty(4 * count).view(np.float32)
                compute.copy(copy, part)
                np.testing.assert_array_equal(device.read(copy), total(count, 10 * seed + index))
