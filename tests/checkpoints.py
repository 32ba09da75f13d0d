"""Checkpoints made by hand, as a job of many ranks writes them, in one process.

make(folder, step=100, common=tree, own=[tree, ...])  ->  folder/step-00000100
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcsync.checkpoint import folder as folders
from hpcsync.checkpoint import layout, state
from hpcsync.checkpoint.manifest import Document, own_prefix
from hpcsync.checkpoint.snapshot import HostBuffer
from hpcsync.checkpoint.writer import Part, PartWriter, publish


def make(
    checkpoints: Path,
    step: int,
    common: Mapping[str, Any],
    own: Sequence[Any],
    nodes: Sequence[Sequence[int]] | None = None,
    first_only: Collection[str] = (),
    config: str = '[run]\nname = "x"\n',
) -> Path:
    """Write a checkpoint.

    Args:
        own: of each rank; there are as many ranks.
        nodes: their ranks, one after the other; a file is then written for each node.
        config: the deck.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    fresh = folders.aside(checkpoints, step)
    fresh.mkdir()
    flat = state.flatten(common)
    owned = [state.flatten(each, own_prefix(rank)) for rank, each in enumerate(own)]
    metas = state.metas(flat.tensors)
    shares = layout.share(metas, len(own), first_only)
    groups = nodes or [[rank] for rank in range(len(own))]
    parts: list[Part] = []
    for number, ranks in enumerate(groups):
        name = folders.data_file(number, of_nodes=nodes is not None)
        mine = {rank: [*shares[rank], *_whole(owned[rank])] for rank in ranks}
        known = [*metas, *(meta for rank in ranks for meta in state.metas(owned[rank].tensors))]
        datasets = layout.datasets(known, [piece for rank in ranks for piece in mine[rank]])
        # The one who leads comes last: the order must not matter.
        for rank in reversed(ranks):
            filled = HostBuffer().fill(flat.tensors | owned[rank].tensors, mine[rank])
            writer = PartWriter(name, leads=rank == ranks[0])
            parts.append(writer.write(fresh, datasets, filled))
    document = Document(
        step=step,
        tokens=step * 1000,
        created="2026-01-01T00:00:00+00:00",
        run_id="abcd",
        nodes=tuple(map(tuple, nodes or [range(len(own))])),
        versions={"hpcsync": "0", "torch": torch.__version__},
        config=config,
        common=flat.skeleton,
        own=tuple(each.skeleton for each in owned),
    )
    every = [*metas, *(meta for each in owned for meta in state.metas(each.tensors))]
    final = checkpoints / folders.step_name(step)
    publish(fresh, final, document, every, parts)
    folders.set_latest(checkpoints, step)
    return final


def example(ranks: int = 2, seed: int = 0) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A small state of a model in training: what ranks share, and what each has."""
    random = torch.Generator().manual_seed(seed)
    weights = {
        "embed.weight": torch.randn(33, 7, generator=random),
        "blocks.0.weight": torch.randn(1, 50, generator=random),
        "blocks.0.bias": torch.randn(5, generator=random).to(torch.bfloat16),
        "norm.count": torch.tensor(7),
        "norm.none": torch.zeros(0, 3),
        "mask": torch.tensor([True, False, True]),
    }
    common = {
        "model": weights,
        "optimizer": {"exp_avg": {name: 2 * value for name, value in weights.items()}},
        "loss_scale": float("inf"),
        "sampler": {"step": 100, "order": [1, 2, 3]},
    }
    own = [
        {"torch": torch.arange(40 + rank, dtype=torch.uint8), "numpy": np.arange(3) + rank}
        for rank in range(ranks)
    ]
    return common, own


def same(one: Any, other: Any) -> bool:
    """Whether two trees are the same to the bit, types included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and same(_bits(one), _bits(other))
    if isinstance(one, np.ndarray):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and one.tobytes() == other.tobytes()
    return repr(one) == repr(other)


def _bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.reshape(*tensor.shape, tensor.element_size())


def _whole(flat: state.Flat) -> list[layout.Piece]:
    return [layout.whole(meta) for meta in state.metas(flat.tensors) if meta.nbytes]
