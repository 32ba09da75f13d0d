"""What a coded collective is told, and what it remembers for the codec."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..codecs import Codec, Matrix, Moment, Settings, Store
from ..codecs.gpu.room import Room
from ..config import CompressConfig
from ..device import Event, Stream
from ..device.base import Array
from ..device.cpu import narrow, widen
from ..device.cuda_launch import address_of
from ..errors import UserError
from ..trace.recorder import Recorder, Span, now
from ..transports.base import Region

_MASK = (1 << 64) - 1
_WIDENS = {"bfloat16": "bf16", "float16": "fp16"}  # the codec whose pieces are such elements


def settings_of(config: CompressConfig, seed: int) -> Settings:
    """What the deck's section tells a codec."""
    return Settings(
        error_feedback=config.error_feedback,
        stochastic=config.rounding == "stochastic",
        seed=seed,
        ratio=config.ratio,
        threshold=config.threshold,
        rank=config.rank,
        momentum=config.momentum,
        ratio_warmup=config.ratio_warmup,
        verify=config.verify,
        options=config.options,
    )


class Clock:
    """Counts coded steps, the same on all ranks; one for all collectives of a model."""

    def __init__(self) -> None:
        self.step = 0


class Mark(NamedTuple):
    """A time of the host, or an event of a stream."""

    stream: Stream | None
    at: int | Event


@dataclass(frozen=True, kw_only=True)
class Coding:
    """How the first elements of an allreduce are coded.

    Attributes:
        where: ``rail`` codes between nodes, ``all`` between all ranks.
        count: elements that are coded, from the region's first on; the rest goes uncoded.
        matrices: the tensors of those elements, in order, for codecs that want them whole.
        seed: of the run and this allreduce.
        recorder: of the times of coding.
        bucket: index, for the trace.
    """

    codec: Codec
    where: str
    count: int
    matrices: tuple[Matrix, ...] = ()
    seed: int = 0
    clock: Clock = field(default_factory=Clock)
    recorder: Recorder = field(default_factory=lambda: Recorder(2))
    bucket: int = -1

    def begin(self, stream: Stream | None) -> Mark:
        """When coding begins: now, or where the stream that does it stands."""
        return Mark(stream, now() if stream is None else stream.record(timed=True))

    def end(self, start: Mark) -> Mark:
        """When what began there and was done, or given to the stream, ends."""
        return self.begin(start.stream)

    def note(self, span: Span, start: Mark, end: Mark, nbytes: int) -> None:
        """Record coding that took or gave so many bytes."""
        if isinstance(start.at, Event) and isinstance(end.at, Event):
            self.recorder.later.add(span, start.at, end.at, nbytes, self.bucket)
        elif isinstance(start.at, int) and isinstance(end.at, int):
            self.recorder.add(span, start.at, end.at, nbytes, self.bucket)

    def moment(self, start: int, part: int, rank: int) -> Moment:
        """Now, for the coding by ``rank`` of a part of the elements from ``start`` on."""
        shared = _mix(_mix(_mix(self.seed, self.clock.step), start), part)
        return Moment(self.clock.step, _mix(shared, rank), shared)


@dataclass(frozen=True)
class Held:
    """A codec's store and the elements of the allreduce that it belongs to.

    Attributes:
        role: ``sender`` or ``owner``, see ``codecs.base``.
        divisor: how many times as large errors would be in the units of the senders' sum.
        total: by which that sum is divided to give the mean.
    """

    start: int
    role: str
    store: Store
    divisor: int = 1
    total: int = 1

    @property
    def stop(self) -> int:
        return self.start + self.store.count


def _mix(state: int, value: int) -> int:
    """A 64-bit hash of two numbers (Steele, Lea and Flood, SplitMix64, OOPSLA 2014)."""
    state = (state + (value + 1) * 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


class Window:
    """A region's elements as float32, which is what codecs take."""

    def __init__(self, region: Region) -> None:
        self._region = region
        self._direct = region.dtype.name == "float32"
        self._copy = self._room(0 if self._direct else region.count)

    @contextmanager
    def opened(self) -> Iterator[Array]:
        """The values; what is written to them is in the region when the context ends, or, of a
        device, for what its stream is given then."""
        if self._direct:
            yield self._region.array
            return
        self._widen()
        yield self._copy
        self._narrow()

    def _room(self, count: int) -> Array:
        return np.empty(count, np.float32)

    def _widen(self) -> None:
        dtype, array = self._region.dtype, self._region.array
        self._copy[:] = array if dtype.storage == dtype.accumulate else widen(array, dtype)

    def _narrow(self) -> None:
        dtype, array = self._region.dtype, self._region.array
        array[:] = self._copy if dtype.storage == dtype.accumulate else narrow(self._copy, dtype)


class QueuedWindow(Window):
    """A window of memory that a stream works on.

    Raises:
        UserError: of elements that a device cannot widen.
    """

    def __init__(self, region: Region, stream: Stream) -> None:
        self._stream = Room(stream)
        self._kernel = _WIDENS.get(region.dtype.name, "")
        if not self._kernel and region.dtype.name != "float32":
            raise UserError(
                f"compress.codec: gradients of {region.dtype.name} cannot be coded on "
                f"{stream.device.name}; use parameters of float32, bfloat16 or float16, or "
                "compress.codec=none"
            )
        super().__init__(region)

    def _room(self, count: int) -> Array:
        return self._stream.empty(count, np.float32)

    def _widen(self) -> None:
        region, codecs = self._region, self._stream.kernels.blocks
        places = (address_of(region.array), region.count, address_of(self._copy))
        with self._stream.stream:
            codecs.decode(self._kernel, *places)

    def _narrow(self) -> None:
        region, codecs = self._region, self._stream.kernels.blocks
        source, out = address_of(self._copy), address_of(region.array)
        with self._stream.stream:
            codecs.encode(self._kernel, source, None, region.count, False, 0, out)


def window(region: Region) -> Window:
    """The region's elements, wherever they are."""
    return Window(region) if region.stream is None else QueuedWindow(region, region.stream)
