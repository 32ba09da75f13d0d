"""A decoder-only transformer: pre-norm blocks, learned positions, GELU.

The shape is GPT-2's (Radford et al., 2019), without biases in the linear layers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpcsync.errors import ModelError

if TYPE_CHECKING:
    from hpcsync.config import ModelConfig
    from hpcsync.data.base import Source


def build(config: ModelConfig, source: Source, *, tied: bool = True) -> nn.Module:
    """A GPT for the vocabulary of ``source``; ``tied`` uses the embedding as output layer too.

    Raises ``ModelError`` when the samples are not tokens or heads do not divide the width.
    """
    if source.vocab <= 0:
        raise ModelError(
            "model.name = 'gpt' takes tokens, but the data gives samples of another kind; "
            "use model.name=mlp or convnet, or data of tokens"
        )
    if config.width % config.heads:
        raise ModelError(
            f"model.heads = {config.heads} does not divide model.width = {config.width}: "
            "each head takes an equal share of the width"
        )
    return GPT(
        vocab=source.vocab,
        context=config.context,
        layers=config.layers,
        width=config.width,
        heads=config.heads,
        hidden=config.hidden or 4 * config.width,
        dropout=config.dropout,
        tied=tied,
    )


class GPT(nn.Module):
    """Predicts each token from those before it. Shapes: B samples, T <= context tokens."""

    def __init__(
        self,
        *,
        vocab: int,
        context: int,
        layers: int,
        width: int,
        heads: int,
        hidden: int,
        dropout: float = 0.0,
        tied: bool = True,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.positions = nn.Parameter(torch.empty(context, width))
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Block(width, heads, hidden, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self._initialise()

    def logits(self, inputs: Tensor) -> Tensor:
        """Scores (B, T, vocab) of the next token after each of the tokens (B, T), int64."""
        x = self.dropout(self.embedding(inputs) + self.positions[: inputs.shape[1]])
        for layer in self.layers:
            x = layer(x)
        scores: Tensor = self.head(self.norm(x))
        return scores

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per target of int64 tokens, both (B, T): float32 scalar."""
        # In float32 even under autocast: eight bits of mantissa lose the small differences.
        return F.cross_entropy(self.logits(inputs).flatten(0, 1).float(), targets.flatten())

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def _initialise(self) -> None:
        # GPT-2's scheme: what adds into the residual stream is scaled down by its depth.
        residual = 0.02 / math.sqrt(2 * max(1, len(self.layers)))
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=residual if name.endswith("out.weight") else 0.02)


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each added to its input. (B, T, width) to itself."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = Perceptron(width, hidden, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class Attention(nn.Module):
    """Causal self-attention of several heads. (B, T, width) to itself."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.rate = dropout
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.rate if self.training else 0.0
        )
        y: Tensor = self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        return y


class Perceptron(nn.Module):
    """Linear, GELU, linear. (B, T, width) to itself."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Linear(width, hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(self.out(F.gelu(self.inner(x), approximate="tanh")))
        return y
