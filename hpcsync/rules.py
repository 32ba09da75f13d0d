"""What changes from step to step by rule: the learning rate and the loss scale."""

from __future__ import annotations

import math

from .config import TrainConfig

# Loss scale: start, growth after so many good steps in a row, and bounds (as torch.amp's).
_SCALE_START = 2.0**16
_SCALE_PATIENCE = 2000
_SCALE_MAX = 2.0**24
_SCALE_MIN = 2.0**-14


class LossScale:
    """A constant factor on the loss, or one that follows the gradients' range.

    The dynamic rule is that of Micikevicius et al., "Mixed precision training", ICLR 2018,
    section 3.2: halve on overflow, double after many steps without one.
    """

    def __init__(self, setting: float | str) -> None:
        self.dynamic = setting == "dynamic"
        self.value = 1.0 if setting == "none" else _SCALE_START if self.dynamic else float(setting)
        self._good = 0

    @property
    def can_fall(self) -> bool:
        """Whether an overflow makes it smaller."""
        return self.dynamic and self.value > _SCALE_MIN

    def update(self, finite: bool, used: float | None = None) -> None:
        """Learn whether a step's gradients were finite; must be told alike on all ranks.

        Args:
            used: the scale of that step, if it may be an older one: that a scale was too large,
                which has been taken back since, is no news.
        """
        if not self.dynamic or (not finite and used is not None and used > self.value):
            return
        self._good = self._good + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, _SCALE_MIN)
        elif self._good >= _SCALE_PATIENCE:
            self.value, self._good = min(self.value * 2, _SCALE_MAX), 0

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "good": self._good}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value, self._good = float(state["value"]), int(state["good"])


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then half a cosine down to ``min_lr`` times ``lr`` at the last step.

    ``step`` counts from 0. (Loshchilov and Hutter, "SGDR", ICLR 2017, equation 5.)
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    span = max(1, config.steps - 1 - config.warmup)
    progress = min(1.0, (step - config.warmup) / span)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr + (1 - config.min_lr) * cosine)
