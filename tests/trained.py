"""Small reference models, and checkpoints of them as a run of several ranks leaves them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from hpcsync import config as configs
from hpcsync import models
from hpcsync.config import Config
from hpcsync.data import Source
from hpcsync.dryrun import find_data
from hpcsync.tied import untied
from tests import checkpoints


def small(name: str = "mlp", *words: str) -> tuple[Config, Source, nn.Module]:
    """A model, its deck and its data; the weights are random but always the same."""
    data = "stdlib" if name == "gpt" else "digits"
    keys = [f"model.name={name}", f"data.name={data}", "model.layers=2", "model.width=24"]
    config = configs.load(None, [*keys, "model.heads=2", "model.context=16", *words])
    source, _ = find_data(config)
    torch.manual_seed(config.run.seed)
    return config, source, models.build(config.model, source)


def save(
    folder: Path, step: int, model: nn.Module, config: Config | None = None, ranks: int = 2
) -> Path:
    """A checkpoint of a model with Adam's means."""
    weights, ties = untied(model.state_dict())
    common = {
        "model": weights,
        "ties": ties,
        "optimizer": {"exp_avg": {name: torch.ones_like(each) for name, each in weights.items()}},
        "step": step,
    }
    own = [{"random": {"torch": torch.arange(8) + rank}} for rank in range(ranks)]
    deck = configs.dump(config or configs.load(None))
    return checkpoints.make(folder, step, common, own, config=deck)


def with_model(config: Config, name: str) -> Config:
    """The same deck with another model."""
    return replace(config, model=replace(config.model, name=name))
