"""The two-pass exchange: a coded sum with two codings, whatever the number of ranks.

    pass 1   every rank codes each part of the region for the part's owner
             the owner decodes, adds in rank order in FP32, divides, and codes the mean
    pass 2   the owner sends the coded mean to all, and all decode the same bytes

So all ranks end with the same bits. These are the messages of the direct allreduce schedule, with
coded contents. What either coding lost stays in a store of the rank that coded, for the next run.

The owner's own part of pass 1 is not coded. (Seide et al., 1-bit SGD, Interspeech 2014, section
3.2; Tang et al., DoubleSqueeze, ICML 2019.)
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from itertools import pairwise

import numpy as np

from ..codecs import Moment, PieceCodec
from ..codecs.base import OWNER, SENDER, Bytes
from ..codecs.gpu.forms import Coder, coder
from ..codecs.gpu.room import Length, Room
from ..device.base import Array
from ..device.kernels import empty_bytes
from ..errors import HpcsyncError
from ..schedules import chunk_bounds
from ..trace.recorder import COMBINE, DECODE, ENCODE
from ..transports.base import Done, Parcel, Region, Transport, Wait
from .coding import Coding, Held, window
from .kept import MEAN, CodedProgram, Keeper, Kept, Left, fetched
from .tail import tailed


class TwoPass(CodedProgram):
    """The exchange bound to a region.

    Args:
        transport: of all ranks that take part; must have messages.
        start: where the region begins in the allreduce; for ``held``.
        tail: last elements of the region, which are not coded.
        tag: as for ``Transport.bind``.

    Attributes:
        held: the codec's stores on this rank.
        sent_bytes: that this rank sends in one run, as far as the codec can tell, by rank.
        kept: this rank's part, whose coded mean it keeps.
    """

    def __init__(
        self,
        transport: Transport,
        region: Region,
        coding: Coding,
        start: int,
        tag: int,
        divisor: int,
        tail: int = 0,
    ) -> None:
        codec = coding.codec
        assert isinstance(codec, PieceCodec)
        self._coding, self._start, self._divisor = coding, start, divisor
        self._transport = transport
        self._window = window(region)
        self._stream = stream = region.stream
        rank, size = transport.rank, transport.size
        bounds = chunk_bounds(region.count - tail, size, codec.block)
        bounds[-1] = region.count
        self._parts = [slice(low, high) for low, high in pairwise(bounds)]
        counts = [part.stop - part.start for part in self._parts]
        codecs: list[Coder] = [coder(codec, stream, max(counts), size)] * size
        if tail:
            codecs[-1] = tailed(codecs[-1], codec, tail, stream)
        self._codecs = codecs
        others = [who for who in range(size) if who != rank]
        # Empty parts are not sent: every rank knows which.
        self._owners = [who for who in others if counts[who]]
        self._givers = others if counts[rank] else []
        room = [code.capacity(count) for code, count in zip(codecs, counts, strict=True)]
        empty = empty_bytes if stream is None else Room(stream).empty
        self._coded = [empty(room[who]) for who in self._owners]
        self._given = [empty(room[rank]) for _ in self._givers]
        self._means = [empty(room[who]) for who in self._owners]
        self._mean = empty(room[rank])
        self._used = 0
        if stream is not None:
            self._cells = stream.device.pinned(8 * size).view(np.uint64)
        last = tail if rank == size - 1 else 0
        self.kept = Kept(MEAN, start + self._parts[rank].start, counts[rank], last)
        self._mail = transport.mail(
            [
                *map(Parcel, self._owners, self._coded),
                *[Parcel(who, self._mean) for who in self._givers],
            ],
            [*map(Parcel, self._givers, self._given), *map(Parcel, self._owners, self._means)],
            tag,
            stream,
        )
        self._stores = {
            who: codecs[who].store(counts[who], OWNER if who == rank else SENDER)
            for who in range(size)
            if counts[who]
        }
        self.held = []
        for who, store in self._stores.items():
            role, units = (OWNER, divisor) if who == rank else (SENDER, 1)
            if store is not None:
                place = start + self._parts[who].start
                self.held.append(Held(place, role, store, units, divisor))
        expected = [
            code.expected(count) if count else 0.0
            for code, count in zip(codecs, counts, strict=True)
        ]
        self.sent_bytes = {who: expected[who] + expected[rank] for who in others}

    def run(self) -> Iterator[Wait]:
        """One exchange."""
        mail, rank = self._mail, self._transport.rank
        givers, owners = len(self._givers), len(self._owners)
        given = mail.expect(range(givers))
        means = mail.expect(range(givers, givers + owners))
        with self._window.opened() as values:
            sent = yield from self._hand_out(values)
            yield given
            if self._givers:
                start = self._coding.begin(self._stream)
                made = self._combine(values[self._parts[rank]])
                end = self._coding.end(start)
                (used,) = (made,) if isinstance(made, int) else (yield from self._told([made]))
                self._coding.note(COMBINE, start, end, self._fitting(used, self._mean))
                sent += [mail.send(owners + index, used) for index in range(givers)]
                self._used = used
            yield means
            start = self._coding.begin(self._stream)
            for who, data in zip(self._owners, self._means, strict=True):
                self._codecs[who].decode(data, values[self._parts[who]])
            nbytes = sum(data.nbytes for data in self._means)
            self._coding.note(DECODE, start, self._coding.end(start), nbytes)
        yield from sent

    def _hand_out(self, values: Array) -> Generator[Wait, None, list[Wait]]:
        """Code each part for its owner, and send it."""
        sent, unknown, nbytes = [], [], 0
        start = self._coding.begin(self._stream)
        for index, who in enumerate(self._owners):
            out = self._coded[index]
            used = self._codecs[who].encode(
                values[self._parts[who]], out, self._stores[who], self._moment(who)
            )
            if isinstance(used, int):
                sent.append(self._mail.send(index, self._fitting(used, out)))
                nbytes += used
            else:
                unknown.append((index, used))
        end = self._coding.end(start)
        if unknown:
            told = yield from self._told([length for _, length in unknown])
            for (index, _), used in zip(unknown, told, strict=True):
                sent.append(self._mail.send(index, self._fitting(used, self._coded[index])))
            nbytes += sum(told)
        self._coding.note(ENCODE, start, end, nbytes)
        return sent

    def close(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
        self._mail.close()

    def keepers(self) -> list[Keeper]:
        """The coded mean of this rank's part, if it has one."""
        return [self] if self._givers else []

    def left(self) -> Left:
        return Left((fetched(self._mean[: self._used], self._stream),))

    def _told(self, lengths: Sequence[Length]) -> Generator[Wait, None, list[int]]:
        """The bytes of pieces that were coded, once the device knows."""
        stream = self._stream
        assert stream is not None
        cells = self._cells[: len(lengths)]
        for index, length in enumerate(lengths):
            stream.copy(cells[index : index + 1], length.cell)
        yield Done(stream.record(), f"coding by {self._coding.codec.name}")
        return [int(cell) + length.more for cell, length in zip(cells, lengths, strict=True)]

    def _fitting(self, used: int, room: Bytes) -> int:
        if used > room.shape[0]:
            name = self._coding.codec.name
            raise HpcsyncError(
                f"codec {name} used {used} bytes for a piece of at most {room.shape[0]}; its "
                "capacity() must give the most that its encode() uses"
            )
        return used

    def _combine(self, own: Array) -> int | Length:
        """The owner's part; the bytes of the coded mean."""
        rank = self._transport.rank
        place = sum(who < rank for who in self._givers)
        return self._codecs[rank].combine(
            own,
            place,
            self._given,
            self._divisor,
            self._mean,
            self._stores[rank],
            self._moment(rank),
        )

    def _moment(self, part: int) -> Moment:
        rank = self._transport.ranks[self._transport.rank]
        return self._coding.moment(self._start, part, rank)
