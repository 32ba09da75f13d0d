"""What all transports by MPI's messages from rank to rank have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from ..device import Stream
from ..schedules.base import Schedule
from .base import Mail, Parcel, Program, Region, Transport
from .messages import PIECE_BYTES, Completions, most_tags

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

Worker = TypeVar("Worker")


class PointToPoint(Transport, Generic[Worker]):
    """Messages between the ranks of ``comm``, which must be used by nothing else.

    Every program has a tag of its own, so programs may be in flight together and in any order.

    Args:
        device: what does the sums.
        piece_bytes: size at which messages are cut; ``most_bytes`` if not given.
        completions: to share with the other transports that the same thread drives.
    """

    most_bytes: ClassVar[int] = PIECE_BYTES

    def __init__(
        self,
        comm: Intracomm,
        ranks: Sequence[int],
        device: Worker,
        piece_bytes: int | None = None,
        completions: Completions | None = None,
    ) -> None:
        from mpi4py import MPI

        super().__init__(ranks, comm.Get_rank())
        self.comm, self.device, self.mpi = comm, device, MPI
        self.piece_bytes = piece_bytes or self.most_bytes
        self.completions = completions or Completions()
        self._tags = most_tags(comm, MPI.TAG_UB)
        self._prepare()

    def bind(
        self,
        schedules: Sequence[Schedule],
        region: Region,
        tag: int,
        divisor: int = 1,
        released: bool = False,
    ) -> Program:
        return self._program(schedules[self.rank], region, tag % self._tags, divisor)

    def mail(
        self,
        sends: Sequence[Parcel],
        receives: Sequence[Parcel],
        tag: int,
        stream: Stream | None = None,
    ) -> Mail:
        return self._mail(sends, receives, tag % self._tags, stream)

    def _prepare(self) -> None:
        """Make what all programs share."""

    @abstractmethod
    def _program(self, schedule: Schedule, region: Region, tag: int, divisor: int) -> Program:
        """One run of a schedule; its messages have the tag."""

    @abstractmethod
    def _mail(
        self,
        sends: Sequence[Parcel],
        receives: Sequence[Parcel],
        tag: int,
        stream: Stream | None,
    ) -> Mail:
        """Messages with the tag, whose lengths vary."""
