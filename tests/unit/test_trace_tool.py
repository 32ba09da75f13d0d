"""tools/trace.py: its commands, forms of output, choice of steps and ranks, and bad input."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import pytest

from tests.commands import Call, caller
from tests.traces import Plan, make
from tools import trace as tool

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    plan = {"ranks": 4, "nodes": 2, "steps": 8}
    return {
        "a": make(folder / "a", Plan(**plan)),
        "b": make(folder / "b", Plan(**plan, slow_forward={2: 25.0}, run_id="b")),
        "wide": make(folder / "wide", Plan(ranks=2, nodes=2, steps=4)),
    }


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(tool.main, capsys)


def test_the_summary_is_a_text_that_names_the_fault(runs: dict[str, Path], call: Call) -> None:
    status, out, err = call("summary", runs["b"])
    assert (status, err) == (0, "")
    assert "verdict: straggler: rank 2 (node 1) is slow in forward" in out
    for text in ("busbw GB/s", "wire.rail", "overlap", "imbalance", "/ own past", "resident"):
        assert text in out
    assert "no fault found" not in out
    assert "no fault found" in call("summary", runs["a"])[1]


def test_the_run_may_come_first_or_alone(runs: dict[str, Path], call: Call) -> None:
    texts = {call(*words)[1] for words in (("summary", runs["a"]), (runs["a"], "summary"))}
    assert texts == {call(runs["a"])[1]}
    assert call(runs["a"] / "trace")[1] in texts


def test_json_and_csv_hold_what_the_tables_do(runs: dict[str, Path], call: Call) -> None:
    found = json.loads(call(runs["b"], "--json")[1])
    assert found["steps"] == [2, 3, 4, 5, 6, 7, 8]
    assert found["verdict"]["bound"] == "straggler"
    assert found["findings"][0]["ranks"] == "2"
    assert found["slowest"][0]["rank"] == 2
    assert sum(row["share"] for row in found["parts"][:6]) == pytest.approx(1.0, abs=1e-3)
    blocks = call(runs["b"], "--csv")[1].split("\n\n")
    tables = {}
    for block in blocks:
        rows = list(csv.DictReader(io.StringIO(block)))
        tables[rows[0]["table"]] = rows
    assert set(tables) == {name for name, value in found.items() if isinstance(value, list)} - {
        "ranks",
        "steps",
    }
    assert float(tables["parts"][0]["ms"]) == found["parts"][0]["ms"]


def test_csv_and_json_exclude_each_other(runs: dict[str, Path], call: Call) -> None:
    status, _, err = call("summary", runs["a"], "--csv", "--json")
    assert status == 2
    assert err.count("\n") == 1


def test_steps_and_ranks_may_be_chosen(runs: dict[str, Path], call: Call) -> None:
    found = json.loads(call(runs["b"], "--json", "--steps", "1-3,5", "--ranks", "0-1,3")[1])
    assert (found["steps"], found["ranks"]) == ([1, 2, 3, 5], [0, 1, 3])
    # Without rank 2 nothing is wrong.
    assert found["findings"] == []


def test_what_is_out_of_range_is_told_and_the_rest_shown(runs: dict[str, Path], call: Call) -> None:
    status, out, err = call(runs["a"], "--steps", "6-20", "--ranks", "2-7")
    assert status == 0
    assert "2 ranks, 3 steps (6-8)" in out
    assert err.splitlines() == [
        "trace: warning: rank 2-7: the trace has 0 to 3",
        "trace: warning: step 6-20: the trace has 1 to 8",
    ]
    status, out, err = call(runs["a"], "--steps", "100-")
    assert (status, out) == (2, "")
    assert err == f"trace: {runs['a']}: no step 100-; the trace has 1-8\n"
    status, _, err = call(runs["a"], "--ranks", "9")
    assert (status, err) == (2, f"trace: {runs['a']}: no rank 9; the trace has 0-3\n")


@pytest.mark.parametrize("text", ["x", "3-1", "1..2", ""])
def test_ranges_that_cannot_be_understood(runs: dict[str, Path], call: Call, text: str) -> None:
    status, _, err = call("critical", runs["a"], "--steps", text)
    assert status == 2
    assert err.count("\n") == 1
    assert "--steps" in err


@pytest.mark.parametrize("command", ["summary", "critical"])
def test_folders_that_are_no_run(tmp_path: Path, call: Call, command: str) -> None:
    status, out, err = call(command, tmp_path / "absent")
    assert (status, out) == (2, "")
    assert err == f"trace: {tmp_path / 'absent'}: no such run folder\n"
    status, _, err = call(command, tmp_path)
    assert status == 2
    assert err.startswith(f"trace: {tmp_path}: no trace in it")
    assert err.count("\n") == 1


def test_what_is_readable_of_a_broken_trace_is_shown(
    runs: dict[str, Path], tmp_path: Path, call: Call
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["b"], run)
    broken = run / "trace" / "node0.h5"
    broken.write_bytes(broken.read_bytes()[:5000])
    status, out, err = call(run)
    assert status == 0
    assert "2 ranks, 7 steps" in out
    assert "rank 2 (node 1) is slow in forward" in out
    assert "not readable as HDF5" in err
    assert "ranks 0-1 of 4 have no events" in err
    assert all(line.startswith("trace: warning: ") for line in err.splitlines())
    (run / "trace" / "node1.h5").unlink()
    status, out, err = call(run)
    assert (status, out, err.count("\n")) == (2, "", 1)


def test_a_foreign_file(tmp_path: Path, call: Call) -> None:
    (tmp_path / "trace").mkdir()
    with h5py.File(tmp_path / "trace" / "node0.h5", "w") as file:
        file["x"] = 1
    status, _, err = call(tmp_path)
    assert status == 2
    assert "no trace of hpcsync" in err


def test_the_critical_path(runs: dict[str, Path], call: Call) -> None:
    status, out, _ = call("critical", runs["b"], "--path")
    assert status == 0
    assert "the path of step 8" in out
    found = json.loads(call(runs["b"], "critical", "--json")[1])
    assert found["ranks"][0]["rank"] == "2"
    assert sum(row["share"] for row in found["lanes"]) == pytest.approx(1.0)
    assert found["last"][0]["rank"] == 2


def test_diff_tells_ci_by_its_status(runs: dict[str, Path], call: Call) -> None:
    status, out, err = call("diff", runs["a"], runs["b"])
    assert (status, err) == (1, "")
    assert "slower beyond 5%" in out
    assert call("diff", runs["b"], runs["a"])[0] == 0
    assert call("diff", runs["a"], runs["a"])[0] == 0
    assert call("diff", runs["a"], runs["b"], "--threshold", "60")[0] == 0
    found = json.loads(call("diff", runs["a"], runs["b"], "--json")[1])
    assert found["slower"] is True
    assert found["lanes"][0]["lane"] == "step"
    status, _, err = call("diff", runs["a"], runs["b"], "--threshold", "much")
    assert (status, err.count("\n")) == (2, 1)


def test_diff_refuses_other_jobs_unless_told(runs: dict[str, Path], call: Call) -> None:
    status, out, err = call("diff", runs["a"], runs["wide"])
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "4 and 2 ranks" in err
    assert call("diff", runs["wide"], runs["a"], "--anyway")[0] in (0, 1)


def test_as_a_program(runs: dict[str, Path]) -> None:
    script = [sys.executable, str(ROOT / "tools" / "trace.py")]
    done = subprocess.run(
        [*script, str(runs["a"])], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "verdict:" in done.stdout
    # Neither MPI nor torch: it must start at once, anywhere.
    code = "import sys; from tools import trace; trace.main()"
    code += "; assert not {'torch', 'mpi4py'} & set(sys.modules), 'heavy'"
    done = subprocess.run(
        [sys.executable, "-c", code, str(runs["a"])],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_help_and_no_command(call: Call) -> None:
    status, out, _ = call("--help")
    assert status == 0
    for command in ("summary", "critical", "diff"):
        assert command in out
    status, _, err = call()
    assert (status, err.count("\n")) == (2, 1)
