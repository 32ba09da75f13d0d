"""The kernels of a GPU for codecs, all families by one launcher, and memory for what they need."""

from __future__ import annotations

from collections.abc import Callable

from .base import Array
from .cuda_factors import CudaFactors
from .cuda_kernels import CudaKernels
from .cuda_launch import Launcher
from .cuda_sparse import CudaSparse


class GpuKernels:
    """All kernels of a device.

    Args:
        launcher: puts kernels on the stream that the calling thread is ``with``.
        empty: device memory of so many bytes, as ``Device.empty`` gives.

    Attributes:
        blocks: sums and the codecs of blocks: bf16, fp16, fp8, int8, shared integers, int4, onebit.
        sparse: top-k, threshold and random-k.
        factors: PowerSGD.
    """

    def __init__(self, launcher: Launcher, empty: Callable[[int], Array]) -> None:
        self.empty = empty
        self.blocks = CudaKernels(launcher)
        self.sparse = CudaSparse(launcher)
        self.factors = CudaFactors(launcher)
