"""A collective in flight: start it, go on computing, wait for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..device import Event, Stream
from ..trace.later import Earliest, Latest
from ..trace.recorder import BUCKET, QUEUED, WIRE, Recorder, now
from ..transports.base import Program, Wait
from .coding import Held
from .jobs import Job, Place
from .kept import CodedProgram, Keeper
from .progress import Progress


@dataclass(frozen=True)
class Stage:
    """One level of a segment: a schedule bound to a transport.

    Attributes:
        level: ``node``, ``rail`` or ``world``.
        internode_bytes: bytes that this rank sends to other nodes in one run.
        plain_bytes: that it would send there if nothing were coded.
    """

    level: str
    program: Program
    internode_bytes: int
    plain_bytes: int


class Segment(Job):
    """A slice of the buffer on its way through the levels."""

    def __init__(
        self,
        collective: Collective,
        index: int,
        nbytes: int,
        stages: list[Stage],
        stream: Stream | None,
    ) -> None:
        self.priority = 0
        self.nbytes = nbytes
        self.stages = stages
        self._stream = stream
        self._collective = collective
        self._index = index
        self._level = "not started"

    def rewind(self, priority: int) -> None:
        """Be ready for another run."""
        self.priority, self._level = priority, "not started"

    def run(self) -> Iterator[Wait]:
        whole = self._collective
        whole.begun()
        if self._stream is not None:
            yield from self._give(self._stream)
            return
        for stage in self.stages:
            self._level = stage.level
            start = now()
            yield from stage.program.run()
            sent, parent = stage.internode_bytes, whole.number
            whole.recorder.add(WIRE[stage.level], start, now(), sent, whole.bucket, parent)

    def _give(self, stream: Stream) -> Iterator[Wait]:
        """As ``run``, of a region of a device, which does the work and tells the times."""
        whole = self._collective
        for event in whole.after:
            stream.wait(event)
        start = stream.record(timed=True)
        whole.begins.append(start)
        for stage in self.stages:
            self._level = stage.level
            with stream.device.range(f"{whole.label}, {stage.level}"):
                yield from stage.program.run()
            end = stream.record(timed=True)
            sent, parent = stage.internode_bytes, whole.number
            whole.recorder.later.add(WIRE[stage.level], start, end, sent, whole.bucket, parent)
            start = end
        whole.ends.append(start)

    def finished(self) -> None:
        self._collective.segment_finished()

    def settle(self, progress: Progress) -> None:
        """Sleep until the device is done with what codecs work in."""
        coded = any(isinstance(stage.program, CodedProgram) for stage in self.stages)
        if coded and self._stream is not None:
            progress.settle(self._stream.record())

    def place(self) -> Place:
        return Place(self._collective.label, self._collective.runs, self._index, self._level)

    def describe(self) -> str:
        return f"{self._collective.label} segment {self._index} at level {self._level}"


_kept: list[Collective] = []  # of jobs that failed, to the end of the process


class Collective:
    """An allreduce of one region, bound once and run any number of times.

    Attributes:
        label: what it carries, for reports.
        nbytes: size of the region in bytes.
        algorithm: the algorithm that was chosen.
        started_s, finished_s: ``time.perf_counter`` of the last run.
        held: what codecs remember on this rank.
        coded: first elements that go in coded form.
        bucket: index of the bucket that it carries, or -1.
        number: of the last run, in the trace.
        runs: started so far.
        after: events before which no stream of the run may touch the region.
        begins, ends: of what the run gave to streams, a pair each segment.
    """

    def __init__(
        self,
        progress: Progress,
        label: str,
        nbytes: int,
        algorithm: str,
        recorder: Recorder,
        bucket: int = -1,
    ) -> None:
        self.label = label
        self.recorder = recorder
        self.bucket = bucket
        self.number = 0
        self.runs = 0
        self.nbytes = nbytes
        self.algorithm = algorithm
        self.started_s = 0.0
        self.finished_s = 0.0
        self.held: list[Held] = []
        self.coded = 0
        self.after: Sequence[Event] = ()
        self.begins: list[Event] = []
        self.ends: list[Event] = []
        self._progress = progress
        self._segments: list[Segment] = []
        self._open = 0
        self._launched = 0
        self._waits_to_begin = False

    def add_segment(
        self, nbytes: int, stages: Sequence[Stage], stream: Stream | None = None
    ) -> None:
        """Add a slice of the region; ``stream`` does the work on it, if it is a device's."""
        self._segments.append(Segment(self, len(self._segments), nbytes, list(stages), stream))

    @property
    def internode_bytes(self) -> int:
        """Bytes that this rank sends to other nodes in one run."""
        return sum(stage.internode_bytes for each in self._segments for stage in each.stages)

    def plain_bytes(self) -> dict[str, int]:
        """Bytes that this rank would send to other nodes in a run without coding, by level."""
        found: dict[str, int] = {}
        for segment in self._segments:
            for stage in segment.stages:
                found[stage.level] = found.get(stage.level, 0) + stage.plain_bytes
        return found

    def keepers(self) -> list[Keeper]:
        """What this rank keeps of the coded elements, from the next run on."""
        programs = [stage.program for each in self._segments for stage in each.stages]
        return [
            keeper
            for program in programs
            if isinstance(program, CodedProgram)
            for keeper in program.keepers()
        ]

    def start(self, priority: int = 0, after: Sequence[Event] = ()) -> None:
        """Begin a run; lower priorities go first. The region must not be touched until it ends.

        Every rank must start the same collectives, in any order.

        Args:
            after: events at which the region of a device holds what is to be added.
        """
        assert self._open == 0, f"{self.label} is already running"
        self._open = len(self._segments)
        self._launched = now()
        self.started_s = self._launched / 1e9
        self.number = self.recorder.number()
        self.runs += 1
        self._waits_to_begin = True
        self.after, self.begins, self.ends = after, [], []
        for segment in self._segments:
            segment.rewind(priority)
        self._progress.submit(list(self._segments))

    @property
    def done(self) -> bool:
        """True when no run is under way."""
        return self._open == 0

    def wait(self) -> None:
        """Sleep until the run has ended: until all is given to the streams, on a device; see
        ``join``.

        Raises:
            CollectiveTimeout: no collective of this rank moved for ``comm.timeout_s`` seconds.
        """
        if self._open:
            self._progress.wait_until(lambda: self._open == 0)

    def join(self, stream: Stream) -> None:
        """After ``wait``: what is given to ``stream`` from now on finds the sums in the region."""
        for event in self.ends:
            stream.wait(event)

    def begun(self) -> None:
        """Called when a segment begins, as ``segment_finished``."""
        if self._waits_to_begin:
            self._waits_to_begin = False
            self.recorder.add(QUEUED, self._launched, now(), 0, self.bucket, self.number)

    def segment_finished(self) -> None:
        """Called at the end of each segment, by the thread that did the round."""
        if self._open == 1:
            ended = now()
            self.finished_s = ended / 1e9
            if self.ends:
                first, last = Earliest(self.begins), Latest(self.ends)
                add, number = self.recorder.later.add, self.number
                add(BUCKET, first, last, self.nbytes, self.bucket, number=number)
            else:
                self.recorder.add(
                    BUCKET, self._launched, ended, self.nbytes, self.bucket, number=self.number
                )
        self._open -= 1

    def close(self) -> None:
        """Free requests and communicators; the collective cannot run again.

        After an error all stays as it is: a device may wait for a rank that is gone.
        """
        if self._progress.failed:
            _kept.append(self)
            return
        for segment in self._segments:
            segment.settle(self._progress)
            for stage in segment.stages:
                stage.program.close()
        self._segments = []
