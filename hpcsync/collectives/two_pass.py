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

from collections.abc import Iterator
from itertools import pairwise

from ..codecs import Moment, PieceCodec
from ..codecs.base import OWNER, SENDER, Bytes, Floats
from ..device.kernels import empty_bytes
from ..errors import HpcsyncError
from ..schedules import chunk_bounds
from ..trace.recorder import COMBINE, DECODE, ENCODE, now
from ..transports.base import Parcel, Region, Transport, Wait
from .coding import Coding, Held, Window
from .kept import MEAN, CodedProgram, Keeper, Kept, Left
from .tail import Tailed


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
        self._window = Window(region)
        rank, size = transport.rank, transport.size
        bounds = chunk_bounds(region.count - tail, size, codec.block)
        bounds[-1] = region.count
        self._parts = [slice(low, high) for low, high in pairwise(bounds)]
        counts = [part.stop - part.start for part in self._parts]
        codecs = [codec] * (size - 1) + [Tailed(codec, tail) if tail else codec]
        self._codecs = codecs
        others = [who for who in range(size) if who != rank]
        # Empty parts are not sent: every rank knows which.
        self._owners = [who for who in others if counts[who]]
        self._givers = others if counts[rank] else []
        room = [code.capacity(count) for code, count in zip(codecs, counts, strict=True)]
        self._coded = [empty_bytes(room[who]) for who in self._owners]
        self._given = [empty_bytes(room[rank]) for _ in self._givers]
        self._means = [empty_bytes(room[who]) for who in self._owners]
        self._mean = empty_bytes(room[rank])
        self._used = 0
        last = tail if rank == size - 1 else 0
        self.kept = Kept(MEAN, start + self._parts[rank].start, counts[rank], last)
        self._mail = transport.mail(
            [
                *map(Parcel, self._owners, self._coded),
                *[Parcel(who, self._mean) for who in self._givers],
            ],
            [*map(Parcel, self._givers, self._given), *map(Parcel, self._owners, self._means)],
            tag,
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
        sent = []
        with self._window.opened() as values:
            for index, who in enumerate(self._owners):
                out, start = self._coded[index], now()
                used = self._codecs[who].encode(
                    values[self._parts[who]], out, self._stores[who], self._moment(who)
                )
                self._coding.note(ENCODE, start, used)
                sent.append(mail.send(index, self._fitting(used, out)))
            yield given
            if self._givers:
                start = now()
                used = self._fitting(self._combine(values[self._parts[rank]]), self._mean)
                self._coding.note(COMBINE, start, used)
                sent += [mail.send(owners + index, used) for index in range(givers)]
                self._used = used
            yield means
            for who, data in zip(self._owners, self._means, strict=True):
                start = now()
                self._codecs[who].decode(data, values[self._parts[who]])
                self._coding.note(DECODE, start, data.shape[0])
            yield from sent

    def close(self) -> None:
        self._mail.close()

    def keepers(self) -> list[Keeper]:
        """The coded mean of this rank's part, if it has one."""
        return [self] if self._givers else []

    def left(self) -> Left:
        return Left((self._mean[: self._used],))

    def _fitting(self, used: int, room: Bytes) -> int:
        if used > room.shape[0]:
            name = self._coding.codec.name
            raise HpcsyncError(
                f"codec {name} used {used} bytes for a piece of at most {room.shape[0]}; its "
                "capacity() must give the most that its encode() uses"
            )
        return used

    def _combine(self, own: Floats) -> int:
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
