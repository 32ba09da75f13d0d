"""Modules wrapped on the ranks of this job."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn

from hpcsync.config import CommConfig, CompressConfig
from hpcsync.launch import Runtime
from hpcsync.parallel import DataParallel
from hpcsync.topology import Topology
from tests.replicas import KIB, SIZE, WORLD, Wrap


@pytest.fixture
def wrap() -> Iterator[Wrap]:
    """Wraps a module on a placement of the ranks, small buckets by default."""
    runtimes: list[Runtime] = []

    def make(
        module: nn.Module,
        width: int = 0,
        buffers: bool = True,
        compress: CompressConfig | None = None,
        **comm: Any,
    ) -> DataParallel:
        runtime = Runtime(WORLD.Dup(), Topology.group(["host"] * SIZE, width), 60.0)
        runtimes.append(runtime)
        sizes = {"bucket_mb": KIB, "first_bucket_mb": KIB, "timeout_s": 60.0}
        config = CommConfig(**{**sizes, **comm})
        return DataParallel(
            module, runtime=runtime, comm=config, compress=compress, broadcast_buffers=buffers
        )

    yield make
    for runtime in runtimes:
        runtime.close()
