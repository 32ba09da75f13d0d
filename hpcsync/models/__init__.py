"""Models by name: what the deck's ``model`` section names becomes an ``nn.Module``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from hpcsync import registry
from hpcsync.errors import ModelError
from hpcsync.models.base import (
    ParameterCounts,
    checkpoint_activations,
    compile_model,
    parameter_counts,
)

if TYPE_CHECKING:
    from hpcsync.config import ModelConfig
    from hpcsync.data.base import Source

__all__ = [
    "BUILTINS",
    "ParameterCounts",
    "build",
    "checkpoint_activations",
    "compile_model",
    "parameter_counts",
]

BUILTINS = {
    "gpt": "hpcsync.models.gpt:build",
    "mlp": "hpcsync.models.mlp:build",
    "convnet": "hpcsync.models.convnet:build",
}


def build(config: ModelConfig, source: Source) -> nn.Module:
    """The model that ``config`` names, for the samples of ``source``.

    Called with inputs and targets it gives their mean loss, a scalar in nats per target. Weights
    are drawn from torch's generator: seed it first. Raises ``ModelError``.
    """
    factory = registry.resolve("model", config.name, BUILTINS)
    model = registry.call(
        "model", config.name, factory, config, source, options=dict(config.options)
    )
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model.name = {config.name!r}: it returned a {type(model).__name__}, "
            "not a torch.nn.Module"
        )
    return model
