"""Who exchanges when, which nodes are named, and how it is told: without ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcsync.collectives import saved_costs
from hpcsync.collectives.costs import LinkCost
from hpcsync.errors import CollectiveTimeout, UserError
from hpcsync.preflight import __main__, judge, report, turns
from hpcsync.preflight.compute import Bench, Rates, Size, device_of
from hpcsync.preflight.options import parse
from hpcsync.preflight.survey import Level, PairFound
from hpcsync.preflight.wire import Fault, wants_more
from hpcsync.topology import Topology

LINK = 118e6


def cluster(nodes: int, local: int = 1) -> Topology:
    return Topology.group([f"node{rank // local:03d}" for rank in range(nodes * local)])


def machines(nodes: int) -> list[str]:
    return [f"machine{node}" for node in range(nodes)]


def rates(topology: Topology, **slow: float) -> list[Rates]:
    """Of every rank; ``product7=0.5`` makes rank 7 half as fast."""
    return [
        Rates(
            100e9 * slow.get(f"product{rank}", 1.0),
            10e9 * slow.get(f"memory{rank}", 1.0),
            int(slow.get(f"wrong{rank}", 0)),
            "cpu",
            int(slow.get(f"sum{rank}", 7)),
        )
        for rank in range(topology.size)
    ]


def linked(topology: Topology, slow: dict[int, float] | None = None, wait_s: float = 0.0) -> Level:
    """Between nodes: a pair is as slow as the slower of its nodes."""
    slow = slow or {}
    level = Level(together=LinkCost(30e-6, 1 / LINK))
    for wave in turns.between_nodes(topology, machines(topology.node_count)):
        for low, high in wave:
            ends = topology.node_of(low), topology.node_of(high)
            rate = LINK * min(slow.get(end, 1.0) for end in ends)
            late = wait_s if set(ends) & set(slow) else 0.0
            level.pairs.append(PairFound(low, high, rate, 20e-6 + late))
            level.transfers += 4
    return level


def found(topology: Topology, level: Level, **slow: float) -> report.Result:
    """A result as the command makes it."""
    each = judge.odd_products(rates(topology, **slow))
    levels = {"node": Level(), "rail": level}
    nodes = judge.nodes_of(topology, topology.names, each, *levels.values())
    faults = level.faults
    return report.Result(
        topology=topology,
        nodes=nodes,
        device="cpu",
        mpi="Open MPI v5",
        seconds=1.0,
        levels=levels,
        slow=judge.slow_nodes(nodes, 0.8),
        slow_pairs=judge.slow_pairs(topology, level, 0.8),
        wrong=judge.wrong_nodes(topology, faults, each),
        rates=each,
    )


def test_a_node_that_missed_a_fast_moment_is_not_slow() -> None:
    """Nodes of one machine, whose memory was fast only while the others had their first turns."""
    topology, share = cluster(3, 1), 0.8
    early, late = rates(topology, memory2=0.75), rates(topology, memory0=0.7, memory1=0.72)
    late = [replace(each, memory=min(each.memory, 0.75 * 10e9)) for each in late]
    looks = [early, late]

    def judged(found: list[Rates]) -> list[judge.Slow]:
        return judge.slow_nodes(
            judge.nodes_of(topology, topology.names, found, Level(), Level()), share
        )

    slow = judged(judge.best_of(looks))
    assert [(each.node, each.what) for each in slow] == [(2, "memory")]
    assert judge.lasting(slow, [judged(each) for each in looks]) == []
    twice = [early, early]
    slow = judged(judge.best_of(twice))
    assert judge.lasting(slow, [judged(each) for each in twice]) == slow != []
    links = [judge.Slow(1, "link", 1.0, 0.5)]
    assert judge.lasting(links, [[], []]) == links, "those are looked at again by themselves"


# -- who exchanges when --------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [2, 3, 4, 5, 8, 33, 512])
def test_every_node_meets_others_in_few_turns(nodes: int) -> None:
    topology = cluster(nodes, 2)
    waves = turns.between_nodes(topology, machines(nodes))
    assert 1 <= len(waves) <= 4
    met: dict[int, set[int]] = {}
    for wave in waves:
        ranks = [rank for pair in wave for rank in pair]
        assert len(set(ranks)) == len(ranks), "one partner at a time"
        for low, high in wave:
            assert low < high
            met.setdefault(low, set()).add(high)
            met.setdefault(high, set()).add(low)
    assert set(met) == {ranks[0] for ranks in topology.nodes}
    assert nodes < 3 or min(map(len, met.values())) >= 2, "else a slow partner would hide a node"


def test_one_node_has_no_links() -> None:
    assert turns.between_nodes(cluster(1, 4), machines(1)) == []
    assert turns.in_nodes(cluster(4), machines(4)) == []


def test_ranks_of_all_nodes_exchange_at_once() -> None:
    waves = turns.in_nodes(cluster(3, 4), machines(3))
    assert len(waves) == 2
    assert all(len(wave) == 6 for wave in waves)


def test_uneven_nodes_have_pairs_of_their_own() -> None:
    topology = Topology.group(["a", "a", "a", "b", "b", "c"])
    waves = turns.in_nodes(topology, machines(3))
    assert {pair for wave in waves for pair in wave} == {(0, 1), (0, 2), (1, 2), (3, 4)}


def test_nodes_of_one_machine_take_turns() -> None:
    assert turns.shifts(["a", "b", "a", "a"]) == [0, 0, 1, 2]
    for wave in turns.between_nodes(cluster(4), ["a"] * 4):
        assert len(wave) == 1
    both = turns.between_nodes(cluster(4), ["a", "a", "b", "b"])
    pairs = [pair for wave in both for pair in wave]
    assert len(pairs) == len(set(pairs)) == 4
    for wave in turns.in_nodes(cluster(2, 2), ["a", "a"]):
        assert len(wave) == 1


# -- which nodes are named -----------------------------------------------------------------


def test_nobody_is_named_where_all_are_alike() -> None:
    result = found(cluster(5), linked(cluster(5)))
    assert result.named == []
    assert result.exclude == ""
    assert "no node is named" in report.as_text(result)


@pytest.mark.parametrize("nodes", [3, 4, 7, 100])
def test_a_slow_link_is_named_by_its_node_alone(nodes: int) -> None:
    topology = cluster(nodes)
    result = found(topology, linked(topology, {1: 0.5}))
    assert result.named == ["node001"]
    assert result.exclude == "--exclude=node001"
    assert "slow: node001: link 59 MB/s, 50% of the median" in report.as_text(result)
    assert result.slow_pairs == []


def test_of_two_nodes_no_link_is_named() -> None:
    result = found(cluster(2), linked(cluster(2), {1: 0.1}))
    assert result.named == []
    assert "three are needed" in report.as_text(result)


def test_a_slow_rank_names_its_node() -> None:
    topology = cluster(3, 4)
    result = found(topology, linked(topology), product6=0.4, memory11=0.5)
    assert result.named == ["node001", "node002"]
    text = report.as_text(result)
    assert "slow: node001: matrix product of rank 6 40 GFLOP/s, 40% of the median" in text
    assert "slow: node002: memory bandwidth of rank 11 5 GB/s, 50% of the median" in text
    assert "--exclude=node001,node002" in text.splitlines()


def test_a_late_node_is_named() -> None:
    result = found(cluster(4), linked(cluster(4), {2: 1.0}, wait_s=200e-6))
    assert result.named == ["node002"]
    assert "slow: node002: latency of its link 220 us" in report.as_text(result)


def test_a_slow_pair_of_good_nodes_is_told_and_names_nobody() -> None:
    topology = cluster(5)
    level = linked(topology)
    first = level.pairs[0]
    level.pairs[0] = PairFound(first.low, first.high, first.rate / 4, first.latency_s)
    result = found(topology, level)
    assert result.named == []
    assert "25% of the median, though each of them is fast with others" in report.as_text(result)


def test_the_end_that_all_wrong_transfers_share_is_named() -> None:
    topology = cluster(4, 2)
    level = linked(topology)
    level.faults = [Fault(2, 0, 1, 64, 1 << 18), Fault(4, 2, 1, 64, 1 << 18)]
    result = found(topology, level)
    assert result.named == ["node001"]
    assert "wrong: rank 2 (node001) to rank 0 (node000): 1 words" in report.as_text(result)


def test_both_ends_are_named_where_one_transfer_was_wrong() -> None:
    topology = cluster(4)
    level = linked(topology)
    level.faults = [Fault(3, 0, 1, 64, 1 << 18)] * 5
    assert found(topology, level).named == ["node000", "node003"]


def test_a_transfer_that_did_not_come_names_its_ends() -> None:
    topology = cluster(4)
    level = linked(topology)
    level.faults = [Fault(3, 0, 0, 0, 0, stalled_s=30.0), Fault(0, 3, 0, 0, 0, stalled_s=30.0)]
    result = found(topology, level)
    assert result.named == ["node000", "node003"]
    assert "rank 3 (node003) to rank 0 (node000): nothing came for 30 s" in report.as_text(result)
    level.faults.append(Fault(3, 0, 0, 0, 0, stalled_s=30.0, late=True))
    result = found(topology, level)
    assert result.named == ["node003"], "who stood still is known"
    assert "nothing came for 30 s, and the sender stood still" in report.as_text(result)


def test_a_level_where_nothing_came_is_told() -> None:
    level = Level(faults=[Fault(1, 0, 0, 0, 0, stalled_s=30.0)])
    result = found(cluster(2), level)
    told = json.loads(report.as_json(result))["levels"]["rail"]
    assert told["rate"] is None
    assert len(told["faults"]) == 1
    assert "nothing came for 30 s" in report.as_text(result)


def test_a_wrong_product_is_named() -> None:
    result = found(cluster(3), linked(cluster(3)), wrong2=1)
    assert result.named == ["node002"]
    assert "wrong: 1 matrix products were not the same (node002)" in report.as_text(result)


def test_the_better_of_two_looks_counts_and_every_fault() -> None:
    level, other = linked(cluster(3), {0: 0.5}), linked(cluster(3))
    other.faults = [Fault(0, 1, 1, 0, 64)]
    transfers = level.transfers
    level.look_again(other)
    assert found(cluster(3), level).slow == []
    assert len(level.faults) == 1
    assert level.transfers == 2 * transfers
    first, second = rates(cluster(1), product0=0.5)[0], rates(cluster(1), memory0=0.5)[0]
    assert first.better(second) == Rates(100e9, 10e9, 0, "cpu", 7)
    assert first.better(replace(second, checksum=8)).wrong == 1


def test_a_product_that_is_always_wrong_in_the_same_way_is_named() -> None:
    topology = cluster(3, 2)
    result = found(topology, linked(topology), sum3=8)
    assert result.named == ["node001"]
    assert "wrong: 1 matrix products were not the same (node001)" in report.as_text(result)
    each = rates(topology, sum3=8)
    each[3] = replace(each[3], device="cuda:1")
    assert not any(one.wrong for one in judge.odd_products(each)), "a kind of its own"


def test_without_a_majority_no_product_is_trusted() -> None:
    two = judge.odd_products(rates(cluster(2), sum1=8))
    assert [one.wrong for one in two] == [1, 1]


def test_nodes_with_other_numbers_of_ranks_are_not_compared() -> None:
    """Two ranks share what one has elsewhere."""
    topology = Topology.group(["a", "a", "b", "c", "d"])
    half = {"product0": 0.5, "product1": 0.5, "memory0": 0.5, "memory1": 0.5}
    assert found(topology, linked(topology), **half).named == []
    assert found(topology, linked(topology), **half, product3=0.5).named == ["c"]
    assert found(topology, linked(topology, {0: 0.5})).named == ["a"], "links are compared"


# -- telling -------------------------------------------------------------------------------


def test_hundreds_of_nodes_fit_on_a_screen() -> None:
    topology = cluster(300)
    lines = report.as_text(found(topology, linked(topology, {250: 0.5}))).splitlines()
    assert len(lines) < 45
    assert any(line.strip().startswith("node250") for line in lines), "named ones are shown"
    assert any("and 276 more" in line for line in lines)


def test_json_holds_what_the_text_tells() -> None:
    topology = cluster(3, 2)
    told = json.loads(report.as_json(found(topology, linked(topology, {2: 0.3}))))
    assert told["exclude"] == ["node002"]
    assert [(rank["rank"], rank["node"]) for rank in told["ranks"]][2:4] == [
        (2, "node001"),
        (3, "node001"),
    ]
    assert told["ranks"][5]["product"] == 100e9
    assert [node["name"] for node in told["nodes"]] == ["node000", "node001", "node002"]
    (slow,) = told["slow"]
    assert (slow["name"], slow["what"]) == ("node002", "link")
    assert slow["share"] == pytest.approx(0.3)
    assert told["levels"]["rail"]["all_ranks"]["wire_s"] == pytest.approx(1 / LINK)
    assert "node" not in told["levels"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--slow", "1.5"], "--slow: must be between 0 and 1"),
        (["--seconds", "0"], "--seconds: must be above 0"),
        (["--timeout", "-1"], "--timeout: must be above 0"),
        (["--ranks-per-node", "-1"], "must be 0 or more"),
        (["--threads", "-1"], "must be from 0 to 1024"),
        (["--threads", "100000"], "must be from 0 to 1024"),
        (["--fast"], "unrecognized arguments: --fast; --help lists"),
    ],
)
def test_wrong_options_are_one_line(words: list[str], text: str) -> None:
    with pytest.raises(UserError, match=text):
        parse(words)


# -- the command --------------------------------------------------------------------------------


class Alone:
    """A job of one rank that notes the limit under which it waits for all."""

    def __init__(self, topology: Topology) -> None:
        self.topology, self.rank, self.timeout_s = topology, 0, 300.0
        self.limits: list[float] = []

    def barrier(self) -> None:
        self.limits.append(self.timeout_s)


def test_imports_have_a_limit_of_their_own_and_a_failed_write_comes_behind_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    topology = cluster(3)
    monkeypatch.setattr(__main__, "_measure", lambda *_: found(topology, linked(topology)))
    job: Any = Alone(topology)
    options = parse(["--timeout", "7", "--threads", "0", "--save", str(tmp_path)])
    assert __main__.preflight(job, options) == 0
    assert (job.limits, job.timeout_s) == ([300.0], 7.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("hpcsync ")
    assert lines[-1] == f"costs of links: not saved: {tmp_path}: Is a directory"


def test_a_level_measured_as_nothing_is_not_saved(tmp_path: Path) -> None:
    topology, path = cluster(3, 2), tmp_path / "costs.json"
    result = found(topology, linked(topology))
    options = parse(["--save", str(path)])
    job: Any = Alone(topology)
    result.levels["node"].together = LinkCost(0.0, 1e-10)
    assert "saved in" in __main__._save(job, options, result)
    kept = saved_costs.read(path)
    assert kept is not None
    assert set(kept.levels) == {"rail"}
    path.unlink()
    result.levels["rail"].together = LinkCost(1e-6, 0.0)
    assert "measured as nothing" in __main__._save(job, options, result)
    assert not path.exists()


def test_an_error_is_an_object_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    job: Any = Alone(cluster(1))
    with pytest.raises(CollectiveTimeout), __main__._told(job, True):
        raise CollectiveTimeout("a rank is missing")
    assert json.loads(capsys.readouterr().out) == {"error": "a rank is missing"}
    job.rank = 1
    with pytest.raises(CollectiveTimeout), __main__._told(job, True):
        raise CollectiveTimeout("a rank is missing")
    assert capsys.readouterr().out == ""


# -- computing -----------------------------------------------------------------------------


def test_rates_are_above_nothing_and_products_right() -> None:
    bench = Bench(torch.device("cpu"), Size(64, 1 << 16))
    found = bench.measure(0.001)
    assert found.product > 0
    assert found.memory > 0
    assert found.wrong == 0


def test_a_product_that_comes_out_otherwise_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(torch.device("cpu"), Size(64, 1 << 16))
    once = Bench._multiply

    def flips(self: Bench) -> None:
        once(self)
        self._product[3, 5] += 1

    monkeypatch.setattr(Bench, "_multiply", flips)
    windows = iter([True, True, False])
    assert bench.measure(0.001, agree=lambda more: next(windows)).wrong == 2


def test_windows_that_others_took_part_of_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best two of either work have to be near each other, or other ranks want another one."""
    bench = Bench(torch.device("cpu"), Size(64, 1 << 16))
    rates = {"_multiply": [6.0, 9.0, 10.0, 10.1, 3.0], "_copy": [5.0, 4.0, 5.0, 4.9, 2.0]}
    wanted: list[bool] = []

    def next_rate(self: Bench, work: Callable[[], None], window_s: float) -> float:
        return rates[work.__name__][len(wanted) - 1]

    def one_more(wants: bool) -> bool:
        wanted.append(wants)
        return wants or len(wanted) < 6

    monkeypatch.setattr(Bench, "_calls_a_second", next_rate)
    found = bench.measure(agree=one_more)
    assert wanted == [True, True, True, True, False, False]
    assert found.product == 10.1 * 2 * 64**3
    assert found.memory == 5.0 * 2 * (1 << 16)


def test_ranks_of_a_node_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [device_of(local).index for local in range(5)] == [0, 1, 2, 3, 0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(3).type == "cpu"


def test_a_rate_counts_once_another_one_confirms_it() -> None:
    assert wants_more([])
    assert wants_more([100.0])
    assert not wants_more([100.0, 98.0])
    assert wants_more([100.0, 50.0])
    assert not wants_more([50.0, 100.0, 98.0])
    assert not wants_more([100.0, 90.0, 80.0, 70.0, 60.0, 50.0])
