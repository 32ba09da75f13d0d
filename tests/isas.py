"""The native kernels with each instruction set that the processor may have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from hpcsync.device import kernels

ISAS = ("plain", "avx2", "avx512")

every_isa = pytest.mark.parametrize("isa", ISAS)


@contextlib.contextmanager
def using(isa: str) -> Iterator[kernels.Kernels]:
    """The kernels with an instruction set; the test is skipped where one of them is missing."""
    loaded = kernels.load()
    if loaded is None:
        pytest.skip(kernels.missing())
    before = loaded.isa
    if not loaded.use_isa(isa):
        pytest.skip(f"the processor lacks {isa}")
    try:
        yield loaded
    finally:
        loaded.use_isa(before)
