"""Grouping of ranks into nodes and rails: every rank has one place, whatever the hosts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcsync.errors import LaunchError
from hpcsync.topology import Topology

HOSTS = st.lists(st.sampled_from(["a", "b", "c", "node-1.site"]), min_size=1, max_size=24)


@given(hosts=HOSTS, width=st.integers(0, 5))
def test_every_rank_has_one_place(hosts: list[str], width: int) -> None:
    topology = Topology.group(hosts, width)
    assert topology.size == len(hosts)
    assert sorted(rank for ranks in topology.nodes for rank in ranks) == list(range(len(hosts)))
    assert len(topology.names) == len(set(topology.names)) == topology.node_count
    for node, ranks in enumerate(topology.nodes):
        assert list(ranks) == sorted(ranks)
        for local, rank in enumerate(ranks):
            assert topology.node_of(rank) == node
            assert topology.local_rank(rank) == local
            assert topology.local_size(rank) == len(ranks)
            assert topology.node(rank) == ranks


@given(hosts=HOSTS, width=st.integers(0, 5))
def test_nodes_stay_on_one_host_and_stand_by_their_lowest_rank(
    hosts: list[str], width: int
) -> None:
    topology = Topology.group(hosts, width)
    for ranks in topology.nodes:
        assert len({hosts[rank] for rank in ranks}) == 1
        assert not width or len(ranks) <= width
    assert [ranks[0] for ranks in topology.nodes] == sorted(ranks[0] for ranks in topology.nodes)
    if not width:
        assert topology.node_count == len(set(hosts))


@given(hosts=HOSTS, width=st.integers(0, 5))
def test_rails_take_one_rank_of_each_node(hosts: list[str], width: int) -> None:
    topology = Topology.group(hosts, width)
    assert topology.rails == min(len(ranks) for ranks in topology.nodes)
    assert topology.uniform == (topology.rails * topology.node_count == topology.size)
    for rank in range(topology.size):
        rail = topology.rail(rank)
        if topology.local_rank(rank) >= topology.rails:
            assert rail == ()
            continue
        assert rank in rail
        assert [topology.node_of(other) for other in rail] == list(range(topology.node_count))
        assert {topology.local_rank(other) for other in rail} == {topology.local_rank(rank)}


def test_hosts_may_take_turns() -> None:
    topology = Topology.group(["a", "b", "b", "a"])
    assert topology.nodes == ((0, 3), (1, 2))
    assert topology.names == ("a", "b")
    assert topology.rail(3) == topology.rail(2) == (3, 2)


def test_pretended_nodes_are_cut_in_rank_order_and_named_apart() -> None:
    topology = Topology.group(["a"] * 4, 3)
    assert topology.nodes == ((0, 1, 2), (3,))
    assert topology.names == ("a/0", "a/1")
    assert topology.rail(0) == (0, 3)
    assert topology.rail(2) == ()
    assert topology.describe() == "4 ranks on 2 nodes (1 x 1 + 1 x 3)"


def test_a_pretended_node_as_wide_as_the_host_is_the_host() -> None:
    for width in (4, 9):
        topology = Topology.group(["a"] * 4, width)
        assert topology.nodes == ((0, 1, 2, 3),)
        assert topology.names == ("a",)


def test_description_counts_alike_nodes() -> None:
    assert Topology.group(["a"]).describe() == "1 rank on 1 node (1 x 1)"
    assert Topology.group(["a", "a", "b", "b"]).describe() == "4 ranks on 2 nodes (2 x 2)"


def test_no_ranks_and_negative_nodes_are_refused() -> None:
    with pytest.raises(LaunchError, match="no ranks"):
        Topology.group([])
    with pytest.raises(LaunchError, match=r"topology\.ranks_per_node: -1 is negative; use 0"):
        Topology.group(["a"], -1)
