"""Exchanges over shared device memory come in order though nobody waits for them, on the double."""

from __future__ import annotations

import time

import numpy as np
import pytest

from hpcsync.device import dtype_of
from hpcsync.schedules import Kind
from hpcsync.transports import cuda_ipc
from hpcsync.transports.base import Region
from tests.double.shared import Array, Rank, job, total, values

Turn = tuple[int, Region, Array]


def check(size: int, found: list[Turn]) -> None:
    """What each turn left in its region is the sum of what the ranks brought to it."""
    for turn, region, pinned in found:
        assert region.stream is not None
        region.stream.synchronize()
        np.testing.assert_array_equal(pinned, total(size, region.count, turn), f"turn {turn}")


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("one_shot", [0, cuda_ipc.ONE_SHOT])
@pytest.mark.parametrize("name", ["direct", "ring", "doubling"])
def test_runs_that_nobody_waits_for(name: str, one_shot: int, seed: int) -> None:
    """The hosts go on at once: only streams wait, for one another."""
    size, count, runs = 3, 1024, 6

    def work(rank: Rank) -> None:
        regions = [rank.region(count, dtype_of("float32")) for _ in range(2)]
        programs = [rank.bind(name, Kind.ALLREDUCE, region, divisor=2) for region in regions]
        found: list[tuple[int, int, Array]] = []
        for run in range(runs):
            for index, (region, program) in enumerate(zip(regions, programs, strict=True)):
                rank.put(region, values(rank.rank, count, 10 * run + index))
                rank.drive(program)
                found.append((run, index, rank.copied(region)))
                rank.join(region)
        for region in regions:
            assert region.stream is not None
            region.stream.synchronize()
        for run, index, pinned in found:
            wanted = total(size, count, 10 * run + index) / 2
            np.testing.assert_array_equal(pinned, wanted, f"run {run} of region {index}")

    job(size, work, seed=(name, one_shot, seed), one_shot=one_shot)


@pytest.mark.parametrize("seed", range(12))
def test_room_for_copies_goes_from_program_to_program(seed: int) -> None:
    """A new program writes where peers may still read what the one before has left there: no
    other order is between the two, whose elements and streams are their own."""
    size, count, turns = 3, 512, 8

    def work(rank: Rank) -> None:
        buffer = rank.transport.allocate(turns * count * 4, 8)
        streams = [rank.device.new_stream(f"turns {index}") for index in range(3)]
        found: list[Turn] = []
        for turn in range(turns):
            stream = streams[turn % 3]
            region = Region(buffer, turn * count * 4, count, dtype_of("float32"), stream=stream)
            program = rank.bind("direct", Kind.ALLREDUCE, region)
            rank.device.write(region.array, values(rank.rank, count, turn), stream)
            rank.drive(program)
            program.close()
            found.append((turn, region, rank.copied(region)))
        check(size, found)

    job(size, work, seed=seed, one_shot=cuda_ipc.ONE_SHOT)


@pytest.mark.parametrize("seed", range(12))
def test_counters_go_from_program_to_program(seed: int) -> None:
    """Who looks late sees the counters, and the event, of the next program already."""
    size, turns = 3, 12

    def work(rank: Rank) -> None:
        buffer = rank.transport.allocate(turns * 4096, 8)
        late = np.random.default_rng([seed, rank.rank])
        streams = [rank.device.new_stream(f"turns {index}") for index in range(3)]
        found: list[Turn] = []
        for turn in range(turns):
            stream, count = streams[turn % 3], 64 * (turn + 1)
            region = Region(buffer, turn * 4096, count, dtype_of("float32"), stream=stream)
            program = rank.bind("direct", Kind.ALLREDUCE, region)
            rank.device.write(region.array, values(rank.rank, count, turn), stream)
            for wait in program.run():
                time.sleep(late.choice([0, 0, 2e-3]))
                rank.until(wait)
            program.close()
            found.append((turn, region, rank.copied(region)))
        check(size, found)

    job(size, work, seed=seed, one_shot=cuda_ipc.ONE_SHOT)


@pytest.mark.parametrize("line_too", [True, False])
def test_what_a_program_held_stays_in_order_if_it_never_ran(line_too: bool) -> None:
    """The program before is late on one rank; that in between is closed before it has run. It had
    the line of counters of the one before, too, or only its room for copies."""
    size, count = 2, 512

    def work(rank: Rank) -> None:
        buffer = rank.transport.allocate(4 * count * 4, 8)
        found: list[Turn] = []
        for turn in range(3):
            stream = rank.device.new_stream(f"turn {turn}")
            if turn == 1 and not line_too:
                other = Region(buffer, 3 * count * 4, 64, dtype_of("float32"), stream=stream)
                rank.bind("direct", Kind.ALLREDUCE, other)
            region = Region(buffer, turn * count * 4, count, dtype_of("float32"), stream=stream)
            program = rank.bind("direct", Kind.ALLREDUCE, region)
            if turn != 1:
                rank.device.write(region.array, values(rank.rank, count, turn), stream)
                for wait in program.run():
                    rank.until(wait)
                    if turn == 0 and rank.rank == 1:
                        stream.give(lambda: time.sleep(0.3))
                found.append((turn, region, rank.copied(region)))
            program.close()
        check(size, found)

    job(size, work, one_shot=cuda_ipc.ONE_SHOT)
