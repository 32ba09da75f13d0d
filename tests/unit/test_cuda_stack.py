"""Whole exchanges on the CUDA device with stand-ins for torch.cuda and CuPy: several ranks in one
process, over every transport that the device has. Order is what the test double is for; these show
that transports and device understand each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcsync.collectives.routes import Facts
from hpcsync.device import dtype_of
from hpcsync.device.cuda import CudaDevice
from hpcsync.transports import cuda_ipc
from tests.double.job import Rank, job
from tests.fake_cuda import Fake, install
from tests.shim import host

pytestmark = pytest.mark.skipif(bool(host.MISSING), reason=host.MISSING)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return install(monkeypatch)


def exchange(rank: Rank, transport: str, algorithm: str, dtype: str) -> None:
    """Two allreduces of whole numbers, whose sums are exact."""
    rank.device = device = CudaDevice(0)  # type: ignore[assignment]
    ipc = "" if transport == "cuda_ipc" else "it is not to be used"
    collectives = rank.collectives(facts=Facts(cuda_ipc=ipc))
    assert collectives.describe_transports()["node"].startswith(transport)
    kind, count = dtype_of(dtype), 5003
    arena = collectives.arena(count * kind.itemsize)
    bound = collectives.allreduce(arena, kind, count=count, algorithm=algorithm)
    array: Any = arena.own.view(kind.storage)
    for run in range(2):
        array.values[:] = values(count, rank.rank + run, kind.storage)
        bound.start(0, [device.current().record()])
        bound.wait()
        bound.join(device.current())
        wanted = sum(values(count, each + run, kind.storage) for each in range(rank.size))
        np.testing.assert_array_equal(array.values, wanted)
        rank.runtime.barrier()  # the test writes without a stream
    bound.close()


def values(count: int, seed: int, kind: Any) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 9, count).astype(kind)


@pytest.mark.parametrize("algorithm", ["auto", "ring"])
@pytest.mark.parametrize("transport", ["cuda_ipc", "mpi_staged"])
def test_sums(fake: Fake, transport: str, algorithm: str) -> None:
    with job(3, comm={"segment_mb": 0.01}) as made:
        made.run(lambda rank: exchange(rank, transport, algorithm, "float32"))


def test_sums_in_two_phases(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_ipc, "ONE_SHOT", 0)
    with job(2) as made:
        made.run(lambda rank: exchange(rank, "cuda_ipc", "auto", "int32"))
