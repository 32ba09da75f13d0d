"""CUDA events, by torch: within a process, between processes, and aligned to the host's clock."""

from __future__ import annotations

import itertools
import threading
import uuid
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..errors import DeviceError
from ..trace.recorder import now
from .base import Event, SharedEvent

_cuda: Any = torch.cuda  # which has few types
PROCESS = uuid.uuid4().bytes  # names this process in handles, in any container
_RENEW_NS = 1_000_000_000  # clocks drift by some 20 us a second
_FIRST_TRIES = 16
_RETRY_NS = 50_000_000  # after one that failed
_DRIFT = 20e-6
_WIDEST_NS = (
    60_000  # between the host's two readings around a new anchor, while the old one is good
)
_PATIENCE_NS = 1_000_000  # and at most, whatever the old one has drifted
_AT = len(PROCESS) + 8


class Anchor(NamedTuple):
    """An event and when it was reached, by the host's clock."""

    event: torch.cuda.Event
    host_ns: int


class CudaEvent(Event):
    """An event that torch made.

    Args:
        event: recorded already, or of another process.
        use: makes the device that of the calling thread.
        anchor: for timed events.
    """

    __slots__ = ("_anchor", "_use", "event")

    def __init__(
        self, event: torch.cuda.Event, use: Callable[[], None], anchor: Anchor | None = None
    ) -> None:
        self.event: Any = event
        self._use, self._anchor = use, anchor

    def ready(self) -> bool:
        self._use()
        return bool(self.event.query())

    def synchronize(self) -> None:
        self._use()
        self.event.synchronize()

    def reached_ns(self) -> int:
        assert self._anchor is not None, "the event was recorded without `timed`"
        since_ms = float(self._anchor.event.elapsed_time(self.event))
        return self._anchor.host_ns + round(since_ms * 1e6)


class CudaSharedEvent(CudaEvent, SharedEvent):
    """An event that other processes can open."""

    __slots__ = ("__weakref__", "handle")

    def __init__(self, use: Callable[[], None]) -> None:
        use()
        event = _cuda.Event(interprocess=True)
        try:
            exported = bytes(event.ipc_handle())
        except RuntimeError as error:
            raise DeviceError(
                f"this GPU shares no events between processes ({_line(error)}); set "
                "comm.transport.node=mpi_staged"
            ) from None
        super().__init__(event, use)
        self.handle = PROCESS + next(_serials).to_bytes(8, "little") + exported
        _own[self.handle] = self


# Of this process, by handle: CUDA does not open what it made itself.
_own: weakref.WeakValueDictionary[bytes, CudaSharedEvent] = weakref.WeakValueDictionary()
_serials = itertools.count(1)


class Events:
    """Makes the events of a device."""

    def __init__(self, index: int, use: Callable[[], None]) -> None:
        self._device, self._use = torch.device("cuda", index), use
        self._clock: Clock | None = None
        self._lock = threading.Lock()

    def record(self, stream: torch.cuda.Stream, *, timed: bool) -> CudaEvent:
        """A new event at the end of a stream's work."""
        anchor = self._anchor() if timed else None
        # Blocking: whoever waits sleeps, and leaves the core to those who compute.
        event = _cuda.Event(enable_timing=timed, blocking=True)
        event.record(stream)
        return CudaEvent(event, self._use, anchor)

    def shared(self) -> CudaSharedEvent:
        """An event for other processes.

        Raises:
            DeviceError: the device has none.
        """
        return CudaSharedEvent(self._use)

    def open(self, handle: bytes) -> Event:
        """Another process's event, or one of this process, whose handle CUDA would refuse.

        Raises:
            DeviceError: it cannot be opened; the text says why.
        """
        if own := _own.get(handle):
            return own
        self._use()
        try:
            event = _cuda.Event.from_ipc_handle(self._device, handle[_AT:])
        except RuntimeError as error:
            raise DeviceError(
                f"another rank's CUDA event cannot be opened ({_line(error)}); ranks of a node "
                "need one IPC namespace (containers: --ipc=host), or set "
                "comm.transport.node=mpi_staged"
            ) from None
        return CudaEvent(event, self._use)

    def _anchor(self) -> Anchor:
        with self._lock:
            if self._clock is None:
                self._clock = Clock(_cuda.Stream(self._device))
            return self._clock.anchor()


class Clock:
    """When events were reached, by the host's clock.

    An event on a stream without work is reached at once: the host reads its clock before it gives
    the event and after it has seen it reached. The first anchor is the best of several. Later ones
    replace it as clocks drift; one that is not reached at once is dropped, so that nothing waits,
    and not tried again for a while. The older the anchor, the later a new one may be reached.

    Args:
        stream: that nobody else gives work to.

    Raises:
        DeviceError: the device does not answer.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._failed_ns = now() - _RETRY_NS
        tried: list[tuple[int, Anchor]] = []
        for _ in range(_FIRST_TRIES):
            if (found := self._try(10 * _RENEW_NS)) is None:
                break
            tried.append(found)
        if not tried:
            raise DeviceError(
                "the GPU reached no event of an idle stream in 10 s, so its times cannot be told: "
                "end other programs on it (nvidia-smi), or use train.device=cpu"
            )
        _, self._anchor = min(tried, key=lambda each: each[0])

    def anchor(self) -> Anchor:
        """The newest one."""
        start = now()
        age = start - self._anchor.host_ns
        if age > _RENEW_NS and start - self._failed_ns >= _RETRY_NS:
            # The error is half the width.
            drifted = min(round(2 * _DRIFT * age), _PATIENCE_NS)
            if found := self._try(max(_WIDEST_NS, drifted)):
                self._anchor = found[1]
            else:
                self._failed_ns = now()
        return self._anchor

    def _try(self, limit_ns: int) -> tuple[int, Anchor] | None:
        """An anchor and the time between its two readings; None if that takes too long."""
        event = _cuda.Event(enable_timing=True)
        start = now()
        event.record(self._stream)
        while not event.query():
            if now() - start > limit_ns:
                return None
        width = now() - start
        return (width, Anchor(event, start + width // 2)) if width <= limit_ns else None


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
