"""One cluster for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import launcher
from tests.slurm.cluster import SlurmCluster


@pytest.fixture(scope="session")
def running() -> Iterator[SlurmCluster]:
    with SlurmCluster() as cluster:
        if "pmix" not in cluster.command("srun", "--mpi=list"):
            reason = "its PMIx plug-in finds no library: apt-get install libpmix-dev"
            if launcher.needed("slurm"):
                pytest.fail(f"HPCSYNC_NEED names slurm, but {reason}")
            pytest.skip(f"slurm: {reason}")
        yield cluster


@pytest.fixture
def slurm(running: SlurmCluster) -> SlurmCluster:
    """The cluster, with all nodes free."""
    running.wait_idle()
    return running
