"""What transports share: regions, and where in a schedule a mean is divided."""

from __future__ import annotations

import numpy as np
import pytest

from hpcsync import schedules
from hpcsync.device import dtype_of
from hpcsync.schedules import Action, Kind, Schedule
from hpcsync.transports.base import (
    Region,
    chunk_offsets,
    final_sum,
    private_buffer,
    sent_bytes,
)

STEPWISE = ("direct", "ring", "halving", "doubling")
SIZES = (*range(2, 18), 64)


def _summed(schedule: Schedule) -> set[int]:
    """The chunks that the dividing step adds up."""
    step = final_sum(schedule)
    if step is None:
        return set()
    moves = schedule.steps[step].recvs
    return {chunk for move in moves for chunk in range(move.lo, move.hi)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", STEPWISE)
def test_a_scattered_sum_is_divided_where_it_is_owned(name: str, size: int) -> None:
    for schedule in schedules.everyone(name, Kind.REDUCE_SCATTER, size):
        assert _summed(schedule) == set(range(*schedule.owned))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", STEPWISE)
def test_after_its_division_a_sum_is_only_copied(name: str, size: int) -> None:
    """No rank adds to, or lacks, what has been divided."""
    everyone = schedules.everyone(name, Kind.ALLREDUCE, size)
    divided = set().union(*map(_summed, everyone))
    assert divided == set(range(everyone[0].chunks))
    for schedule in everyone:
        final = final_sum(schedule)
        first = -1 if final is None else final
        got = _summed(schedule)
        for step in schedule.steps[first + 1 :]:
            assert step.action is Action.COPY or not step.recvs
            if step.action is Action.COPY:
                got |= {chunk for move in step.recvs for chunk in range(move.lo, move.hi)}
        assert got == divided


def test_a_gather_divides_nothing() -> None:
    for name in STEPWISE:
        assert final_sum(schedules.build(name, Kind.ALLGATHER, 0, 4)) is None


def test_regions_are_views() -> None:
    buffer = private_buffer(40)
    region = Region(buffer, 4, 9, dtype_of("float32"))
    region.part(2, 5).array[:] = [1, 2, 3]
    assert region.nbytes == 36
    assert region.part(2, 5).nbytes == 12
    np.testing.assert_array_equal(buffer.own.view(np.float32), [0, 0, 0, 1, 2, 3, 0, 0, 0, 0])
    assert not buffer.shared
    with pytest.raises(TypeError, match="private"):
        region.peer(0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64", "int8"])
def test_chunks_start_on_cache_lines(dtype: str) -> None:
    for count in (0, 1, 63, 64, 65, 1000):
        region = Region(private_buffer(count * 8), 0, count, dtype_of(dtype))
        offsets = chunk_offsets(schedules.build("direct", Kind.ALLREDUCE, 0, 5), region)
        assert (offsets[0], offsets[-1]) == (0, count)
        assert all(one * region.dtype.itemsize % 64 == 0 or one == count for one in offsets)


def test_bytes_to_some_peers() -> None:
    region = Region(private_buffer(4000), 0, 1000, dtype_of("float32"))
    ring = schedules.build("ring", Kind.ALLREDUCE, 1, 4)
    assert sent_bytes(ring, region, []) == 0
    assert sent_bytes(ring, region, [3]) == 0
    assert sent_bytes(ring, region, [2]) == sent_bytes(ring, region, [0, 2, 3])
    direct = schedules.build("direct", Kind.ALLREDUCE, 1, 4)
    assert sent_bytes(direct, region, [0, 2, 3]) > sent_bytes(direct, region, [0, 2]) > 0
