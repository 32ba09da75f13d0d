"""The optimizer of a deck."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from .config import TrainConfig
from .errors import UserError
from .onebit_adam import OneBitAdam


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """AdamW (Loshchilov and Hutter, ICLR 2019), or 1-bit Adam; vectors such as biases and norms do
    not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise UserError("model: no parameter takes a gradient, so there is nothing to train")
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    settings: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "fused": fused or None,
    }
    taken = [group for group in groups if group["params"]]
    if config.optimizer == "onebit_adam":
        return OneBitAdam(taken, **settings, freeze=config.freeze)
    return AdamW(taken, **settings)
