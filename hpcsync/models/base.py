"""What a model is, and what can be done to any of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hpcsync.errors import ModelError


class Model(Protocol):
    """A factory ``build(config: ModelConfig, source: Source, **options) -> nn.Module`` makes one.

    Only ``forward`` is asked of a user's model; without ``blocks`` activations cannot be
    checkpointed.
    """

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss, a float32 scalar in nats per target."""
        ...

    def blocks(self) -> list[nn.Module]:
        """Modules whose inside may be computed again in the backward pass; may be empty."""
        ...


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Numbers of elements; ``nbytes`` counts parameters and buffers."""

    total: int
    trainable: int
    nbytes: int


def parameter_counts(model: nn.Module) -> ParameterCounts:
    """Sizes of a model; a parameter shared by several modules counts once."""
    parameters, buffers = list(model.parameters()), list(model.buffers())
    return ParameterCounts(
        total=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        nbytes=sum(t.numel() * t.element_size() for t in [*parameters, *buffers]),
    )


def checkpoint_activations(model: nn.Module) -> int:
    """Keep only the inputs of the model's blocks and compute the rest again in the backward pass.

    Changes the model in place, not the names of its parameters; call it before ``torch.compile``.
    Returns the number of blocks. Raises ``ModelError`` when the model names no blocks.
    """
    blocks = _blocks(model)
    if not blocks:
        raise ModelError(
            f"train.activation_checkpointing: {type(model).__name__} names no blocks to compute "
            "again; give it a method blocks(), or set train.activation_checkpointing=false"
        )
    for block in blocks:
        if not isinstance(block.forward, functools.partial):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return len(blocks)


def compile_model(model: nn.Module) -> None:
    """torch.compile in place, block by block where the model names blocks.

    A backward pass compiled as one piece gives all gradients at its end, too late to overlap
    their exchange with it; blocks give them one after the other, and equal ones compile once.
    """
    for module in _blocks(model) or [model]:
        module.compile()


def _blocks(model: nn.Module) -> list[Any]:
    listed = getattr(model, "blocks", None)
    return list(listed()) if callable(listed) else []
