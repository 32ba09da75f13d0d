"""Costs of links in a file: used where they fit, and told where they do not."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpcsync.collectives import saved_costs
from hpcsync.collectives.costs import LinkCost
from hpcsync.collectives.saved_costs import GOOD_DAYS, Place, SavedCosts
from hpcsync.errors import UserError
from hpcsync.topology import Topology

PLACE = Place(
    ranks=4,
    nodes=2,
    local=2,
    mpi="Open MPI v5.0.11",
    processor="Fast",
    partition="cpu",
    cluster="big",
)
COST = LinkCost(40e-6, 8.5e-9, 3e-10, 1e-5)


BROKEN = [
    *("", "{", "[]", "3", '{"format": "hpcsync-costs"}', "9" * 5000),
    *("[" * 100_000, '{"format": "hpcsync-costs", "version": ' + "[" * 900 + "]" * 900 + "}"),
]


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


def saved(**other: Any) -> SavedCosts:
    whole = SavedCosts(made=now(), place=PLACE, levels={"rail": COST, "node": COST})
    return replace(whole, **other)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "costs.json"
    saved().write(path)
    first = saved_costs.read(path)
    assert first is not None
    assert first == saved(made=first.made)
    saved(levels={"rail": COST}).write(path)
    again = saved_costs.read(path)
    assert again is not None
    assert dict(again.levels) == {"rail": COST}
    assert [each.name for each in path.parent.iterdir()] == ["costs.json"]


def test_a_fitting_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    saved().write(path)
    found, why = saved_costs.find(str(path), PLACE)
    assert found is not None
    assert why == ""
    assert found.link(2) == COST
    assert "4 ranks on 2 nodes, Open MPI v5.0.11" in found.describe()
    assert saved_costs.find(str(path), replace(PLACE, ranks=64, nodes=32))[0] is not None


def test_no_file_is_no_matter(tmp_path: Path) -> None:
    assert saved_costs.find(str(tmp_path / "none.json"), PLACE) == (None, "")
    assert saved_costs.find("", PLACE) == (None, "")


@pytest.mark.parametrize(
    ("job", "why"),
    [
        ({"local": 4}, "ranks a node 2, and here it is 4"),
        ({"mpi": "MPICH Version: 4.2"}, "MPI library Open MPI v5.0.11, and here it is MPICH"),
        ({"processor": "Slow"}, "processor Fast, and here it is Slow"),
        ({"partition": "gpu"}, "partition cpu, and here it is gpu"),
        ({"partition": ""}, "partition cpu, and here it is none"),
        ({"cluster": "small"}, "cluster big, and here it is small"),
        ({"cluster": ""}, "cluster big, and here it is none"),
    ],
)
def test_another_place_is_told(tmp_path: Path, job: dict[str, Any], why: str) -> None:
    path = tmp_path / "costs.json"
    saved().write(path)
    found, told = saved_costs.find(str(path), replace(PLACE, **job))
    assert found is None
    assert why in told
    assert "\n" not in told
    assert "`python -m hpcsync.preflight` measures anew" in told


def test_without_a_batch_system_on_both_sides_they_fit() -> None:
    place = replace(PLACE, partition="", cluster="")
    assert saved(place=place).unfit(place) == ""
    assert "partition none, and here it is cpu" in saved(place=replace(PLACE, partition="")).unfit(
        PLACE
    )


def test_a_missing_level_is_told() -> None:
    one_node = replace(PLACE, nodes=1, ranks=2)
    assert saved(levels={"node": COST}).unfit(one_node) == ""
    assert "no link between nodes" in saved(levels={"node": COST}).unfit(PLACE)
    assert "no link in a node" in saved(levels={"rail": COST}).unfit(one_node)


@pytest.mark.parametrize("days", [GOOD_DAYS, 400, -3])
def test_old_ones_and_those_of_the_future_are_told(days: int) -> None:
    old = saved(made=now() - datetime.timedelta(days=days))
    assert f"not within {GOOD_DAYS} days of the run" in old.unfit(PLACE)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"format": "other"}, "its format is not hpcsync-costs"),
        ({"version": 9}, "version 9, and this hpcsync reads 1"),
        ({"made": "yesterday"}, "yesterday"),
        ({"ranks": 0}, "ranks is 0"),
        ({"ranks": True}, "ranks is True"),
        ({"mpi": 3}, "mpi is 3"),
        ({"processor": None}, "no 'processor'"),
        ({"levels": {"rail": {"latency_s": -1, "wire_s": 1e-9}}}, "latency_s is -1"),
        ({"levels": {"rail": {"latency_s": float("nan"), "wire_s": 1e-9}}}, "latency_s is nan"),
        ({"levels": {"rail": {"latency_s": 1e-5, "wire_s": 0}}}, "time of a byte is 0"),
        ({"levels": {"rail": {"latency_s": 1e-5}}}, "wire_s"),
        ({"levels": {"rail": {"speed": 1e-5}}}, "speed"),
        ({"levels": {"rail": {"latency_s": 10, "wire_s": 1e-9}}}, "latency_s is 10"),
        ({"levels": {"rail": {"latency_s": 1e-5, "wire_s": 1e-3}}}, "wire_s is 0.001"),
        ({"levels": {"rail": {"latency_s": 1e-5, "wire_s": 10**400}}}, "wire_s is 1000"),
        ({"levels": {"rail": 3}}, "rail is 3"),
        ({"levels": []}, "levels is []"),
        ({"ranks": 10**400}, "ranks is 1000"),
        ({"mpi": "two\nlines"}, "mpi is 'two"),
    ],
)
def test_what_is_wrong_in_a_file_is_told(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    path = tmp_path / "costs.json"
    saved().write(path)
    whole = json.loads(path.read_text()) | change
    whole = {key: value for key, value in whole.items() if value is not None}
    path.write_text(json.dumps(whole))
    with pytest.raises(UserError, match="not the costs of links"):
        saved_costs.read(path)
    found, told = saved_costs.find(str(path), PLACE)
    assert found is None
    assert why in told
    assert "\n" not in told
    assert len(told) < 500
    assert "remove it, or run `python -m hpcsync.preflight` again" in told


@pytest.mark.parametrize("text", BROKEN)
def test_broken_files_are_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text)
    found, told = saved_costs.find(str(path), PLACE)
    assert found is None
    assert "not the costs of links" in told
    assert "\n" not in told


@pytest.mark.parametrize("where", [".", "/", "none", "there"])
def test_what_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if where == "there":

        def fails(self: Path, target: Path) -> Path:
            raise OSError("no room")

        monkeypatch.setattr(Path, "replace", fails)
    if where == "none":
        (tmp_path / "none").mkdir()
    with pytest.raises(OSError, match=r"directory|no room"):
        saved().write(Path(where))
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_what_is_measured_as_nothing_is_not_kept() -> None:
    assert saved_costs.usable(COST)
    for change in ({"latency_s": 0.0}, {"wire_s": 0.0}, {"wire_s": 1.0}, {"latency_s": 11.0}):
        assert not saved_costs.usable(replace(COST, **change))


def test_this_place_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_PARTITION", "fat")
    here = Place.here(Topology.group(["a", "a", "b"]), "Some MPI")
    assert (here.ranks, here.nodes, here.local) == (3, 2, 2)
    assert here.partition == "fat"
    assert here.processor
