"""Users' own scripts as whole jobs: how they end, and that they leave nothing behind."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests import launcher

pytestmark = pytest.mark.usefixtures("mpi")

START = """
import hpcsync
import torch
from torch import nn

hpcsync.init(overrides=["comm.timeout_s=3"])
rank = hpcsync.rank()
model = nn.Linear(20, 10)
"""
TRAIN = """
ours = hpcsync.DataParallel(model)
for step in range(3):
    ours.zero_grad()
    ours(torch.ones(2, 20)).sum().backward()
"""


def run(folder: Path, body: str, ranks: int = 2, start: str = START) -> launcher.Outcome:
    script = folder / "script.py"
    script.write_text(start + textwrap.dedent(body))
    outcome = launcher.run(ranks, str(script), timeout=90)
    outcome.assert_clean()
    return outcome


@pytest.mark.parametrize("ranks", [0, 1, 2])
def test_a_script_needs_no_shutdown(tmp_path: Path, ranks: int) -> None:
    outcome = run(tmp_path, TRAIN + "\nprint('done', rank)", ranks)
    assert outcome.status == 0, outcome.describe()
    assert outcome.stdout.count("done") == max(ranks, 1)
    assert outcome.stderr == "", outcome.describe()


def test_an_exception_of_one_rank_ends_all_with_one_traceback(tmp_path: Path) -> None:
    outcome = run(tmp_path, TRAIN + "\nif rank == 1: print(1 / 0)\nhpcsync.barrier()")
    assert outcome.status == 1, outcome.describe()
    assert outcome.stderr.count("Traceback") == 1, outcome.describe()
    assert "ZeroDivisionError: division by zero" in outcome.stderr
    assert "hpcsync: rank 1 on " in outcome.stderr


def test_models_that_differ_end_all_with_one_line(tmp_path: Path) -> None:
    outcome = run(tmp_path, f"model = nn.Linear(20, 10 + rank)\n{TRAIN}")
    assert outcome.status == 2, outcome.describe()
    assert outcome.stderr.count("hpcsync: error: rank 1: the models differ between ranks") == 1
    assert "weight (11, 20) torch.float32 here, weight (10, 20) torch.float32 on rank 0" in (
        outcome.stderr
    )
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize("ranks", [0, 3])
def test_a_wrong_value_is_one_line_and_2(tmp_path: Path, ranks: int) -> None:
    outcome = run(tmp_path, "hpcsync.DataParallel(model, codec='int9')", ranks)
    assert outcome.status == 2, outcome.describe()
    assert outcome.stderr.count("hpcsync: error:") == 1, outcome.describe()
    assert "codec: unknown codec 'int9'; did you mean int8?" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_settings_that_contradict_each_other_are_one_line_and_2(tmp_path: Path) -> None:
    start = START.replace('"comm.timeout_s=3"', '"comm.algorithm=ring"')
    outcome = run(tmp_path, "hpcsync.DataParallel(model, codec='int8')", start=start)
    assert outcome.status == 2, outcome.describe()
    assert outcome.stderr.count("hpcsync: error:") == 1, outcome.describe()
    assert "ring has no rails to code on" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    late = "if rank == 1:\n    import time\n    time.sleep(60)\n"
    for body, said in (
        (TRAIN + late + "ours(torch.ones(2, 20)).sum().backward()", "bucket 0 segment 0"),
        (late + "hpcsync.barrier()", "a control message of rank 0 is not complete"),
    ):
        outcome = run(tmp_path, body)
        assert outcome.status == 1, outcome.describe()
        assert said in outcome.stderr, outcome.describe()
        assert "comm.timeout_s = 3" in outcome.stderr
        assert "Traceback" not in outcome.stderr


def test_a_rank_that_is_killed_ends_all(tmp_path: Path) -> None:
    outcome = run(
        tmp_path,
        TRAIN + "if rank == 1:\n    import os, signal\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "hpcsync.barrier()",
    )
    assert outcome.status != 0, outcome.describe()
    assert outcome.seconds < 60
