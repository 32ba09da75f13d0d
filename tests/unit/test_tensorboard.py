"""Curves for TensorBoard, read back by its own reader."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from hpcsync.config import MetricsConfig
from hpcsync.errors import UserError
from hpcsync.observers import RunInfo, StepRecord, standard
from hpcsync.observers.tensorboard import FOLDER, TensorBoard

INFO = {"ranks": 4, "nodes": 2, "host": "a", "steps": 3, "tokens_per_step": 2048, "unit": "byte"}
RECORD = {"grad_norm": 1.0, "compute_ms": 90.0, "comm_ms": 40.0, "exposed_comm_ms": 10.0}


def run(folder: Path) -> None:
    observer = TensorBoard()
    about: dict[str, Any] = {**INFO, "val_unit": "bits/byte", "codec": "none", "every_s": 0.0}
    observer.started(RunInfo(folder=folder, rank=0, algorithm="ring", run_id="abcd1234", **about))
    values: dict[str, Any] = {**RECORD, "wait_ms": 0.0, "tokens_per_s": 1.0, "lr": 1e-3}
    for step in (1, 2, 3):
        if step == 3:
            observer.evaluated(step, 3.5)
        observer.stepped(
            StepRecord(
                step=step,
                loss=5.0 - step,
                step_ms=100.0 * step,
                internode_bytes=7.0,
                loss_scale=1.0,
                skipped=step == 2,
                **values,
            )
        )
    observer.ended("done", "")
    observer.ended("done", "")


def test_curves_come_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard missing")
    run(tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (tmp_path / FOLDER).iterdir()
    assert file.name.endswith(".abcd1234")
    found = EventAccumulator(str(tmp_path / FOLDER)).Reload()
    losses = [(event.step, event.value) for event in found.Scalars("loss/train")]
    assert losses == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert [(event.step, event.value) for event in found.Scalars("loss/held_out")] == [(3, 3.5)]
    assert [event.value for event in found.Scalars("optimizer/skipped")] == [0, 1, 0]
    assert found.Scalars("time/step_s")[-1].value == pytest.approx(0.3)
    (text,) = found.Tensors("run/text_summary")
    assert b"abcd1234" in text.tensor_proto.string_val[0]


def test_it_is_off_unless_the_deck_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def members(rank: int, on: bool) -> list[type]:
        return [type(each) for each in standard(rank, MetricsConfig(tensorboard=on)).members]

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert TensorBoard not in members(0, on=False)
    assert TensorBoard in members(0, on=True)
    assert TensorBoard not in members(1, on=True)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'hpcsync\[tensorboard\]'") as at:
        standard(0, MetricsConfig(tensorboard=True))
    assert "\n" not in str(at.value)
