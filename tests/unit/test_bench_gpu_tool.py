"""tools/bench_gpu.py, as far as it needs neither a GPU nor ranks: what it says and judges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpcsync import config, cuda_state
from tools import bench_gpu, benchmark, gpu_parts
from tools.benchmark import BenchmarkError

STEP = {
    "parameters": 1,
    "transport": "cuda_ipc",
    "with": 0.1,
    "without": 0.09,
    "exposed": 0.1,
    "waits": 0,
    "error": 1e-6,
}


def options(*words: str) -> Any:
    return bench_gpu.arguments().parse_args(words)


def test_without_a_driver_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda_state, "look", cuda_state.CudaState)
    assert bench_gpu.main(options()) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("bench_gpu: cuda: no NVIDIA driver is here")
    assert err.rstrip().endswith("nothing was measured")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--only", "nodes"], "no part 'nodes'; there are kernels, node, staged, step"),
        (["--rounds", "0"], "--rounds must be above 0"),
        (["--device", "cpu", "--report", "gpu"], "say nothing of a GPU"),
    ],
)
def test_bad_options(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_gpu.main(options(*words)) == 2
    assert told in capsys.readouterr().err


def test_every_run_has_a_part_a_table_and_keys_of_the_deck() -> None:
    for run in bench_gpu.RUNS:
        assert run.part in ("kernels", *gpu_parts.PARTS)
        assert run.part in bench_gpu.TABLES
        config.load(None, ["topology.share_devices=true", *run.keys])
    assert {run.ranks for run in bench_gpu.RUNS if run.part == "node"} == {2, 4}


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, set()),
        ({"exposed": 0.15}, {"exposed share of a step"}),
        ({"waits": 1}, {"host waits in 3 steps"}),
        ({"error": 0.1}, {"gradients against one rank's"}),
        ({"waits": None}, set()),
    ],
)
def test_steps_are_judged(change: dict[str, Any], missed: set[str]) -> None:
    judged = bench_gpu.goals({"step": [STEP | change]})
    assert {goal.what for goal in judged if not goal.reached} == missed


def test_the_slowest_kernel_and_the_largest_message_count() -> None:
    rows = [
        {"codec": "int8", "operation": "encode", "copy": 0.9},
        {"codec": "topk", "operation": "encode", "copy": 0.7},
    ]
    staged = [{"bytes": 1, "ratio": 9.0}, {"bytes": 100, "ratio": 1.7}]
    kernels, pipeline = bench_gpu.goals({"kernels": rows, "staged": staged})
    assert (kernels.reached, kernels.shown) == (False, "70%")
    assert "topk encode" in kernels.what
    assert (pipeline.reached, pipeline.shown) == (True, "1.70")
    assert bench_gpu.goals({}) == []


def test_a_failed_part_is_told_by_its_error() -> None:
    text = "hpcsync: warning: slow\nTraceback\n  File x\nDeviceError: no room\nmpirun noticed\n"
    assert bench_gpu.reason(text) == "DeviceError: no room"
    assert bench_gpu.reason("only this\n") == "only this"
    assert bench_gpu.reason("") == ""
    rule = 70 * "-"
    framed = f"one\n{rule}\nThe listener failed to\nstart. We cannot\ncontinue.\n{rule}\n"
    assert bench_gpu.reason(framed) == "The listener failed to start."
    assert bench_gpu.reason(f"{rule}\nWARNING: no\nslots.\n{rule}\n") == "WARNING: no slots."
    assert bench_gpu.reason(f"{rule}\n{rule}\n") == ""


def test_a_part_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(run: bench_gpu.Run, given: Any, folder: Path) -> list[dict[str, Any]]:
        if run.part == "node":
            raise BenchmarkError("DeviceError: no room")
        return [STEP]

    monkeypatch.setattr(bench_gpu, "start", start)
    monkeypatch.setattr(bench_gpu, "facts", lambda given: {"gpu": "1 x NVIDIA H200, driver"})
    monkeypatch.setattr(benchmark, "REPORTS", tmp_path)
    monkeypatch.setattr(benchmark, "write_report", write(tmp_path))
    words = ["--only", "node,step", "--json", str(tmp_path / "all.json"), "--report", "gpu"]
    assert bench_gpu.main(options(*words)) == 1
    assert "node on 2 ranks: DeviceError: no room" in capsys.readouterr().err
    found = json.loads((tmp_path / "all.json").read_text())
    assert found["step"] == [STEP]
    assert len(found["failed"]) == 2
    report = (tmp_path / "1-x-nvidia-h200-gpu").read_text()
    assert "| exposed share of a step | 10.0% | under 15% | yes |" in report
    assert "node on 4 ranks" in report


def write(folder: Path) -> Any:
    def report(name: str, title: str, head: Any, body: list[str]) -> Path:
        path = folder / name
        path.write_text("\n".join(body))
        return path

    return report
