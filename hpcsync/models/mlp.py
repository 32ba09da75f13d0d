"""A multi-layer perceptron that sorts samples of numbers into classes."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from hpcsync.errors import ModelError

if TYPE_CHECKING:
    from hpcsync.config import ModelConfig
    from hpcsync.data.base import Source


def build(config: ModelConfig, source: Source) -> nn.Module:
    """``config.layers`` hidden layers of width ``config.hidden`` (0: ``config.width``).

    Raises ``ModelError`` when the samples are tokens or have no classes.
    """
    if source.vocab or source.classes < 1:
        raise ModelError(
            "model.name = 'mlp' sorts samples of numbers into classes, which this data does not "
            "give; use model.name=gpt for tokens, or data.name=digits"
        )
    return MLP(
        inputs=math.prod(source.sample_shape),
        classes=source.classes,
        layers=config.layers,
        width=config.hidden or config.width,
        dropout=config.dropout,
    )


class MLP(nn.Module):
    """Linear layers with ReLU between them. Samples of any shape are flattened."""

    def __init__(
        self, *, inputs: int, classes: int, layers: int, width: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        sizes = [inputs] + [width] * layers
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Dropout(dropout))
            for a, b in pairwise(sizes)
        )
        self.head = nn.Linear(sizes[-1], classes)

    def logits(self, inputs: Tensor) -> Tensor:
        """Scores (B, classes) of float samples (B, ...)."""
        x = inputs.flatten(1)
        for layer in self.layers:
            x = layer(x)
        scores: Tensor = self.head(x)
        return scores

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per sample; targets int64 (B,): float32 scalar."""
        return F.cross_entropy(self.logits(inputs).float(), targets)

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)
