"""A collective in flight: start it, go on computing, wait for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..trace.recorder import BUCKET, QUEUED, WIRE, Recorder, now
from ..transports.base import Program, Wait
from .coding import Held
from .kept import CodedProgram, Keeper
from .progress import Job, Place, Progress


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
        self, collective: Collective, index: int, nbytes: int, stages: list[Stage]
    ) -> None:
        self.priority = 0
        self.nbytes = nbytes
        self.stages = stages
        self._collective = collective
        self._index = index
        self._level = "not started"

    def rewind(self, priority: int) -> None:
        """Be ready for another run."""
        self.priority, self._level = priority, "not started"

    def run(self) -> Iterator[Wait]:
        whole = self._collective
        whole.begun()
        for stage in self.stages:
            self._level = stage.level
            start = now()
            yield from stage.program.run()
            sent, parent = stage.internode_bytes, whole.number
            whole.recorder.add(WIRE[stage.level], start, now(), sent, whole.bucket, parent)

    def finished(self) -> None:
        self._collective.segment_finished()

    def place(self) -> Place:
        return Place(self._collective.label, self._collective.runs, self._index, self._level)

    def describe(self) -> str:
        return f"{self._collective.label} segment {self._index} at level {self._level}"


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
        self._progress = progress
        self._segments: list[Segment] = []
        self._open = 0
        self._launched = 0
        self._waits_to_begin = False

    def add_segment(self, nbytes: int, stages: Sequence[Stage]) -> None:
        self._segments.append(Segment(self, len(self._segments), nbytes, list(stages)))

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

    def start(self, priority: int = 0) -> None:
        """Begin a run; lower priorities go first. The region must not be touched until it ends.

        Every rank must start the same collectives, in any order.
        """
        assert self._open == 0, f"{self.label} is already running"
        self._open = len(self._segments)
        self._launched = now()
        self.started_s = self._launched / 1e9
        self.number = self.recorder.number()
        self.runs += 1
        self._waits_to_begin = True
        for segment in self._segments:
            segment.rewind(priority)
        self._progress.submit(list(self._segments))

    @property
    def done(self) -> bool:
        """True when no run is under way."""
        return self._open == 0

    def wait(self) -> None:
        """Sleep until the run has ended.

        Raises:
            CollectiveTimeout: no collective of this rank moved for ``comm.timeout_s`` seconds.
        """
        if self._open:
            self._progress.wait_until(lambda: self._open == 0)

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
            self.recorder.add(
                BUCKET, self._launched, ended, self.nbytes, self.bucket, number=self.number
            )
        self._open -= 1

    def close(self) -> None:
        """Free requests and communicators; the collective cannot run again."""
        for segment in self._segments:
            for stage in segment.stages:
                stage.program.close()
        self._segments = []
