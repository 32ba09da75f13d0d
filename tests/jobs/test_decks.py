"""Decks as a user starts them: whole jobs of two ranks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests import launcher

pytestmark = [pytest.mark.usefixtures("mpi"), pytest.mark.timeout(300)]


def train(folder: Path, *arguments: str) -> tuple[launcher.Outcome, dict[str, Any]]:
    """Run a deck; how it ended, and its summary."""
    words = ["-m", "hpcsync.train", *arguments, "--out", str(folder / "run")]
    outcome = launcher.run(2, *words, cwd=folder, timeout=240)
    outcome.assert_clean()
    assert outcome.status == 0, outcome.describe()
    return outcome, json.loads((folder / "run" / "summary.json").read_text())


def test_the_default_deck_begins_to_learn(tmp_path: Path) -> None:
    words = ("default", "train.steps=6", "train.warmup=2", "train.eval_batches=1")
    outcome, found = train(tmp_path, *words)
    assert (found["status"], found["steps"], found["ranks"]) == ("done", 6, 2)
    assert found["val_loss"] < found["val_loss_first"]
    assert re.search(r"devices +cpu, 1 thread a rank", outcome.stdout)


def test_the_laptop_deck_gets_under_four_bits_a_byte(tmp_path: Path) -> None:
    _, found = train(tmp_path, "laptop")
    assert found["val_unit"] == "bits/byte"
    assert found["val_loss"] < 4.0 < found["val_loss_first"]
