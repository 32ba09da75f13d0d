"""NCCL as far as messages need it, by CuPy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

from ..device.base import Array
from ..device.cuda_launch import address_of

_UINT8 = 1  # ncclUint8

Message = tuple[int, Array]  # the peer, and the memory


class Library(Protocol):
    """NCCL, as far as it is used; errors are RuntimeError."""

    def identifier(self) -> str:
        """A name for a new communicator."""

    def join(self, size: int, identifier: str, rank: int) -> Communicator:
        """The communicator of that name; waits for all ranks."""


class Communicator(Protocol):
    """Between the ranks of a group."""

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Send and receive beside each other, on the stream that the thread is ``with``."""


class Cupy:
    """CuPy's NCCL.

    Raises:
        ImportError: CuPy is missing, or was built without it.
    """

    def __init__(self) -> None:
        import cupy
        from cupy.cuda import nccl

        if not nccl.available:
            raise ImportError("CuPy has no NCCL here")
        self._cupy, self._nccl = cupy, nccl

    def identifier(self) -> str:
        made = self._nccl.get_unique_id()
        return json.dumps([isinstance(made, bytes), list(made)])

    def join(self, size: int, identifier: str, rank: int) -> Communicator:
        # Older versions of CuPy have a tuple of numbers for it, newer ones bytes.
        whole, numbers = json.loads(identifier)
        named = bytes(numbers) if whole else tuple(numbers)
        made = self._nccl.NcclCommunicator(size, named, rank)
        return _CupyCommunicator(self._cupy, self._nccl, made)


class _CupyCommunicator:
    def __init__(self, cupy: Any, nccl: Any, made: Any) -> None:
        self._cupy, self._nccl, self._made = cupy, nccl, made

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        stream = self._cupy.cuda.get_current_stream().ptr
        self._nccl.groupStart()
        try:
            for peer, memory in sends:
                self._made.send(address_of(memory), memory.nbytes, _UINT8, peer, stream)
            for peer, memory in receives:
                self._made.recv(address_of(memory), memory.nbytes, _UINT8, peer, stream)
        finally:
            self._nccl.groupEnd()
