"""Device memory by way of pinned host memory: for any MPI.

Messages are cut into cells, and all stations of the way work at once on different ones:

    this rank    copy down -> pinned -> send
    its peer                                    receive -> pinned -> copy up -> add

Copies down and up have streams of their own. The host waits for nothing but the event of a copy
before MPI may read what it made, and for MPI before the device may read what came; all else is
ordered between streams.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..device import Device, Stream
from ..schedules.base import Schedule
from .base import Mail, Parcel, Program, Region
from .point_to_point import PointToPoint
from .staged_mail import StagedMail
from .staged_program import StagedProgram
from .staging import Lanes


class MpiStaged(PointToPoint[Device]):
    """MPI between host copies of device memory.

    Attributes:
        lanes: what all programs share.
    """

    name = "mpi_staged"
    most_bytes = 1 << 19

    def _prepare(self) -> None:
        self.lanes = Lanes(self)

    def _program(self, schedule: Schedule, region: Region, tag: int, divisor: int) -> Program:
        assert schedule.name != "native", "native adds host memory only"
        return StagedProgram(self.lanes, schedule, region, tag, divisor)

    def _mail(
        self,
        sends: Sequence[Parcel],
        receives: Sequence[Parcel],
        tag: int,
        stream: Stream | None,
    ) -> Mail:
        assert stream is not None, "mpi_staged is for device memory"
        return StagedMail(self.lanes, sends, receives, tag, stream)
