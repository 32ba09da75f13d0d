"""Schedules run on numbers: a small simulator of ranks against sums in float64."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcsync.schedules import (
    NAMES,
    Action,
    Kind,
    Schedule,
    build,
    chunk_bounds,
    everyone,
)
from hpcsync.schedules.hierarchical import compose, flatten

ALGORITHMS = tuple(name for name in NAMES if name != "native")
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 16, 17)

Buffers = list[np.ndarray]


def simulate(schedules: Sequence[Schedule], buffers: Buffers, seed: int = 0) -> None:
    """Run all ranks in place; `seed` picks which rank gets on next."""
    mail: dict[tuple[int, int], deque[np.ndarray]] = defaultdict(deque)
    running = {
        one.rank: _rank(one, buffer, mail) for one, buffer in zip(schedules, buffers, strict=True)
    }
    chance = random.Random(seed)
    idle = 0
    while running:
        rank = chance.choice(sorted(running))
        moved = next(running[rank], None)
        if moved is None:
            del running[rank]
        idle = 0 if moved or moved is None else idle + 1
        assert idle < 10_000, f"ranks {sorted(running)} wait for ever"
    assert not any(mail.values()), "messages that nobody received"


def _rank(
    schedule: Schedule, buffer: np.ndarray, mail: dict[tuple[int, int], deque[np.ndarray]]
) -> Iterator[bool]:
    """One rank; yields whether it got on."""
    bounds = chunk_bounds(len(buffer), schedule.chunks, align=2)
    me = schedule.rank
    for step in schedule.steps:
        for one in step.sends:
            mail[me, one.peer].append(buffer[bounds[one.lo] : bounds[one.hi]].copy())
        came: list[tuple[int, slice, np.ndarray]] = []
        for one in step.recvs:
            while not mail[one.peer, me]:
                yield False
            part = slice(bounds[one.lo], bounds[one.hi])
            came.append((one.peer, part, mail[one.peer, me].popleft()))
        if step.action is Action.COPY:
            for _, part, values in came:
                buffer[part] = values
        else:
            _add(buffer, me, came)
        yield True


def _add(buffer: np.ndarray, me: int, came: list[tuple[int, slice, np.ndarray]]) -> None:
    terms: dict[tuple[int, int], dict[int, np.ndarray]] = {}
    for peer, part, values in came:
        terms.setdefault((part.start, part.stop), {})[peer] = values
    for (start, stop), by_rank in terms.items():
        by_rank[me] = buffer[start:stop]
        first, *rest = (by_rank[rank] for rank in sorted(by_rank))
        total = first.copy()
        for values in rest:
            total += values
        buffer[start:stop] = total


def random_buffers(size: int, n: int) -> Buffers:
    rng = np.random.default_rng([size, n])
    return [rng.standard_normal(n).astype(np.float32) for _ in range(size)]


def close(got: np.ndarray, inputs: Buffers) -> bool:
    exact = np.sum(inputs, axis=0, dtype=np.float64)
    room = 1e-6 * np.sum(np.abs(inputs), axis=0, dtype=np.float64)
    return bool((np.abs(got - exact) <= room).all())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_allreduce_sums_on_every_rank(name: str, size: int) -> None:
    for n in (1, 5, 64, 101):
        inputs = random_buffers(size, n)
        results = []
        for seed in range(2):
            buffers = [one.copy() for one in inputs]
            simulate(everyone(name, Kind.ALLREDUCE, size), buffers, seed)
            results += buffers
        assert close(results[0], inputs)
        assert all(np.array_equal(one, results[0]) for one in results), "bits differ"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_reduce_scatter_then_allgather_is_the_allreduce(name: str, size: int) -> None:
    inputs = random_buffers(size, 101)
    buffers = [one.copy() for one in inputs]
    scatter = everyone(name, Kind.REDUCE_SCATTER, size)
    gather = everyone(name, Kind.ALLGATHER, size)
    simulate(scatter, buffers)
    for schedule, buffer in zip(scatter, buffers, strict=True):
        bounds = chunk_bounds(len(buffer), schedule.chunks, align=2)
        part = slice(bounds[schedule.owned[0]], bounds[schedule.owned[1]])
        assert close(buffer[part], [one[part] for one in inputs])
        buffer[: part.start] = buffer[part.stop :] = np.nan
    simulate(gather, buffers)
    assert all(close(one, inputs) for one in buffers)
    assert [one.owned for one in scatter] == [one.owned for one in gather]


@pytest.mark.parametrize("owners", [1, 2, 3, 5])
def test_direct_with_fewer_owners(owners: int) -> None:
    inputs = random_buffers(5, 101)
    buffers = [one.copy() for one in inputs]
    for kind in (Kind.REDUCE_SCATTER, Kind.ALLGATHER):
        group = everyone("direct", kind, 5, owners)
        assert [one.chunks for one in group] == [owners] * 5
        assert [one.owned for one in group[owners:]] == [(0, 0)] * (5 - owners)
        simulate(group, buffers)
    assert all(close(one, inputs) for one in buffers)


def test_direct_adds_in_rank_order() -> None:
    inputs = random_buffers(7, 101)
    buffers = [one.copy() for one in inputs]
    simulate(everyone("direct", Kind.ALLREDUCE, 7), buffers)
    total = inputs[0].copy()
    for one in inputs[1:]:
        total += one
    assert np.array_equal(buffers[3], total)


@pytest.mark.parametrize("rail", ALGORITHMS)
@pytest.mark.parametrize(
    "nodes",
    [
        ((0, 1, 2), (3, 4, 5)),
        ((0, 2), (1, 3)),
        ((0, 1, 2), (3, 4), (5, 6, 7, 8)),
        ((0,), (1, 2), (3,)),
        ((0, 1, 2),),
        ((0,), (1,), (2,)),
    ],
)
def test_hierarchical_sums(nodes: tuple[tuple[int, ...], ...], rail: str) -> None:
    size = sum(map(len, nodes))
    inputs = random_buffers(size, 101)
    buffers = [one.copy() for one in inputs]
    simulate([flatten(nodes, rank, rail=rail) for rank in range(size)], buffers)
    assert close(buffers[0], inputs)
    assert all(np.array_equal(one, buffers[0]) for one in buffers)


def test_levels_run_one_after_the_other_sum_too() -> None:
    """As an executor runs them: each level on what the level before left to the rank."""
    nodes = ((0, 1, 2), (3, 4), (5, 6, 7))
    inputs = random_buffers(8, 101)
    buffers = [one.copy() for one in inputs]
    levels = [compose(nodes, rank, rail="halving") for rank in range(8)]
    for part in ("reduce_scatter", "allreduce", "allgather"):
        groups: dict[tuple[int, ...], dict[int, tuple[Schedule, np.ndarray]]] = {}
        for rank, mine in enumerate(levels):
            for level in mine:
                if level.schedule.kind.value == part:
                    view = buffers[rank]
                    if level.name == "rail":
                        node = mine[0].schedule
                        bounds = chunk_bounds(len(view), node.chunks, align=2)
                        view = view[bounds[node.owned[0]] : bounds[node.owned[1]]]
                    groups.setdefault(level.group, {})[rank] = (level.schedule, view)
        for group, members in groups.items():
            schedules, views = zip(*(members[rank] for rank in group), strict=True)
            simulate(schedules, list(views))
    assert all(close(one, inputs) for one in buffers)
    assert all(np.array_equal(one, buffers[0]) for one in buffers)


@pytest.mark.parametrize("kind", Kind)
def test_message_counts_are_those_of_the_papers(kind: Kind) -> None:
    one_way = 2 if kind is Kind.ALLREDUCE else 1
    assert len(build("ring", kind, 3, 12).steps) == 11 * one_way
    assert len(build("direct", kind, 3, 12).steps) == one_way
    assert len(build("halving", kind, 3, 16).steps) == 4 * one_way
    assert len(build("doubling", kind, 3, 16).steps) == 4
    assert len(build("doubling", kind, 11, 12).steps) == (3 if kind is Kind.ALLREDUCE else 4)
    assert build("native", kind, 3, 12).steps == ()


def test_rank_owns_its_chunk_where_the_algorithm_allows() -> None:
    for name in ("direct", "ring", "doubling", "native"):
        assert build(name, Kind.REDUCE_SCATTER, 4, 6).owned == (4, 5)
    assert [build("halving", Kind.ALLGATHER, rank, 6).owned for rank in range(6)] == [
        (0, 1),
        (0, 0),
        (2, 3),
        (0, 0),
        (1, 2),
        (3, 4),
    ]


def test_direct_starts_at_different_peers() -> None:
    for kind, owners in ((Kind.ALLREDUCE, None), (Kind.REDUCE_SCATTER, 2)):
        firsts = [one.steps[0].sends[0].peer for one in everyone("direct", kind, 6, owners)]
        assert max(firsts.count(peer) for peer in firsts) <= (1 if owners is None else 3)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="no algorithm 'rign'; there are direct, ring"):
        build("rign", Kind.ALLREDUCE, 0, 2)
    with pytest.raises(ValueError, match="rank 2 is not in a group of 2"):
        build("ring", Kind.ALLREDUCE, 2, 2)
    with pytest.raises(ValueError, match="ring cannot leave 4 ranks with 2 owners"):
        build("ring", Kind.ALLREDUCE, 0, 4, 2)
    with pytest.raises(ValueError, match="5 owners in a group of 4"):
        everyone("direct", Kind.ALLREDUCE, 4, 5)


def test_everyone_builds_on_demand() -> None:
    group = everyone("halving", Kind.ALLREDUCE, 100_000)
    assert len(group) == 100_000
    small = everyone("ring", Kind.ALLREDUCE, 4)
    assert small[2] is small[2] is small[-2]
    assert [one.rank for one in small[1:3]] == [1, 2]
    with pytest.raises(IndexError):
        small[4]


@given(st.integers(0, 10**12), st.integers(1, 300), st.integers(1, 64))
def test_chunk_bounds(n: int, chunks: int, align: int) -> None:
    bounds = chunk_bounds(n, chunks, align)
    assert len(bounds) == chunks + 1
    assert (bounds[0], bounds[-1]) == (0, n)
    assert bounds == sorted(bounds)
    assert all(bound % align == 0 or bound == n for bound in bounds)
    blocks = [-(-b // align) - -(-a // align) for a, b in pairwise(bounds)]
    assert max(blocks) - min(blocks) <= 1


@pytest.mark.parametrize(("n", "chunks", "align"), [(-1, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_chunk_bounds_refuses(n: int, chunks: int, align: int) -> None:
    with pytest.raises(ValueError, match="cannot cut"):
        chunk_bounds(n, chunks, align)


def test_planning_needs_no_numpy() -> None:
    code = (
        "import sys, hpcsync.schedules.hierarchical, hpcsync.schedules.cost;"
        "sys.exit(any(name in sys.modules for name in ('numpy', 'torch', 'mpi4py')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
