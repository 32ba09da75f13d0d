"""Closed forms against walks over the steps."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcsync.schedules import NAMES, Kind, Link, build, choose, cost, everyone
from hpcsync.schedules.cost import walk
from hpcsync.schedules.hierarchical import flatten

ALGORITHMS = tuple(name for name in NAMES if name != "native")
ETHERNET = Link(50e-6, 8e-9, 0.1e-9)


@pytest.mark.parametrize("size", [*range(1, 34), 64])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_closed_forms_are_what_the_steps_cost(name: str, size: int) -> None:
    for kind in Kind:
        group = everyone(name, kind, size)
        formula = cost(name, 1e6, size, ETHERNET, kind)
        assert walk(group, 1e6, ETHERNET) == pytest.approx(formula)
        assert max(cost(one, 1e6, size, ETHERNET) for one in group) == pytest.approx(formula)


@given(
    st.sampled_from(ALGORITHMS),
    st.sampled_from(list(Kind)),
    st.integers(1, 12),
    st.floats(0, 1e9),
    st.tuples(st.floats(0, 1e-3), st.floats(0, 1e-6), st.floats(0, 1e-6)),
)
def test_closed_forms_for_any_link(
    name: str, kind: Kind, size: int, nbytes: float, times: tuple[float, float, float]
) -> None:
    link = Link(*times)
    walked = walk(everyone(name, kind, size), nbytes, link)
    assert walked == pytest.approx(cost(name, nbytes, size, link, kind), rel=1e-9, abs=1e-30)


def test_textbook_values() -> None:
    link, n, p = Link(2.0, 3.0, 5.0), 80.0, 8
    share = 7 / 8 * n
    assert cost("ring", n, p, link) == 2 * 7 * 2 + 2 * share * 3 + share * 5
    assert cost("direct", n, p, link) == cost("ring", n, p, link)
    assert cost("halving", n, p, link) == 2 * 3 * 2 + 2 * share * 3 + share * 5
    assert cost("doubling", n, p, link) == 3 * (2 + n * 3 + n * 5)
    assert cost("doubling", n, p, link, Kind.ALLGATHER) == 3 * 2 + share * 3
    assert cost("native", n, p, link) == cost("halving", n, p, link)


def test_hierarchy_costs_the_sum_of_its_levels() -> None:
    g, n = 4, 1e6
    for count in (2, 3, 5, 8):
        nodes = [tuple(range(i * g, (i + 1) * g)) for i in range(count)]
        for rail in ALGORITHMS:
            group = [flatten(nodes, rank, rail=rail) for rank in range(g * count)]
            levels = cost("direct", n, g, ETHERNET) + cost(rail, n / g, count, ETHERNET)
            assert walk(group, n, ETHERNET) == pytest.approx(levels)


def test_choice() -> None:
    assert choose(64, 64, ETHERNET) == "doubling"
    assert choose(1e8, 64, ETHERNET) == "halving"
    assert choose(1e8, 7, ETHERNET) == "direct"
    assert choose(1e8, 2, ETHERNET) == "direct"
    assert choose(1e8, 7, ETHERNET, Kind.ALLGATHER) == "doubling"
    for size in (1, 2, 3, 16):
        best = choose(1e5, size, ETHERNET)
        assert cost(best, 1e5, size, ETHERNET) == cost("native", 1e5, size, ETHERNET)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="no cost of algorithm 'tree'"):
        cost("tree", 1, 2, ETHERNET)
    with pytest.raises(ValueError, match="a group of 0 ranks"):
        cost("ring", 1, 0, ETHERNET)
    with pytest.raises(ValueError, match="of 4 ranks is not one of 5"):
        cost(build("ring", Kind.ALLREDUCE, 0, 4), 1, 5, ETHERNET)
    assert math.isclose(cost("ring", 0, 1, ETHERNET), 0.0)
