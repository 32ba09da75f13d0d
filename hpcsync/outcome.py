"""What a step came to: numbers that the host has at once, or reads when a device has made them.

On a device the host never waits within a step. It gives a step's work, the last of which copies
three numbers to pinned memory, and reads them when it has given the next step's:

    host     give 1    give 2, read 1    give 3, read 2    ...    give n, read n - 1, read n
    device          step 1      step 2      step 3  ...
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .device import Device, Event
from .trace.recorder import Recorder, Span, now

_NUMBERS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step came to on this rank.

    Attributes:
        step: counted from 1.
        loss: mean over this rank's micro-batches, in nats a target.
        grad_norm: of the mean gradients of all ranks, unscaled, before clipping.
        lr: learning rate of the step.
        loss_scale: factor on the loss in this step; 1 when there is none.
        skipped: gradients were not finite and the weights were left as they were.
        factor: by which the mean gradients were multiplied for the update.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    loss_scale: float
    skipped: bool
    factor: float = 1.0


class Pending:
    """A step whose work has been given to a device.

    Args:
        step, lr, loss_scale: as of ``StepResult``.
        loss, norm, factor: scalars that the device makes.
    """

    def __init__(
        self,
        device: Device,
        step: int,
        lr: float,
        loss_scale: float,
        loss: Tensor,
        norm: Tensor,
        factor: Tensor,
    ) -> None:
        self.step, self.lr, self.loss_scale = step, lr, loss_scale
        host = torch.from_numpy(device.pinned(8 * _NUMBERS)).view(torch.float64)
        stream = device.current()
        numbers = [loss, norm, factor]
        stream.apply(
            lambda: host.copy_(torch.stack([each.double() for each in numbers]), non_blocking=True)
        )
        self.event: Event = stream.record(timed=device.queued)
        self._host = host

    def read(self) -> StepResult:
        """The numbers; sleeps until they are there."""
        self.event.synchronize()
        loss, norm, factor = self._host.tolist()
        skipped = not math.isfinite(norm)
        return StepResult(
            step=self.step,
            loss=loss,
            grad_norm=norm,
            lr=self.lr,
            loss_scale=self.loss_scale,
            skipped=skipped,
            factor=1.0 if skipped else factor,
        )


class Stopwatch:
    """Times the parts of a step: by the host's clock, or where a device does the work, by its."""

    def __init__(self, recorder: Recorder, device: Device) -> None:
        self._recorder, self._device = recorder, device

    def mark(self) -> Any:
        """A point in this thread's work."""
        return self._device.current().record(timed=True) if self._device.queued else now()

    def span(self, span: Span, start: Any, end: Any) -> None:
        """Record what lies between two points."""
        add = self._recorder.later.add if self._device.queued else self._recorder.add
        add(span, start, end)
