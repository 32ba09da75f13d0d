"""tools/bench_gpu.py with the host in the GPU's place: its parts run, and their sums are right."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests import launcher

pytestmark = [pytest.mark.usefixtures("mpi"), pytest.mark.timeout(900)]


def test_all_parts_on_the_host(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    tool = launcher.ROOT / "tools" / "bench_gpu.py"
    words = ["--device", "cpu", "--quick", "--rounds", "1", "--json", str(out)]
    outcome = launcher.Job([sys.executable, str(tool), *words]).wait(600)
    assert outcome.status == 0, outcome.describe()
    outcome.assert_clean()
    found = json.loads(out.read_text())
    assert found["failed"] == []
    assert {row["codec"] for row in found["kernels"]} == {"bf16", "fp16", "sum"}
    assert {row["ranks"] for row in found["node"]} == {2, 4}
    assert all(row["right"] for row in (*found["node"], *found["staged"]))
    (step,) = found["step"]
    assert step["error"] < 1e-5
    assert "gradients against one rank's" in outcome.stdout
