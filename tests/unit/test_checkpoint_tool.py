"""tools/checkpoint.py: what it lists, shows, verifies, compares and removes, in every form."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hpcsync import checkpoint
from tests import checkpoints, trained
from tests.commands import Call, caller
from tools import checkpoint as tool
from tools.checking import diff, show

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(tool.main, capsys)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with three checkpoints, of steps 10, 20 and 30, whose weights grow by 0.5 each."""
    config, _, model = trained.small("convnet")
    for step in (10, 20, 30):
        trained.save(tmp_path / "run" / "checkpoints", step, model, config)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.5)
    return tmp_path / "run"


def place(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


# -- list --------------------------------------------------------------------------------


def test_a_run_alone_lists_its_checkpoints(run: Path, call: Call) -> None:
    texts = {call(*words) for words in ((run,), ("list", run), (run, "list"))}
    assert texts == {call(run / "checkpoints")}
    ((status, out, err),) = texts
    assert (status, err) == (0, "")
    lines = [line.split() for line in out.splitlines()[1:]]
    assert [line[0] for line in lines] == ["step-00000010", "step-00000020", "step-00000030"]
    assert lines[-1][-2:] == ["complete,", "latest"]


def test_the_list_tells_what_is_not_whole(run: Path, call: Call) -> None:
    manifest = place(run, 20) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-60])
    (place(run, 10) / "rank-00001.h5").unlink()
    (run / "checkpoints" / ".step-00000040.tmp").mkdir()
    (run / "checkpoints" / "step-00000005.damaged").mkdir()
    (run / "checkpoints" / "notes").mkdir()
    found = json.loads(call("list", run, "--json")[1])
    states = {row["name"]: row["state"] for row in found["checkpoints"]}
    assert found["latest"] == "step-00000030"
    assert states.pop("step-00000030") == "complete, latest"
    assert "rank-00001.h5" in states.pop("step-00000010")
    assert states.pop("step-00000020").startswith("damaged: manifest.json")
    assert states == {
        ".step-00000040.tmp": "being written, or left behind",
        "step-00000005.damaged": "damaged, set aside",
    }


# -- show --------------------------------------------------------------------------------


def test_tensors_are_shown_with_their_norms(run: Path, call: Call) -> None:
    found = json.loads(call("show", run, "--json")[1])
    assert (found["step"], found["ranks"], found["nodes"]) == (30, 2, [[0, 1]])
    rows = {row["name"]: row for row in found["tensors"]}
    mean = rows["optimizer/exp_avg/layers.0.0.weight"]
    assert (mean["dtype"], mean["shape"], mean["bytes"]) == ("float32", "24x1x3x3", 864)
    assert (mean["norm"], mean["min"], mean["max"], mean["bad"]) == (
        pytest.approx(216**0.5),
        1,
        1,
        0,
    )
    assert rows["model/layers.0.1.num_batches_tracked"]["shape"] == "scalar"
    assert "ranks/1/random/torch" in rows
    assert {"name": "step", "value": 30} in found["values"]


def test_names_choose(run: Path, call: Call) -> None:
    out = call("show", place(run, 10), "--name", "model/head.*", "--name", "step", "--csv")[1]
    tensors, values = (list(csv.DictReader(io.StringIO(part))) for part in out.split("\n\n"))
    assert [row["name"] for row in tensors] == ["model/head.weight", "model/head.bias"]
    assert [(row["name"], row["value"]) for row in values] == [("step", "10")]
    status, _, err = call("show", run, "--name", "nothing")
    assert (status, err.count("\n")) == (2, 1)
    assert "is called nothing" in err


def test_long_lists_of_values_are_shortened(tmp_path: Path, call: Call) -> None:
    common = {
        "counts": {f"c{n}": n for n in range(60)},
        "state": (3, (*range(99),), None, float("nan"), {"k": [True, "x"]}),
    }
    checkpoints.make(tmp_path, 1, {**common, "w": torch.zeros(1)}, [{}])
    out = call("show", tmp_path)[1]
    assert "25 more values: --values shows them" in out
    out = call("show", tmp_path, "--values")[1]
    for words in ("state/1 99 values", "state/4/k [True, x]", "counts/c59 59", "state/3 nan"):
        assert words in " ".join(out.split()), words


def test_figures_leave_out_what_is_not_finite() -> None:
    nan, inf = float("nan"), float("inf")
    assert show.figures(torch.tensor([3.0, nan, -4.0, inf])) == (5.0, -4.0, 3.0, 2)
    assert show.figures(torch.tensor([nan])) == (None, None, None, 1)
    assert show.figures(torch.empty(0, 3)) == (None, None, None, 0)
    assert show.figures(torch.tensor([True, True])) == (pytest.approx(2**0.5), 1.0, 1.0, 0)
    assert show.figures(torch.tensor([3 + 4j])) == (5.0, None, None, 0)
    assert show.figures(torch.tensor([2.0]).bfloat16()) == (2.0, 2.0, 2.0, 0)


# -- verify ------------------------------------------------------------------------------


def test_whole_checkpoints_are_verified(run: Path, call: Call) -> None:
    assert call("verify", run)[0] == 0
    assert "every byte is as written" in call("verify", place(run, 10))[1]


def test_a_flipped_bit_is_found_by_file_and_tensor(run: Path, call: Call) -> None:
    file = place(run, 20) / "rank-00000.h5"
    with checkpoint.open(place(run, 20)) as found:
        piece = found.manifest.tensors["model/layers.0.0.weight"].pieces[0]
    flip(file, piece.offset + 5)
    status, out, _ = call("verify", run, "--json")
    found = json.loads(out)
    assert (status, found["damaged"]) == (1, True)
    (problem,) = found["problems"]
    assert problem["name"] == "step-00000020"
    assert problem["problem"].startswith("rank-00000.h5: dataset model/layers.0.0.weight")
    assert {row["name"]: row["problems"] for row in found["checkpoints"]} == {
        "step-00000030": 0,
        "step-00000020": 1,
        "step-00000010": 0,
    }
    assert call("verify", run, "--quick")[0] == 0
    file.write_bytes(file.read_bytes()[:-1])
    assert call("verify", place(run, 20), "--quick")[0] == 1


def test_a_lost_manifest_is_damage(run: Path, call: Call) -> None:
    (place(run, 20) / "manifest.json").unlink()
    status, out, _ = call("verify", place(run, 20))
    assert status == 1
    assert "manifest.json" in out


# -- diff --------------------------------------------------------------------------------


def test_equal_checkpoints_do_not_differ(run: Path, tmp_path: Path, call: Call) -> None:
    """However many ranks have written them."""
    config, _, model = trained.small("convnet")
    one = trained.save(tmp_path / "one", 10, model, config, ranks=1)
    words = ("diff", place(run, 10), one, "--name", "model/*", "--name", "optimizer/*")
    status, out, _ = call(*words, "--json")
    found = json.loads(out)
    assert (status, found["differ"]) == (0, False)
    assert {row["verdict"] for row in found["tensors"]} == {"equal"}
    status, out, _ = call("diff", place(run, 10), one)
    assert status == 1
    assert "only in a" in out


def test_differences_are_told_per_tensor(run: Path, call: Call) -> None:
    status, out, _ = call("diff", place(run, 10), run, "--json")
    found = json.loads(out)
    assert (status, found["differ"]) == (1, True)
    rows = {row["name"]: row for row in found["tensors"]}
    bias = rows["model/layers.0.1.weight"]  # ones, and then 2
    assert (bias["verdict"], bias["max_abs"], bias["relative"]) == ("differs", 1.0, 1.0)
    assert rows["optimizer/exp_avg/head.bias"]["verdict"] == "equal"
    assert found["values"] == [{"name": "step", "a": "10", "b": "30"}]
    text = call("diff", place(run, 10), run)[1]
    assert "optimizer/" not in text
    assert "optimizer/" in call("diff", place(run, 10), run, "--all")[1]


def test_bits_decide() -> None:
    nan = float("nan")
    assert diff.difference(torch.tensor([nan, 1.0]), torch.tensor([nan, 1.0])) == (
        "equal",
        0.0,
        0.0,
    )
    assert diff.difference(torch.tensor([0.0]), torch.tensor([-0.0])) == ("differs", 0.0, 0.0)
    assert diff.difference(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 9.0])) == (
        *("differs", 5.0),
        1.0,
    )
    verdict, largest, _ = diff.difference(torch.tensor([nan, 1.0]), torch.tensor([0.0, 3.0]))
    assert (verdict, largest) == ("differs, with NaN or Inf", 2.0)
    assert diff.difference(torch.empty(0, 2), torch.empty(0, 2))[0] == "equal"


def test_other_shapes_are_told(tmp_path: Path, call: Call) -> None:
    one = checkpoints.make(tmp_path / "a", 1, {"w": torch.zeros(2, 3)}, [{}])
    other = checkpoints.make(tmp_path / "b", 1, {"w": torch.zeros(3, 2).half()}, [{}])
    status, out, _ = call("diff", one, other)
    assert status == 1
    assert "float32 2x3, float16 3x2" in out


# -- prune -------------------------------------------------------------------------------


def test_prune_keeps_what_the_rules_say(run: Path, call: Call) -> None:
    def left() -> list[int]:
        return [step for step in (10, 20, 30) if place(run, step).exists()]

    found = json.loads(call("prune", run, "--keep", 1, "--dry-run", "--json")[1])
    assert [row["state"] for row in found["checkpoints"]] == ["would go", "would go", "kept"]
    assert (found["removed"], found["freed"] > 0, left()) == (2, True, [10, 20, 30])
    assert call("prune", run, "--keep", 1, "--keep-every", 20)[0] == 0
    assert left() == [20, 30]
    assert "0 of 2 removed" in call("prune", run, "--keep", 9)[1]
    assert call("prune", run)[0] == 2
    assert call("prune", run, "--keep", 0)[0] == 2


# -- errors ------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["list", "show", "verify", "prune"])
def test_a_folder_without_checkpoints_is_one_line(command: str, tmp_path: Path, call: Call) -> None:
    words = ("--keep", "1") if command == "prune" else ()
    for path in (tmp_path, tmp_path / "none"):
        status, out, err = call(command, path, *words)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("checkpoint: ")


def test_a_damaged_checkpoint_is_one_line(run: Path, call: Call) -> None:
    flip(place(run, 30) / "manifest.json", 40)
    for words in (("show", run), ("diff", run, run)):
        status, out, err = call(*words)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "step-00000030/manifest.json" in err


def test_it_starts_as_a_script(run: Path) -> None:
    script = [sys.executable, str(ROOT / "tools" / "checkpoint.py")]
    done = subprocess.run(
        [*script, str(run)], capture_output=True, text=True, timeout=120, check=True, cwd=run
    )
    assert "step-00000030" in done.stdout
    done = subprocess.run(
        [*script, "--help"], capture_output=True, text=True, timeout=120, check=True
    )
    for name in ("list", "show", "verify", "diff", "prune"):
        assert f"\n    {name} " in done.stdout
