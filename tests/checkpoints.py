"""Checkpoints for tests, written without MPI as a job of so many ranks writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpcsync import config as configs
from hpcsync import models
from hpcsync.checkpoint import folder, layout, manifest, state
from hpcsync.checkpoint.manifest import Document, Manifest
from hpcsync.checkpoint.snapshot import HostBuffer
from hpcsync.checkpoint.writer import PartWriter, publish
from hpcsync.config import Config
from hpcsync.data import Source
from hpcsync.dryrun import find_data
from hpcsync.engine import untied


def write(
    checkpoints: Path,
    step: int,
    common: Mapping[str, Any],
    own: Sequence[Any] = ({},),
    *,
    config: str = "",
    run_id: str = "test",
) -> Manifest:
    """A checkpoint of as many ranks as there are states in ``own``, each a writer."""
    ranks = len(own)
    shared = state.flatten(dict(common))
    owns = [state.flatten(each, manifest.own_prefix(rank)) for rank, each in enumerate(own)]
    metas = state.metas(shared.tensors)
    fresh = folder.aside(checkpoints, step)
    fresh.mkdir(parents=True)
    parts = []
    for rank, pieces in enumerate(layout.share(metas, ranks)):
        mine = state.metas(owns[rank].tensors)
        wanted = [*pieces, *(layout.whole(each) for each in mine if each.nbytes)]
        filled = HostBuffer().fill(shared.tensors | owns[rank].tensors, wanted)
        made = layout.datasets([*metas, *mine], wanted)
        parts.append(PartWriter(folder.data_file(rank)).write(fresh, made, filled))
    document = Document(
        step=step,
        tokens=step * 1000,
        created="2026-01-02T03:04:05+00:00",
        run_id=run_id,
        nodes=(tuple(range(ranks)),),
        versions={"hpcsync": "0", "torch": torch.__version__},
        config=config,
        common=shared.skeleton,
        own=tuple(each.skeleton for each in owns),
    )
    metas += [meta for each in owns for meta in state.metas(each.tensors)]
    written = publish(fresh, checkpoints / folder.step_name(step), document, metas, parts)
    folder.set_latest(checkpoints, step)
    return written


def small(name: str = "mlp", *words: str) -> tuple[Config, Source, nn.Module]:
    """A small reference model, its deck and its data, at random but always the same."""
    data = "stdlib" if name == "gpt" else "digits"
    keys = [f"model.name={name}", f"data.name={data}", "model.layers=2", "model.width=24"]
    config = configs.load(None, [*keys, "model.heads=2", "model.context=16", *words])
    source, _ = find_data(config)
    torch.manual_seed(config.run.seed)
    return config, source, models.build(config.model, source)


def of_model(
    checkpoints: Path, step: int, model: nn.Module, config: Config, ranks: int = 2
) -> Manifest:
    """A checkpoint of a model with Adam's means."""
    weights, ties = untied(model.state_dict())
    common = {
        "model": weights,
        "ties": ties,
        "optimizer": {"exp_avg": {name: torch.ones_like(each) for name, each in weights.items()}},
        "step": step,
    }
    own = [{"random": {"torch": torch.arange(8) + rank}} for rank in range(ranks)]
    return write(checkpoints, step, common, own, config=configs.dump(config))


def with_model(config: Config, name: str) -> Config:
    """The same deck with another model."""
    return replace(config, model=replace(config.model, name=name))
