"""A coded sum by ordinary allreduces: for codecs whose coded forms can be added.

The codec fills an array, an allreduce adds it over the ranks, the codec goes on; once a round.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .. import schedules
from ..codecs import Moment, SumCodec
from ..codecs.base import SENDER, Bytes
from ..config import CommConfig
from ..device import dtype_of
from ..schedules.base import Kind
from ..trace.recorder import DECODE, ENCODE, now
from ..transports.base import Region, Transport, Wait, private_buffer, sent_bytes
from . import choice
from .coding import Coding, Held, Window
from .kept import SUMS, CodedProgram, Keeper, Kept, Left, Plain, cut, replays, within

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
        self._codec, self._coding, self._start, self._divisor = codec, coding, start, divisor
        self._transport = transport
        self._window = Window(region)
        self._matrices = within(coding.matrices, start, region.count)
        forms = codec.forms(region.count, self._matrices, transport.size)
        assert len(forms) <= MOST_ROUNDS
        self._arrays = []
        self._programs = []
        self.sent_bytes = dict.fromkeys(
            (who for who in range(transport.size) if who != transport.rank), 0.0
        )
        for index, form in enumerate(forms):
            dtype = dtype_of(f"{form.dtype} max" if form.op == "max" else form.dtype)
            buffer = private_buffer(form.count * dtype.itemsize)
            whole = Region(buffer, 0, form.count, dtype)
            name = choice.rail_algorithm(comm, transport.size, whole.nbytes, dtype)
            every = schedules.everyone(name, Kind.ALLREDUCE, transport.size)
            self._arrays.append(whole.array)
            self._programs.append(transport.bind(every, whole, tag + index))
            for who in self.sent_bytes:
                self.sent_bytes[who] += sent_bytes(every[transport.rank], whole, [who])
        self.kept = Kept(SUMS, start, region.count, 0, transport.rank, transport.size, divisor)
        self._region = region
        self._slices: list[Bytes] = []
        self._moment = Moment()
        self._store = codec.store(region.count, self._matrices)
        self.held = [Held(start, SENDER, self._store, 1, divisor)] if self._store else []

    def run(self) -> Iterator[Wait]:
        """One exchange."""
        rank = self._transport.ranks[self._transport.rank]
        moment = self._coding.moment(self._start, 0, rank)
        self._moment = moment
        with self._window.opened() as values:
            rounds = self._codec.rounds(
                values,
                self._arrays,
                self._matrices,
                self._transport.size,
                self._divisor,
                self._store,
                moment,
            )
            start = now()
            while (index := _next(rounds)) is not None:
                self._coding.note(ENCODE, start, self._arrays[index].nbytes)
                if self._arrays[index].shape[0]:
                    yield from self._programs[index].run()
                if self._slices:  # here, since codecs go on to work in these arrays
                    self._slices[index][:] = self._share(index)
                start = now()
            self._coding.note(DECODE, start, sum(each.nbytes for each in self._arrays))

    def keepers(self) -> list[Keeper]:
        """Keep a slice of the sums from the next run on; or the elements, see ``kept``."""
        if not self._region.count:
            return []
        if not replays(self._codec):
            part = cut(self._region.count, self.kept.share, self.kept.shares)
            return [Plain(self._region, self._start, part.start, part.stop)]
        if not self._slices:
            self._slices = [self._share(index).copy() for index in range(len(self._arrays))]
        return [self]

    def left(self) -> Left:
        return Left(tuple(self._slices), self._moment.step, self._moment.shared_seed)

    def _share(self, index: int) -> Bytes:
        whole = self._arrays[index]
        mine: Bytes = whole[cut(whole.shape[0], self.kept.share, self.kept.shares)].view(np.uint8)
        return mine

    def close(self) -> None:
        for program in self._programs:
            program.close()


def _next(rounds: Iterator[int]) -> int | None:
    """The next round. NaN and Inf are passed on without warnings, here and not around a yield:
    other coroutines of the thread run there."""
    with np.errstate(all="ignore"):
        return next(rounds, None)
