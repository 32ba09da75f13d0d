"""whatif takes links from what preflight saved, where it fits the traced run."""

from __future__ import annotations

import argparse
import datetime
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from hpcsync.collectives.costs import LinkCost
from hpcsync.collectives.saved_costs import Place, SavedCosts
from hpcsync.errors import UserError
from tests import traces
from tools.tracing import whatif

PLACE = Place(ranks=2, nodes=2, local=1, mpi="Some MPI", processor="Fast")
MADE = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
WHOLE: dict[str, Any] = {
    "format": "hpcsync-costs",
    "version": 1,
    "made": MADE.strftime("%Y-%m-%dT%H:%M:%SZ"),
    **asdict(PLACE),
}


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    whatif.arguments(parser)
    assert whatif.run(parser.parse_args([*words, "--json"])) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def traced(folder: Path, place: Place | None, nodes: int = 2) -> str:
    links = {"crowding": 1.0, **({"place": asdict(place)} if place else {})}
    run = traces.make(
        folder / "run", ranks=2, nodes=nodes, steps=8, rail_ms=6.0, links=json.dumps(links)
    )
    return str(run)


def saved(folder: Path, place: Place = PLACE, days: int = 0, /, **levels: LinkCost) -> str:
    path = folder / "costs.json"
    levels = levels or {"rail": LinkCost(50e-6, 2e-9, 3e-10, 1e-5)}
    made = MADE - datetime.timedelta(days=days)
    SavedCosts(made=made, place=place, levels=levels).write(path)
    return str(path)


def test_a_fitting_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, path = traced(tmp_path, PLACE), saved(tmp_path)
    assumed = asked(capsys, run, "--costs", path)["assumed"]
    wanted = (
        f"the traced link costs what is known by preflight of {MADE:%Y-%m-%d %H:%M} UTC, 2 ranks"
    )
    assert any(line.startswith(wanted) for line in assumed)
    assert not any("sending takes" in line for line in assumed), "that is measured"


def test_a_given_rate_goes_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [traced(tmp_path, PLACE), "--costs", saved(tmp_path), "--was", "1gbit"]
    assert "preflight" not in json.dumps(asked(capsys, *words))


@pytest.mark.parametrize(
    ("place", "why"),
    [
        (replace(PLACE, mpi="Another"), "MPI library Some MPI, and here it is Another"),
        (None, "the trace does not say where it was made"),
    ],
)
def test_another_place_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: Place | None, why: str
) -> None:
    assumed = asked(capsys, traced(tmp_path, place), "--costs", saved(tmp_path))["assumed"]
    assert any("costs.json is not used: " in line and why in line for line in assumed)


@pytest.mark.parametrize(("days", "used"), [(29, True), (-29, True), (31, False), (-31, False)])
def test_costs_hold_for_a_month_around_the_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], days: int, used: bool
) -> None:
    words = [traced(tmp_path, PLACE), "--costs", saved(tmp_path, PLACE, days)]
    assumed = " ".join(asked(capsys, *words)["assumed"])
    assert ("the traced link costs what is known by" in assumed) == used
    assert ("not within 30 days of the run" in assumed) != used


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[" * 100_000,
        json.dumps({**WHOLE, "levels": []}),
        json.dumps({**WHOLE, "levels": {"rail": 3}}),
        json.dumps({**WHOLE, "levels": {"rail": {"latency_s": 1e-5, "wire_s": 10**400}}}),
    ],
    ids=["cut", "deep", "levels", "rail", "digits"],
)
def test_a_broken_file_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text)
    assumed = asked(capsys, traced(tmp_path, PLACE), "--costs", str(path))["assumed"]
    assert any("not the costs of links" in line for line in assumed)


def test_no_file_is_no_matter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [traced(tmp_path, PLACE), "--costs", str(tmp_path / "none.json")]
    assert "costs" not in json.dumps(asked(capsys, *words)["assumed"])


def test_one_node_is_carried_to_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two ranks each, as those that preflight measured."""
    one = replace(PLACE, ranks=2, nodes=1, local=2)
    several = replace(PLACE, ranks=8, nodes=4, local=2)
    run = traced(tmp_path, one, nodes=1)
    slow = saved(tmp_path, several, rail=LinkCost(50e-6, 1e-7, 3e-10, 1e-5))
    found = asked(capsys, run, "--nodes", "2", "--costs", slow)
    assert any("the link costs what is known by preflight" in line for line in found["assumed"])
    fast = saved(tmp_path, several, rail=LinkCost(50e-6, 1e-10, 3e-10, 1e-5))
    assert asked(capsys, run, "--nodes", "2", "--costs", fast)["step_ms"] < found["step_ms"]
    other = saved(tmp_path, replace(several, local=4))
    with pytest.raises(UserError, match="give --bandwidth with a rate"):
        asked(capsys, run, "--nodes", "2", "--costs", other)
