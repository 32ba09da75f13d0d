"""A lost run, put together again from its first state and its log, against the run itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcsync.checkpoint import random_state
from tests.replayed import SIZE, STEPS, Run, logged, lose_and_recover, same

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("one_thread")]

CODECS = [
    *("none", "bf16", "fp16", "fp8", "int8", "int4", "int8_shared", "onebit"),
    *("topk", "threshold", "randomk", "powersgd"),
    *("tests.replay_codecs:Halves", "tests.replay_codecs:Learning"),
]
PLACES = [("rail", 1), ("rail", 2), ("all", 0)]


def test_auto(folder: Path) -> None:
    """Its choice depends on times: what stands is that of the last step."""
    settings = {"width": 1, "warmup": 0}
    states = logged(folder, "auto", steps=9, **settings)
    state = states[0]
    found = Run(2, "auto", **settings)
    found.engine.load_state_dict(copy.deepcopy(state["engine"]))
    random_state.restore(copy.deepcopy(state["random"]))
    log = found.log(folder)
    assert log.recover(0) == 9
    same(found.state()["engine"], states[9]["engine"])
    log.close()
    found.close()


@pytest.mark.parametrize(("where", "width"), PLACES)
@pytest.mark.parametrize("codec", CODECS)
def test_the_bits_of_the_lost_run(folder: Path, codec: str, where: str, width: int) -> None:
    lose_and_recover(folder, codec, width=width, where=where)


@pytest.mark.parametrize("codec", ["none", "int8", "powersgd", "randomk"])
def test_uneven_nodes(folder: Path, codec: str) -> None:
    if SIZE != 4:
        pytest.skip("needs 4 ranks")
    lose_and_recover(folder, codec, width=3)


@pytest.mark.parametrize(
    ("codec", "compress"),
    [
        ("int8", {"rounding": "stochastic"}),
        ("int4", {"rounding": "stochastic"}),
        ("onebit", {"error_feedback": False}),
        ("randomk", {"error_feedback": False}),
        ("powersgd", {"error_feedback": False}),
        ("topk", {"momentum": 0.9, "ratio_warmup": 4}),
        ("int8_shared", {"verify": True, "rounding": "stochastic"}),
        ("int8", {"warmup": 0, "vectors": True, "min_elements": 0}),
        ("int8", {"warmup": STEPS}),
    ],
)
def test_settings_of_codecs(folder: Path, codec: str, compress: dict[str, Any]) -> None:
    lose_and_recover(folder, codec, **compress)


@pytest.mark.parametrize("codec", ["none", "int8", "onebit", "powersgd"])
def test_onebit_adam(folder: Path, codec: str) -> None:
    train = {"optimizer": "onebit_adam", "freeze": 2}
    lose_and_recover(folder, codec, train=train, warmup=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("codec", ["none", "int8", "int8_shared"])
def test_dtypes(folder: Path, codec: str, dtype: torch.dtype) -> None:
    lose_and_recover(folder, codec, dtype=dtype)


@pytest.mark.parametrize(
    ("codec", "settings"),
    [
        ("none", {"algorithm": "direct"}),
        ("none", {"algorithm": "ring"}),
        ("none", {"algorithm": "halving"}),
        ("none", {"algorithm": "doubling"}),
        ("none", {"algorithm": "native"}),
        ("none", {"reproducible": True}),
        ("none", {"node_transport": "mpi_host"}),
        ("randomk", {"rail_algorithm": "ring"}),
        ("int8", {"overlap": False}),
    ],
)
def test_algorithms(folder: Path, codec: str, settings: dict[str, Any]) -> None:
    lose_and_recover(folder, codec, comm=settings, width=2 if SIZE > 2 else 1)


@pytest.mark.parametrize("loss_scale", ["none", 64.0])
@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
def test_scales(folder: Path, loss_scale: float | str, clip_norm: float) -> None:
    lose_and_recover(folder, "int8", train={"loss_scale": loss_scale, "clip_norm": clip_norm})
