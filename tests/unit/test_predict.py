"""Predictions of a step: what must hold of them whatever the machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcsync.collectives.candidates import candidates, predict_all, shortlist, uncoded
from hpcsync.collectives.costs import Choice, CodecCost, Layout, LinkCost, Load, Measured, Profile
from hpcsync.collectives.pipeline import Arrival, Stage, simulate
from hpcsync.collectives.predict import algorithm_terms, fit_link, predict
from hpcsync.config import CommConfig
from hpcsync.topology import Topology

MIB = 1 << 20
NONE = Choice("none", "auto", 25.0)
BF16 = Choice("bf16", "auto", 25.0)
INT8 = Choice("int8", "auto", 25.0)
SHARED = Choice("int8_shared", "auto", 25.0)
CODECS = {
    "bf16": CodecCost(2.0, 1e-9, 5e-10, 6e-10, 2e-9),
    "int8": CodecCost(1.02, 2e-9, 5e-10, 6e-10, 3e-9, segment_bytes=4.0 * MIB),
    "int8_shared": CodecCost(2.1, 2e-9, 1e-9, 0.0, 0.0, rounds=2),
}


def machine(rate: float, delay: float = 1.0, cpu_s: float = 2e-10) -> Measured:
    """A link of ``rate`` bytes a second."""
    return Measured(LinkCost(60e-6, 1 / rate, cpu_s, 3e-5), CODECS, 4e-10, delay)


def model(mib: float, buckets: int = 8) -> list[Load]:
    return [Load(int(mib * MIB / 4 / buckets), 4096) for _ in range(buckets)]


def test_a_pipeline_of_one_stage_takes_the_sum_of_its_segments() -> None:
    arrivals = [Arrival(0.0, (Stage(0.0, 0.5),), 4)]
    outcome = simulate(arrivals, 1.0, 0.0, 1.0)
    assert outcome.end_s == pytest.approx(2.0)
    assert outcome.backward_s == pytest.approx(1.0)
    assert outcome.wire_s == pytest.approx(2.0)


def test_stages_on_wire_and_processor_go_on_side_by_side() -> None:
    arrivals = [Arrival(0.0, (Stage(1.0), Stage(0.0, 1.0)), 3)]
    assert simulate(arrivals, 0.0, 0.0, 1.0).end_s == pytest.approx(4.0)


def test_latency_does_not_take_the_wire() -> None:
    arrivals = [Arrival(0.0, (Stage(0.0, 1.0, 5.0),), 3)]
    outcome = simulate(arrivals, 0.0, 0.0, 1.0)
    assert outcome.end_s == pytest.approx(8.0)
    assert outcome.wire_s == pytest.approx(3.0)


def test_processor_time_puts_the_backward_pass_and_what_it_brings_off() -> None:
    arrivals = [Arrival(0.1, (Stage(0.2),), 1), Arrival(1.0, (Stage(0.2),), 1)]
    outcome = simulate(arrivals, 1.0, 1.0, 1.0)
    assert outcome.backward_s == pytest.approx(1.2)
    assert outcome.end_s == pytest.approx(1.4)
    spare = simulate(arrivals, 1.0, 0.0, 1.0)
    assert spare.end_s == pytest.approx(1.2)


def test_nothing_to_exchange_ends_with_the_backward_pass() -> None:
    assert simulate([], 0.7, 1.0, 1.0).end_s == pytest.approx(0.7)


def test_all_algorithms_of_two_ranks_move_the_buffer_once() -> None:
    for name in ("direct", "ring", "halving", "doubling", "auto", "native"):
        assert algorithm_terms(name, MIB, 2)[1] == pytest.approx(1.0)
    assert algorithm_terms("ring", MIB, 1) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_wire_is_busy_for_the_bytes_that_the_exchange_sends(ranks: int) -> None:
    rate = 1e8
    loads = [Load(4 * MIB)]
    layout = Layout(nodes=ranks)
    profile = Profile(0.0)
    share = 2 * (ranks - 1) / ranks
    plain = predict(Choice("none", "ring", 25.0), machine(rate), loads, profile, layout)
    assert plain.wire_s == pytest.approx(share * 16 * MIB / rate, rel=0.02)
    coded = predict(INT8, machine(rate), loads, profile, layout)
    assert coded.wire_s == pytest.approx(share * 4 * MIB * 1.02 / rate, rel=0.02)
    summed = predict(Choice("int8_shared", "ring", 25.0), machine(rate), loads, profile, layout)
    assert summed.wire_s == pytest.approx(share * 4 * MIB * 2.1 / rate, rel=0.02)


def test_rails_share_a_bucket() -> None:
    one = predict(NONE, machine(1e8), model(32), Profile(0.0), Layout(nodes=2))
    two = predict(NONE, machine(1e8), model(32), Profile(0.0), Layout(nodes=2, local=2, rails=2))
    assert two.wire_s == pytest.approx(one.wire_s / 2, rel=0.02)


def test_coding_pays_on_a_slow_link_and_not_on_a_fast_one() -> None:
    layout, profile = Layout(nodes=2), Profile(0.05)
    slow, fast = machine(6e6), machine(5e10, cpu_s=1e-11)
    loads = model(25)
    assert predict(BF16, slow, loads, profile, layout).span_s < 0.6 * (
        predict(NONE, slow, loads, profile, layout).span_s
    )
    assert predict(INT8, slow, loads, profile, layout).span_s < 0.4 * (
        predict(NONE, slow, loads, profile, layout).span_s
    )
    assert (
        predict(BF16, fast, loads, profile, layout).span_s
        > predict(NONE, fast, loads, profile, layout).span_s
    )


def test_a_long_backward_pass_hides_all_but_the_last_bucket() -> None:
    profile, layout = Profile(10.0), Layout(nodes=2)
    spare = machine(1e8, delay=0.0)
    found = predict(NONE, spare, model(25), profile, layout)
    assert found.wire_s > 0.2
    assert found.exposed_s < 0.06
    crowded = predict(NONE, machine(1e8, delay=2.0), model(25), profile, layout)
    assert crowded.span_s > found.span_s + crowded.cpu_s


def test_gradients_that_all_come_at_the_end_hide_nothing() -> None:
    late = Profile(1.0, ((0.01, 0.0), (1.0, 0.0)))
    layout = Layout(nodes=2)
    found = predict(NONE, machine(1e8), model(25), late, layout)
    assert found.exposed_s > found.wire_s
    assert predict(NONE, machine(1e8), model(25), Profile(1.0), layout).exposed_s < (
        found.exposed_s / 2
    )


def test_a_profile_is_read_between_its_points() -> None:
    profile = Profile(1.0, ((0.2, 0.8), (0.6, 0.4), (1.0, 0.0)))
    assert profile.ready_s(0.1) == pytest.approx(0.1)
    assert profile.ready_s(0.4) == pytest.approx(0.4)
    assert profile.ready_s(1.0) == pytest.approx(1.0)
    assert Profile(2.0).ready_s(0.25) == pytest.approx(0.5)


@given(
    rate=st.floats(1e6, 1e10),
    mib=st.floats(0.1, 300),
    backward_s=st.floats(1e-3, 3),
    delay=st.floats(0, 3),
    choice=st.sampled_from([NONE, BF16, INT8, SHARED]),
    nodes=st.integers(2, 5),
    rails=st.integers(1, 4),
    everywhere=st.booleans(),
)
def test_predictions_are_in_order(
    rate: float,
    mib: float,
    backward_s: float,
    delay: float,
    choice: Choice,
    nodes: int,
    rails: int,
    everywhere: bool,
) -> None:
    layout = Layout(nodes, rails, rails, everywhere)
    profile, loads = Profile(backward_s), model(mib)
    here = machine(rate, delay)
    found = predict(choice, here, loads, profile, layout)
    assert 0 <= found.exposed_s <= found.span_s
    assert found.span_s >= backward_s * (1 - 1e-9)
    assert found.span_s >= found.wire_s * (1 - 1e-9)
    slower = predict(choice, machine(rate / 2, delay), loads, profile, layout)
    # A queue served in order of arrival may finish a little sooner for one late segment.
    assert slower.span_s >= found.span_s * 0.97


def test_a_link_is_fitted_to_what_was_exposed() -> None:
    layout, profile, loads = Layout(nodes=2), Profile(0.1), model(25)
    true = machine(2e7)
    exposed_s = predict(NONE, true, loads, profile, layout).exposed_s
    fitted = fit_link(NONE, machine(1e8), loads, profile, layout, exposed_s)
    assert fitted.link.wire_s == pytest.approx(true.link.wire_s, rel=0.05)


def test_one_node_codes_nothing_between_nodes() -> None:
    comm = CommConfig()
    loads = {}

    def plan(size: float) -> list[Load]:
        return loads.setdefault(size, model(25))

    layout = Layout(nodes=1, local=4, rails=4)
    found = candidates(comm, ("none", "bf16"), machine(1e8), plan, layout)
    assert found == [NONE]
    everywhere = Layout(nodes=1, local=4, rails=4, everywhere=True)
    found = candidates(comm, ("none", "bf16"), machine(1e8), plan, everywhere)
    assert {each.codec for each in found} == {"none", "bf16"}


def test_the_deck_s_algorithm_is_left_alone_where_it_is_named() -> None:
    layout = Layout(nodes=4)
    for comm in (CommConfig(rail_algorithm="ring"), CommConfig(reproducible=True)):
        found = candidates(comm, ("bf16",), machine(1e8), lambda size: model(25), layout)
        assert {each.rail_algorithm for each in found} == {comm.rail_algorithm}
    found = candidates(CommConfig(), ("bf16",), machine(1e8), lambda size: model(25), layout)
    assert found[0] == NONE
    assert len({each.rail_algorithm for each in found}) > 3
    assert {each.rail_algorithm for each in found if each.codec == "bf16"} == {"auto"}


def test_buckets_are_varied_where_that_changes_them() -> None:
    def plan(size: float) -> list[Load]:
        return [Load(int(min(size, 4) * MIB / 4))] * max(1, round(32 / min(size, 4)))

    found = candidates(CommConfig(), ("none",), machine(1e8), plan, Layout(nodes=2))
    assert {each.bucket_mb for each in found} == {25.0, 2.0, 1.0}


def test_what_is_predicted_slower_is_not_tried() -> None:
    layout, profile = Layout(nodes=2), Profile(0.05)
    for rate, tried in ((6e6, True), (5e10, False)):
        here = machine(rate, cpu_s=1e-11)
        choices = [NONE, BF16, INT8]
        found = predict_all(choices, here, lambda size: model(25), profile, layout)
        picked = shortlist(NONE, found, 1.1 * found[NONE].span_s, here)
        assert picked[0] == NONE
        assert (len(picked) > 1) == tried
        if tried:
            assert INT8 in picked
            assert BF16 not in picked, "far slower than the best"


def test_a_layout_comes_from_the_topology_and_the_deck() -> None:
    two = Topology.group(["a", "a", "b", "b"])
    assert Layout.of(two, CommConfig()) == Layout(nodes=2, local=2, rails=2)
    assert Layout.of(two, CommConfig(), "all").group(coded=True).ranks == 4
    assert Layout.of(two, CommConfig(reproducible=True)).flat
    one = Layout.of(Topology.group(["a", "a"]), CommConfig())
    assert one.group(coded=True).ranks == 1
    assert one.segment_bytes > MIB
    assert uncoded(CommConfig(bucket_mb=4)) == Choice("none", "auto", 4)
