"""What a coded collective is told, and what it remembers for the codec."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from ..codecs import Codec, Matrix, Moment, Settings, Store
from ..config import CompressConfig
from ..device.cpu import narrow, widen
from ..trace.recorder import Recorder, Span, now
from ..transports.base import Region

_MASK = (1 << 64) - 1


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

    def note(self, span: Span, start: int, nbytes: int) -> None:
        """Record coding from ``start`` until now that took or gave so many bytes."""
        self.recorder.add(span, start, now(), nbytes, self.bucket)

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
        self._copy = np.empty(0 if self._direct else region.count, np.float32)

    @contextmanager
    def opened(self) -> Iterator[np.ndarray[tuple[int], np.dtype[np.float32]]]:
        """The values; what is written to them is in the region when the context ends."""
        if self._direct:
            yield self._region.array
            return
        dtype, array = self._region.dtype, self._region.array
        wide = dtype.storage == dtype.accumulate
        self._copy[:] = array if wide else widen(array, dtype)
        yield self._copy
        array[:] = self._copy if wide else narrow(self._copy, dtype)
