"""What the results of steps add up to: what was skipped, and what the loss scale learns of it.

With a ``lag`` results are read a step late, or earlier by who asks for a state. When they are read
must not change what is computed, so the loss scale follows a step's result only when the steps
after it are ``lag``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from .config import TrainConfig
from .errors import NonFiniteError
from .outcome import StepResult
from .rules import LossScale


class Tally:
    """Counts of a run, the same on all ranks.

    Args:
        lag: steps whose results are read late.

    Attributes:
        scale: of the loss.
        counted: steps whose results were read.
        skipped: of these, those that left the weights as they were; and how many in a row.
    """

    def __init__(self, config: TrainConfig, lag: int) -> None:
        self.scale = LossScale(config.loss_scale)
        self.counted = self.skipped = self.skipped_in_row = 0
        self._most = config.max_skipped
        self._lag = lag
        self._overflowed: float | None = None  # the scale of the last step, if it was skipped
        self._unscaled: deque[StepResult] = deque()  # that the loss scale has yet to follow

    def count(self, result: StepResult) -> None:
        """A step's result was read."""
        self.counted = result.step
        if self.scale.dynamic:
            self._unscaled.append(result)
        self.skipped += result.skipped
        # With a lag the step after an overflow was given with the same scale.
        again = self._lag and self.scale.can_fall and result.loss_scale == self._overflowed
        if not (result.skipped and again):
            self.skipped_in_row = self.skipped_in_row + 1 if result.skipped else 0
        self._overflowed = result.loss_scale if result.skipped else None

    def follow(self, begun: int) -> float:
        """Let the loss scale learn from all steps but the last ``lag`` of those that were begun;
        by what factor it changed."""
        before = self.scale.value
        while self._unscaled and self._unscaled[0].step <= begun - self._lag:
            result = self._unscaled.popleft()
            self.scale.update(not result.skipped, result.loss_scale)
        return self.scale.value / before

    def check(self) -> None:
        """End a run that learns nothing any more.

        Raises:
            NonFiniteError: more than ``train.max_skipped`` steps in a row had gradients of NaN
                or Inf; on all ranks alike.
        """
        if self.skipped_in_row > self._most:
            raise NonFiniteError(
                f"step {self.counted}: gradients were NaN or Inf in {self.skipped_in_row} "
                f"steps in a row (train.max_skipped allows {self._most}); lower "
                "train.lr or set train.clip_norm"
            )

    def state_dict(self) -> dict[str, Any]:
        """All that later steps depend on."""
        late = [[each.step, each.skipped, each.loss_scale] for each in self._unscaled]
        return {
            "loss_scale": self.scale.state_dict() | ({"late": late} if late else {}),
            "skipped": self.skipped,
            "skipped_in_row": self.skipped_in_row,
        }

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Go on from there, after ``step``."""
        self.scale.load_state_dict(state["loss_scale"])
        self._unscaled = deque(
            StepResult(step=step, loss=0, grad_norm=0, lr=0, loss_scale=scale, skipped=skipped)
            for step, skipped, scale in state["loss_scale"].get("late", [])
        )
        self.counted = step
        self.skipped = int(state["skipped"])
        self.skipped_in_row = int(state["skipped_in_row"])
        last = self._unscaled[-1] if self._unscaled else None
        self._overflowed = last.loss_scale if last is not None and last.skipped else None
