"""Memory of a GPU as CuPy arrays: torch's, shared with other processes, or opened from them.

torch's allocator owns what stays in this process, so that one pool holds all of it. What other
processes open is allocated by itself: pools hand out parts of segments, some of which CUDA cannot
share, and a handle would give away the neighbours as well.
"""

from __future__ import annotations

import itertools
import struct
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import DeviceError
from .base import Array
from .cuda_events import PROCESS

# CUDA shares whole blocks of this size, and smaller allocations are parts of one.
_BLOCK = 2 << 20
_MIB = 1 << 20
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_OFFER = struct.Struct("<16sQQQ64s16s")  # process, serial, offset, bytes, CUDA's handle, PCI bus
_OTHERWISE = "set comm.transport.node=mpi_staged"


class _Held:
    """Memory that goes back with its last reference."""

    def __init__(self, address: int, nbytes: int, release: Callable[[int], object]) -> None:
        self.address, self.nbytes = address, nbytes
        # At the end of the process the driver takes everything back, in an order of its own.
        weakref.finalize(self, release, address).atexit = False


# What this process has offered, by a number of its own: CUDA does not open what it made itself.
_shared: weakref.WeakValueDictionary[int, _Held] = weakref.WeakValueDictionary()
_serials = itertools.count(1)


class CudaMemory:
    """The memory of one device.

    Args:
        cupy: the module.
        index: of the device.
        use: makes the device that of the calling thread.

    Attributes:
        shared_peak: most bytes that were allocated for other processes to open.
    """

    def __init__(self, cupy: Any, index: int, use: Callable[[], None]) -> None:
        self._cupy, self._index, self._use = cupy, index, use
        self._runtime = cupy.cuda.runtime
        self._bus = str(self._runtime.deviceGetPCIBusId(index))
        self.shared_peak = 0

    def private(self, nbytes: int) -> tuple[Array, torch.Tensor]:
        """Memory of torch's allocator, in the order of the calling thread's current stream; and
        the tensor that owns it."""
        self._use()
        try:
            owner = torch.empty(max(nbytes, 1), dtype=torch.uint8, device=f"cuda:{self._index}")
        except torch.OutOfMemoryError:
            raise self._full(nbytes) from None
        return self._array(owner.data_ptr(), nbytes, owner), owner

    def shared(self, nbytes: int) -> Array:
        """Memory that other processes can open."""
        self._use()
        whole = -(-max(nbytes, 1) // _BLOCK) * _BLOCK
        held = _Held(self._allocate(whole), whole, self._free)
        _shared[next(_serials)] = held
        taken = sum(each.nbytes for each in _shared.values())
        self.shared_peak = max(self.shared_peak, taken)
        return self._array(held.address, nbytes, held)

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Pinned host memory, from CuPy's pool."""
        self._use()
        try:
            memory = self._cupy.cuda.alloc_pinned_memory(max(nbytes, 1))
        except self._runtime.CUDARuntimeError as error:
            raise DeviceError(
                f"no room for {_mib(nbytes)} MiB of pinned host memory ({error}); give the job "
                "more memory (Slurm: --mem; containers: --memory and --ulimit memlock=-1)"
            ) from None
        return np.frombuffer(memory, np.uint8, nbytes)

    def offer(self, array: Any) -> bytes:
        """What another process needs to open ``array``, a part of shared memory."""
        self._use()
        at = int(array.data.ptr)
        serial, held = next(
            (serial, held)
            for serial, held in _shared.items()
            if held.address <= at < held.address + held.nbytes
        )
        try:
            handle = self._runtime.ipcGetMemHandle(held.address)
        except self._runtime.CUDARuntimeError as error:
            raise DeviceError(
                f"cuda:{self._index} shares no memory between processes ({error}); {_OTHERWISE}"
            ) from None
        given = (PROCESS, serial, at - held.address, array.nbytes, handle, self._bus.encode())
        return _OFFER.pack(*given)

    def open(self, offer: bytes) -> Array:
        """Another process's memory, or that of this one, whose handle CUDA would refuse.

        Raises:
            DeviceError: it cannot be reached from here.
        """
        process, serial, offset, nbytes, handle, bus = _OFFER.unpack(offer)
        if process == PROCESS:
            held = _shared[serial]
        else:
            self._use()
            self._reach(bus.rstrip(b"\0").decode())
            held = self._open(handle, offset + nbytes)
        return self._array(held.address + offset, nbytes, held)

    def _open(self, handle: bytes, nbytes: int) -> _Held:
        try:
            address = self._runtime.ipcOpenMemHandle(handle)  # with peer access, where needed
        except self._runtime.CUDARuntimeError as error:
            raise DeviceError(
                f"cuda:{self._index} cannot open another rank's memory ({error}); let the ranks "
                "of a node see all its GPUs and one IPC namespace (Slurm: --gpu-bind=none; "
                f"containers: --ipc=host), or {_OTHERWISE}"
            ) from None
        return _Held(int(address), nbytes, self._close)

    def _reach(self, bus: str) -> None:
        """Make sure that kernels here can read the memory of the GPU on that bus."""
        if bus == self._bus:
            return
        try:
            other = self._runtime.deviceGetByPCIBusId(bus)
        except self._runtime.CUDARuntimeError:
            return  # hidden from this process: opening will tell
        if not self._runtime.deviceCanAccessPeer(self._index, other):
            raise DeviceError(
                f"the GPUs {self._bus} and {bus} cannot read each other's memory (nvidia-smi topo "
                f"-p2p r shows which can); {_OTHERWISE}"
            )

    def _array(self, address: int, nbytes: int, owner: object) -> Array:
        cuda, size = self._cupy.cuda, max(nbytes, 1)
        # The device is said: CuPy would name that of the peer, and refuse it in kernels.
        memory = cuda.UnownedMemory(address, size, owner, self._index)
        array = self._cupy.ndarray((nbytes,), np.uint8, cuda.MemoryPointer(memory, 0))
        made: Array = array
        return made

    def _allocate(self, nbytes: int) -> int:
        try:
            return int(self._runtime.malloc(nbytes))
        except self._runtime.CUDARuntimeError as error:
            if error.status != _OUT_OF_MEMORY:
                raise
        torch.cuda.empty_cache()  # what torch keeps for later may be enough
        try:
            return int(self._runtime.malloc(nbytes))
        except self._runtime.CUDARuntimeError as error:
            if error.status != _OUT_OF_MEMORY:
                raise
            raise self._full(nbytes) from None

    def _free(self, address: int) -> None:
        self._use()
        self._runtime.free(address)

    def _close(self, address: int) -> None:
        self._use()
        self._runtime.ipcCloseMemHandle(address)

    def _full(self, nbytes: int) -> DeviceError:
        free, total = torch.cuda.mem_get_info(self._index)
        return DeviceError(
            f"cuda:{self._index} has no room for {_mib(nbytes)} MiB of gradients and buffers: "
            f"{free // _MIB} of {total // _MIB} MiB are free; end other programs on this GPU "
            "(nvidia-smi), give each rank a GPU of its own, or take a smaller model or batch"
        )


def _mib(nbytes: int) -> int:
    return -(-nbytes // _MIB)
