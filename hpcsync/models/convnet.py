"""A small convolutional network with batch normalisation, for pictures in classes."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from hpcsync.errors import ModelError

if TYPE_CHECKING:
    from hpcsync.config import ModelConfig
    from hpcsync.data.base import Source


def build(config: ModelConfig, source: Source) -> nn.Module:
    """``config.layers`` convolutions of ``config.hidden`` channels (0: ``config.width``).

    Raises ``ModelError`` when samples are not pictures (channels, height, width) with classes.
    """
    if source.vocab or source.classes < 1 or len(source.sample_shape) != 3:
        raise ModelError(
            "model.name = 'convnet' sorts pictures (channels, height, width) into classes, which "
            "this data does not give; use model.name=gpt for tokens, or data.name=digits"
        )
    return ConvNet(
        channels=source.sample_shape[0],
        classes=source.classes,
        layers=config.layers,
        width=config.hidden or config.width,
        dropout=config.dropout,
    )


class ConvNet(nn.Module):
    """3x3 convolutions, each with batch normalisation and ReLU; the middle one halves the size.

    Batch statistics are those of a rank's own micro-batch.
    """

    def __init__(
        self, *, channels: int, classes: int, layers: int, width: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        sizes = [channels] + [width] * layers
        self.layers = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(a, b, 3, padding=1, stride=2 if i == layers // 2 else 1, bias=False),
                    nn.BatchNorm2d(b),
                    nn.ReLU(),
                )
                for i, (a, b) in enumerate(pairwise(sizes))
            )
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(sizes[-1], classes)

    def logits(self, inputs: Tensor) -> Tensor:
        """Scores (B, classes) of float pictures (B, channels, height, width)."""
        features = self.layers(inputs).mean(dim=(2, 3))
        scores: Tensor = self.head(self.dropout(features))
        return scores

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per picture; targets int64 (B,): float32 scalar."""
        return F.cross_entropy(self.logits(inputs).float(), targets)

    def blocks(self) -> list[nn.Module]:
        # None: computed again, a block would count its batch twice in the running statistics.
        return []
