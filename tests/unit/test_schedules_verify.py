"""Every schedule is proved; every broken one is caught, and the place is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcsync.schedules import NAMES, Action, Kind, Schedule, Step, Transfer, build, everyone
from hpcsync.schedules import verify as verify_module
from hpcsync.schedules.hierarchical import compose, flatten
from hpcsync.schedules.verify import VerifyError, verify

ALGORITHMS = tuple(name for name in NAMES if name != "native")
REDUCING = (Kind.ALLREDUCE, Kind.REDUCE_SCATTER)
Nodes = tuple[tuple[int, ...], ...]


def proved(name: str, kind: Kind, size: int) -> None:
    # A generator: of 1,024 ranks' schedules only one is alive at a time.
    verify(build(name, kind, rank, size) for rank in range(size))


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("name", NAMES)
def test_1_to_64_ranks(name: str, kind: Kind) -> None:
    for size in range(1, 65):
        proved(name, kind, size)


@pytest.mark.parametrize("size", [512, 1024])
@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("name", NAMES)
def test_512_and_1024_ranks(name: str, kind: Kind, size: int) -> None:
    proved(name, kind, size)


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("name", ["halving", "doubling"])
def test_large_counts_that_are_no_power_of_two(name: str, kind: Kind) -> None:
    proved(name, kind, 1023)


def test_direct_with_any_number_of_owners() -> None:
    for size in range(1, 13):
        for owners in range(1, size + 1):
            for kind in Kind:
                verify(everyone("direct", kind, size, owners))


def test_blocks_of_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "_BLOCK_BYTES", 8 * 70 * 2 * 9)
    for name in ALGORITHMS:
        for kind in Kind:
            proved(name, kind, 70)
    with pytest.raises(VerifyError) as caught:
        verify(mutated("ring", Kind.ALLREDUCE, 70, 33, 40, lambda s: replace(s, action=COPY)))
    assert caught.value.chunk is not None


def blocks(*sizes: int) -> Nodes:
    """Nodes of these sizes, ranks in order."""
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return tuple(
        tuple(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)
    )


def flat(nodes: Nodes, kind: Kind, **names: str) -> Iterator[Schedule]:
    return (flatten(nodes, rank, kind, **names) for rank in range(sum(map(len, nodes))))


EVEN = [blocks(1), blocks(3), blocks(1, 1, 1), blocks(2, 2), blocks(3, 3, 3), blocks(4, 4, 4, 4, 4)]
UNEVEN = [
    blocks(2, 1),
    blocks(3, 1, 2),
    blocks(4, 4, 3),
    blocks(5, 2, 7, 2, 3),
    ((0, 2, 4), (1, 3)),
    ((0, 5), (1, 2), (3, 4)),
]


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("rail", ALGORITHMS)
@pytest.mark.parametrize("node", ALGORITHMS)
def test_even_hierarchies(node: str, rail: str, kind: Kind) -> None:
    for nodes in [*EVEN, ((0, 2, 4), (1, 3, 5))]:
        verify(flat(nodes, kind, node=node, rail=rail))


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("rail", ALGORITHMS)
def test_uneven_hierarchies(rail: str, kind: Kind) -> None:
    for nodes in UNEVEN:
        verify(flat(nodes, kind, rail=rail))


@pytest.mark.parametrize("rail", ALGORITHMS)
def test_hierarchies_of_512_ranks(rail: str) -> None:
    verify(flat(blocks(*[8] * 64), Kind.ALLREDUCE, rail=rail))
    verify(flat(blocks(*[7, 8, 9] * 21, 8), Kind.ALLREDUCE, rail=rail))


@pytest.mark.parametrize("kind", Kind)
def test_hierarchies_of_1024_ranks(kind: Kind) -> None:
    verify(flat(blocks(*[8] * 128), kind, rail="halving"))
    verify(flat(blocks(*[7, 9] * 64), kind, rail="doubling"))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.sampled_from(ALGORITHMS), st.data())
def test_any_placement(sizes: list[int], rail: str, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(sum(sizes))))
    nodes = tuple(tuple(sorted(order[i] for i in block)) for block in blocks(*sizes))
    verify(flat(nodes, data.draw(st.sampled_from(list(Kind))), rail=rail))


def test_levels_of_a_hierarchy() -> None:
    nodes = blocks(3, 2)
    levels = compose(nodes, 1, rail="ring")
    assert [level.name for level in levels] == ["node", "rail", "node"]
    assert [level.group for level in levels] == [(0, 1, 2), (1, 4), (0, 1, 2)]
    assert [level.schedule.kind for level in levels] == [
        Kind.REDUCE_SCATTER,
        Kind.ALLREDUCE,
        Kind.ALLGATHER,
    ]
    assert [level.name for level in compose(nodes, 2)] == ["node", "node"], "no shard, no rail"
    assert [level.name for level in compose(blocks(1, 1), 0, rail="native")] == ["rail"]
    assert compose(blocks(1), 0) == ()


def test_hierarchies_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"nodes of \[2, 3\] ranks need the direct algorithm"):
        compose(blocks(3, 2), 0, node="ring")
    with pytest.raises(ValueError, match="do not hold each rank once"):
        compose(((0, 1), (1, 2)), 0)
    with pytest.raises(ValueError, match="rank 4 is on none"):
        compose(blocks(2, 2), 4)
    with pytest.raises(ValueError, match="no steps to flatten"):
        flatten(blocks(2, 2), 0, rail="native")


COPY, REDUCE = Action.COPY, Action.REDUCE
Change = Callable[[Step], Step | None]


def mutated(name: str, kind: Kind, size: int, rank: int, at: int, change: Change) -> list[Schedule]:
    """The group with one step of one rank changed, or dropped where `change` gives None."""
    group = list(everyone(name, kind, size))
    steps = list(group[rank].steps)
    new = change(steps[at])
    steps[at : at + 1] = [] if new is None else [new]
    group[rank] = replace(group[rank], steps=tuple(steps))
    return group


def each_step(size: int, kind: Kind) -> Iterator[tuple[str, int, int, Step]]:
    for name in ALGORITHMS:
        for schedule in everyone(name, kind, size):
            for at, step in enumerate(schedule.steps):
                yield name, schedule.rank, at, step


def caught(group: list[Schedule]) -> VerifyError:
    with pytest.raises(VerifyError) as info:
        verify(group)
    error = info.value
    assert error.rank is not None or error.chunk is not None
    if error.rank is not None:
        assert f"rank {error.rank}" in str(error)
    return error


@pytest.mark.parametrize("size", [2, 3, 4, 6, 7])
@pytest.mark.parametrize("kind", Kind)
def test_dropped_step(kind: Kind, size: int) -> None:
    for name, rank, at, _ in each_step(size, kind):
        caught(mutated(name, kind, size, rank, at, lambda step: None))


@pytest.mark.parametrize("kind", Kind)
def test_swapped_peer(kind: Kind) -> None:
    size = 6
    for name, rank, at, step in each_step(size, kind):
        for side in ("sends", "recvs"):
            for index, one in enumerate(getattr(step, side)):
                peer = next(p for p in range(size - 1, -1, -1) if p not in (rank, one.peer))
                swapped = list(getattr(step, side))
                swapped[index] = replace(one, peer=peer)
                swapped.sort(key=lambda one: one.peer)
                new = replace(step, **{side: tuple(swapped)})
                error = caught(mutated(name, kind, size, rank, at, lambda _, new=new: new))
                assert error.rank in (rank, peer, one.peer)
                assert error.step is not None


@pytest.mark.parametrize("kind", Kind)
def test_wrong_chunk(kind: Kind) -> None:
    for name, rank, at, step in each_step(6, kind):
        if not step.sends or (one := step.sends[0]).lo == 0:
            continue
        sends = (replace(one, lo=one.lo - 1, hi=one.hi - 1), *step.sends[1:])
        new = replace(step, sends=sends)
        error = caught(mutated(name, kind, 6, rank, at, lambda _, new=new: new))
        assert "meets" in str(error)
        assert error.rank == one.peer


@pytest.mark.parametrize("kind", Kind)
def test_wrong_action(kind: Kind) -> None:
    for name, rank, at, step in each_step(6, kind):
        if step.recvs:
            other = COPY if step.action is REDUCE else REDUCE
            new = replace(step, action=other)
            caught(mutated(name, kind, 6, rank, at, lambda _, new=new: new))


@pytest.mark.parametrize("kind", REDUCING)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_duplicated_reduce(name: str, kind: Kind) -> None:
    """All ranks do their first step twice: every message is matched, and added twice."""
    group = [replace(one, steps=one.steps[:1] + one.steps) for one in everyone(name, kind, 8)]
    error = caught(group)
    assert "the share of rank" in str(error)
    assert "is added twice" in str(error)
    assert error.step is not None
    assert error.chunk is not None


def test_reordered_until_rendezvous_deadlocks() -> None:
    """Send, then receive: a ring of blocking sends only works while they are buffered."""
    group = [
        replace(one, steps=tuple(half for step in one.steps for half in halves(step)))
        for one in everyone("ring", Kind.ALLREDUCE, 5)
    ]
    error = caught(group)
    assert str(error) == (
        "rank 0, step 0: deadlock: waits for rank 1 in step 0 which waits for rank 2 in step 0 "
        "which waits for rank 3 in step 0 which waits for rank 4 in step 0 which waits for "
        "rank 0 in step 0"
    )


def test_odd_ranks_receive_first_and_nothing_deadlocks() -> None:
    group = [
        replace(
            one,
            steps=tuple(
                half
                for step in one.steps
                for half in (reversed(halves(step)) if one.rank % 2 else halves(step))
            ),
        )
        for one in everyone("ring", Kind.ALLGATHER, 6)
    ]
    verify(group)


def halves(step: Step) -> list[Step]:
    return [Step(step.sends, (), step.action), Step((), step.recvs, step.action)]


def test_steps_in_another_order() -> None:
    """Two ranks that swap two steps with different peers deadlock or mismatch."""
    for name in ("halving", "doubling"):
        group = list(everyone(name, Kind.ALLREDUCE, 4))
        for rank in (0, 3):
            first, second, *rest = group[rank].steps
            group[rank] = replace(group[rank], steps=(second, first, *rest))
        assert "deadlock" in str(caught(group))


def pair(*steps: tuple[Step, Step], kind: Kind = Kind.ALLREDUCE, chunks: int = 2) -> list[Schedule]:
    """Two ranks that run these steps."""
    owned = [(0, chunks), (0, chunks)] if kind is Kind.ALLREDUCE else [(0, 1), (1, chunks)]
    return [
        Schedule("made up", kind, rank, 2, chunks, tuple(step[rank] for step in steps), owned[rank])
        for rank in (0, 1)
    ]


def to(peer: int, lo: int, hi: int) -> tuple[Transfer, ...]:
    return (Transfer(peer, lo, hi),)


def exchange(action: Action, lo: int = 0, hi: int = 2) -> tuple[Step, Step]:
    return tuple(  # type: ignore[return-value]
        Step(to(peer, lo, hi), to(peer, lo, hi), action) for peer in (1, 0)
    )


def test_sound_by_hand() -> None:
    verify(pair(exchange(REDUCE)))
    verify(pair(exchange(REDUCE, 0, 1), exchange(REDUCE, 1, 2)))


def test_share_missing() -> None:
    error = caught(pair(exchange(REDUCE, 0, 1)))
    assert str(error) == "rank 0, chunk 1: ends without the share of rank 1"


def test_copy_onto_what_is_sent() -> None:
    error = caught(pair(exchange(COPY)))
    assert str(error) == "rank 0, step 0, chunk 0: is copied over while it is sent"


def test_nothing_to_give() -> None:
    steps = (Step(to(1, 1, 2), (), COPY), Step((), to(0, 1, 2), COPY))
    error = caught(pair(steps, kind=Kind.ALLGATHER))
    assert str(error) == "rank 1, step 0, chunk 1: rank 0 has nothing to give"


def test_allgather_left_incomplete() -> None:
    steps = (Step(to(1, 0, 1), (), COPY), Step((), to(0, 0, 1), COPY))
    assert str(caught(pair(steps, kind=Kind.ALLGATHER))) == "rank 0, chunk 1: is missing"


def test_receives_that_overlap() -> None:
    sends = (Transfer(1, 0, 2), Transfer(1, 1, 2))
    recvs = (Transfer(0, 0, 2), Transfer(0, 1, 2))
    group = pair((Step(sends, (), REDUCE), Step((), recvs, REDUCE)))
    assert str(caught(group)) == "rank 1, step 0, chunk 1: receives of chunks 0:2 and 1:2 overlap"


def test_two_copies_of_a_chunk() -> None:
    twice = (Transfer(1, 0, 1), Transfer(1, 0, 1))
    recvs = (Transfer(0, 0, 1), Transfer(0, 0, 1))
    group = pair((Step(twice, (), COPY), Step((), recvs, COPY)))
    assert "is copied from two ranks in one step" in str(caught(group))


def test_receives_out_of_order() -> None:
    change: Change = lambda step: replace(step, recvs=step.recvs[::-1])  # noqa: E731
    error = caught(mutated("direct", Kind.ALLREDUCE, 4, 2, 0, change))
    assert str(error) == "rank 2, step 0: receives are not in ascending order of peer"


def test_sum_in_another_order() -> None:
    """Right sums with different bits: everyone sends all to all, but rank 2 adds in two steps."""
    whole = {peer: Transfer(peer, 0, 1) for peer in range(3)}

    def others(rank: int) -> tuple[Transfer, ...]:
        return tuple(whole[peer] for peer in range(3) if peer != rank)

    steps = [(Step(others(rank), others(rank), REDUCE),) for rank in range(3)]
    group = [
        Schedule("all to all", Kind.ALLREDUCE, rank, 3, 1, steps[rank], (0, 1)) for rank in range(3)
    ]
    verify(group)
    late = (Step(others(2), (whole[1],), REDUCE), Step((), (whole[0],), REDUCE))
    group[2] = replace(group[2], steps=late)
    assert str(caught(group)) == "rank 2, chunk 0: is added up in another order than on rank 0"


def test_transfers_out_of_range() -> None:
    for bad, problem in (
        (Transfer(4, 0, 1), "has no such peer"),
        (Transfer(-1, 0, 1), "has no such peer"),
        (Transfer(2, 0, 1), "has no such peer"),
        (Transfer(0, 3, 3), "names chunks that are not there"),
        (Transfer(0, 3, 5), "names chunks that are not there"),
        (Transfer(0, -1, 1), "names chunks that are not there"),
    ):
        for side in ("sends", "recvs"):
            change: Change = lambda step, new={side: (bad,)}: replace(step, **new)  # noqa: E731
            error = caught(mutated("direct", Kind.ALLREDUCE, 4, 2, 1, change))
            assert problem in str(error)
            assert (error.rank, error.step) == (2, 1)


def test_ownership() -> None:
    group = list(everyone("ring", Kind.REDUCE_SCATTER, 4))
    for owned, problem in (
        ((0, 1), "chunk 0: is owned by 2 ranks"),
        ((0, 0), "chunk 1: is owned by 0 ranks"),
        ((1, 5), "rank 1: owns chunks 1:5 of 4"),
    ):
        group[1] = replace(group[1], owned=owned)
        assert str(caught(group)) == problem
    group = list(everyone("ring", Kind.ALLREDUCE, 4))
    group[2] = replace(group[2], owned=(2, 3))
    assert str(caught(group)) == "rank 2: does not own every chunk of an allreduce"
    swapped = list(everyone("ring", Kind.REDUCE_SCATTER, 4))
    swapped[0], swapped[1] = (replace(swapped[i], owned=(1 - i, 2 - i)) for i in (0, 1))
    assert "ends without the share of rank" in str(caught(swapped))


def test_schedules_that_are_no_group() -> None:
    group = list(everyone("ring", Kind.ALLREDUCE, 4))
    for wrong, problem in (
        (group[:3], "3 schedules do not make a group"),
        ([], "0 schedules do not make a group"),
        ([group[0], group[2], group[1], group[3]], "rank 1: schedule number 1 is that of rank 2"),
        ([group[0], *everyone("direct", Kind.ALLREDUCE, 4)[1:]], "rank 1: name is direct"),
        ([group[0], *everyone("ring", Kind.ALLGATHER, 4)[1:]], "rank 1: kind is"),
    ):
        with pytest.raises(VerifyError, match=problem):
            verify(wrong)
