"""A coded sum by ordinary allreduces: for codecs whose coded forms can be added.

The codec fills an array, an allreduce adds it over the ranks, the codec goes on; once a round.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .. import schedules
from ..codecs import Moment, SumCodec
from ..codecs.base import SENDER
from ..codecs.gpu.forms import summer
from ..codecs.gpu.room import Room
from ..config import CommConfig
from ..device import Event, dtype_of
from ..device.base import Array
from ..schedules.base import Kind
from ..trace.recorder import DECODE, ENCODE
from ..transports.base import (
    Done,
    Region,
    Transport,
    Wait,
    device_buffer,
    private_buffer,
    sent_bytes,
)
from . import choice
from .coding import Coding, Held, window
from .kept import SUMS, CodedProgram, Keeper, Kept, Left, Plain, cut, fetched, replays, within

MOST_ROUNDS = 4


class Summed(CodedProgram):
    """The exchange bound to a region.

    Args:
        transport: of all ranks that take part.
        start: where the region begins in the allreduce.
        tag: the first of as many as there are rounds, at most ``MOST_ROUNDS``.

    Attributes:
        held: the codec's store on this rank, if any.
        sent_bytes: that this rank sends in one run, by rank.
        kept: this rank's slice of the sums, which it keeps if told to.
    """

    def __init__(
        self,
        comm: CommConfig,
        transport: Transport,
        region: Region,
        coding: Coding,
        start: int,
        tag: int,
        divisor: int,
    ) -> None:
        codec = coding.codec
        assert isinstance(codec, SumCodec)
        self._coding, self._start, self._divisor = coding, start, divisor
        self._transport = transport
        self._window = window(region)
        self._stream = stream = region.stream
        self._matrices = within(coding.matrices, start, region.count)
        self._codec = codec
        self._code = code = summer(codec, stream, region.count, self._matrices)
        forms = codec.forms(region.count, self._matrices, transport.size)
        assert len(forms) <= MOST_ROUNDS
        self._arrays = []
        self._programs = []
        self.sent_bytes = dict.fromkeys(
            (who for who in range(transport.size) if who != transport.rank), 0.0
        )
        for index, form in enumerate(forms):
            dtype = dtype_of(f"{form.dtype} max" if form.op == "max" else form.dtype)
            nbytes = max(form.count, 1) * dtype.itemsize
            buffer = device_buffer(stream.device, nbytes) if stream else private_buffer(nbytes)
            whole = Region(buffer, 0, form.count, dtype, stream=stream)
            name = choice.rail_algorithm(comm, transport.size, whole.nbytes, dtype)
            every = schedules.everyone(name, Kind.ALLREDUCE, transport.size)
            self._arrays.append(whole.array)
            self._programs.append(transport.bind(every, whole, tag + index))
            for who in self.sent_bytes:
                self.sent_bytes[who] += sent_bytes(every[transport.rank], whole, [who])
        self.kept = Kept(SUMS, start, region.count, 0, transport.rank, transport.size, divisor)
        self._region = region
        self._slices: list[Array] = []
        self._moment = Moment()
        self._store = code.store(region.count, self._matrices)
        self.held = [Held(start, SENDER, self._store, 1, divisor)] if self._store else []

    def run(self) -> Iterator[Wait]:
        """One exchange."""
        rank = self._transport.ranks[self._transport.rank]
        moment = self._coding.moment(self._start, 0, rank)
        self._moment = moment
        with self._window.opened() as values:
            rounds = self._code.rounds(
                values,
                self._arrays,
                self._matrices,
                self._transport.size,
                self._divisor,
                self._store,
                moment,
            )
            start = self._coding.begin(self._stream)
            while (index := _next(rounds)) is not None:
                if isinstance(index, Event):
                    yield Done(index, f"decoding by {self._codec.name}")
                    continue
                end = self._coding.end(start)
                self._coding.note(ENCODE, start, end, self._arrays[index].nbytes)
                if self._arrays[index].shape[0]:
                    yield from self._programs[index].run()
                if self._slices:  # here, since codecs go on to work in these arrays
                    self._keep(index)
                start = self._coding.begin(self._stream)
            nbytes = sum(each.nbytes for each in self._arrays)
            self._coding.note(DECODE, start, self._coding.end(start), nbytes)

    def keepers(self) -> list[Keeper]:
        """Keep a slice of the sums from the next run on; or the elements, see ``kept``."""
        if not self._region.count:
            return []
        if not replays(self._codec):
            part = cut(self._region.count, self.kept.share, self.kept.shares)
            return [Plain(self._region, self._start, part.start, part.stop)]
        if not self._slices:
            empty = np.empty if self._stream is None else Room(self._stream).empty
            sizes = [self._share(index).shape[0] for index in range(len(self._arrays))]
            self._slices = [empty(size, np.uint8) for size in sizes]
            for index in range(len(self._arrays)):
                self._keep(index)
        return [self]

    def left(self) -> Left:
        told = tuple(fetched(each, self._stream) for each in self._slices)
        return Left(told, self._moment.step, self._moment.shared_seed)

    def _keep(self, index: int) -> None:
        share, kept = self._share(index), self._slices[index]
        if self._stream is None:
            kept[:] = share
        elif share.shape[0]:
            self._stream.copy(kept, share)

    def _share(self, index: int) -> Array:
        whole = self._arrays[index]
        return whole[cut(whole.shape[0], self.kept.share, self.kept.shares)].view(np.uint8)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
        for program in self._programs:
            program.close()


def _next(rounds: Iterator[int] | Iterator[int | Event]) -> int | Event | None:
    """The next round. NaN and Inf are passed on without warnings, here and not around a yield:
    other coroutines of the thread run there."""
    with np.errstate(all="ignore"):
        return next(rounds, None)
