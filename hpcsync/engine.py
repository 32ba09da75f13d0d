"""One training step: forward, backward, agreement on the gradients, optimizer.

    zero gradients
    for each micro-batch: forward under autocast, loss x scale / micro-batches, backward
                          (all but the last under no_sync; the last joins the exchange)
    global norm -> finite on every rank? -> unscale and clip in one pass -> learning rate -> AdamW
                                        \\-> skip the step, shrink the scale

Gradients are means over all ranks when backward returns, the same bits everywhere, so every
rank decides alike from its own copy and nothing more need be exchanged.

On a device whose work is queued the host decides nothing within a step: norm, clipping and
skipping are work of the device, and what a step came to is read when the next one's work has been
given (``outcome``). The results are the same bits. One thing lags: a dynamic loss scale follows
an overflow one step later, so that a second step may be skipped for the same overflow; for
``train.max_skipped`` both are one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from .config import TrainConfig
from .device import Device
from .device import host as host_device
from .onebit_adam import OneBitAdam
from .optimizer_state import by_name, by_number
from .outcome import Pending, Stopwatch
from .outcome import StepResult as StepResult
from .rules import LossScale, learning_rate
from .tally import Tally
from .tied import check_weights, untied
from .trace.recorder import BACKWARD, FORWARD, OPTIMIZER, Recorder

Batch = tuple[Tensor, Tensor]


class DataParallelLike(Protocol):
    """What the engine asks of ``hpcsync.DataParallel``."""

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor: ...

    def no_sync(self) -> AbstractContextManager[None]: ...

    def norm(self) -> Tensor: ...

    def rescale(self, factor: float) -> None: ...


class Engine:
    """A model, its optimizer and its gradients, one step at a time.

    Args:
        model: the module inside ``data_parallel``; on one device.
        optimizer: over the model's parameters.
        data_parallel: wraps ``model``: called with inputs and targets it gives the mean loss
            of a micro-batch; after the last backward its gradients are means over all ranks.
        config: lengths, precision, clipping and the learning rate.
        recorder: of the times of each step; made if not given.
        streams: the device that the model is on, as the exchange knows it; the host if not given.
        lag: steps whose results are read late, 0 or 1; what suits the device if not given.

    Attributes:
        step_count: steps that were begun.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        data_parallel: DataParallelLike,
        config: TrainConfig,
        recorder: Recorder | None = None,
        streams: Device | None = None,
        lag: int | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.data_parallel = data_parallel
        self.config = config
        self.recorder = recorder or Recorder()
        self.streams = streams or host_device()
        self.lag = int(self.streams.queued and skips_by_itself(optimizer)) if lag is None else lag
        self._tally = Tally(config, self.lag)
        self.momentum = optimizer.momentum if isinstance(optimizer, OneBitAdam) else None
        self.step_count = 0
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._watch = Stopwatch(self.recorder, self.streams)
        self._pending: deque[Pending] = deque()
        self._read: deque[StepResult] = deque()  # not yet given to who called ``step``

    @property
    def scale(self) -> LossScale:
        """The factor on the loss."""
        return self._tally.scale

    @property
    def counted(self) -> int:
        """Steps whose results were read."""
        return self._tally.counted

    @property
    def skipped(self) -> int:
        """Of these, those that left the weights as they were."""
        return self._tally.skipped

    @property
    def skipped_in_row(self) -> int:
        """How many of the last ones did."""
        return self._tally.skipped_in_row

    def step(self, micro_batches: Sequence[Batch]) -> StepResult | None:
        """Train on this rank's micro-batches of one global batch.

        Args:
            micro_batches: ``train.accumulate`` pairs of inputs and targets, of equal size on
                all ranks.

        Returns:
            The step's result; with a ``lag`` that of the step before, or None if there is none
            that was not given.
        """
        begun = self._watch.mark()
        self._follow_scale()
        self.model.train()
        self.optimizer.zero_grad()
        scale = self.scale.value
        # Momentum comes without the loss scale, and is not clipped.
        scaled = self.momentum is None or not self.momentum.active
        if self.momentum is not None:
            self.momentum.scale = scale
        loss = self._backward(micro_batches, scale)
        start = self._watch.mark()
        with self.streams.range("optimizer"):
            if self.lag:
                self._update_later(loss, scale)
            else:
                self._read.append(self._update_now(loss, scale, scaled))
        # A device's spans end no later than the event whose result is waited for.
        ended = self._pending[-1].event if self.lag and self.streams.queued else self._watch.mark()
        self._watch.span(OPTIMIZER, start, ended)
        if self.streams.queued and not self.lag:  # who wants the step's spans asks for them soon
            ended.synchronize()
            self.recorder.later.settle()
        if not self.lag:
            self._follow_scale(units=scaled)
        elif self.streams.queued:
            self.recorder.end_step_later(begun, ended)
        else:
            self.recorder.end_step(begun)
        while len(self._pending) > self.lag:
            self._land()
        return self._read.popleft() if self._read else None

    def flush(self) -> StepResult | None:
        """The last step's result, if it was not given yet; waits for the device."""
        while self._pending:
            self._land()
        return self._read.popleft() if self._read else None

    def _land(self) -> None:
        result = self._pending.popleft().read()
        self._tally.count(result)
        self._read.append(result)
        self.recorder.later.settle()

    def _update_now(self, loss: Tensor, scale: float, scaled: bool) -> StepResult:
        norm = float(self.data_parallel.norm()) / (scale if scaled else 1.0)
        finite = math.isfinite(norm)
        factor = self._scale_gradients(norm, scale) if finite and scaled else 1.0
        result = StepResult(
            step=self.step_count + 1,
            loss=float(loss),
            grad_norm=norm,
            lr=learning_rate(self.config, self.step_count),
            loss_scale=scale,
            skipped=not finite,
            factor=factor,
        )
        self._update(result)
        return result

    def _update_later(self, loss: Tensor, scale: float) -> None:
        """As ``_update_now``, to the same bits, without knowing any of the numbers."""
        lr, clip = learning_rate(self.config, self.step_count), self.config.clip_norm
        # Tensors throughout: torch divides by a number, or a number, with one rounding more.
        norm = self.data_parallel.norm().detach().double()
        one, units = torch.ones_like(norm), torch.full_like(norm, scale)
        norm = norm / units
        clipped = torch.full_like(norm, clip) / (norm + 1e-6) if clip > 0 else one
        factor = torch.minimum(clipped, one) / units
        if clip > 0 or scale != 1.0:
            multiply(self._gradients(), factor)
        # The optimizer leaves all as it is where that is 1.
        skips: Any = self.optimizer
        skips.found_inf = torch.logical_not(torch.isfinite(norm)).float()
        self._move(lr)
        skips.found_inf = None
        self.step_count += 1
        pending = Pending(self.streams, self.step_count, lr, scale, loss, norm, factor)
        self._pending.append(pending)

    def _follow_scale(self, *, units: bool = True) -> None:
        """Take the loss scale that results of before ask for.

        Args:
            units: what is exchanged comes in other units with another scale.
        """
        factor = self._tally.follow(self.step_count)
        if units and factor != 1.0:
            self.data_parallel.rescale(factor)

    def repeat(self, numbers: Mapping[str, Any]) -> StepResult:
        """Do a step's update again, to the same bits, on the gradients that stand in the
        parameters: those of the step, multiplied by its ``factor``.

        Args:
            numbers: the attributes of the ``StepResult``.
        """
        result = StepResult(**numbers)
        self._update(result)
        self._follow_scale(units=False)
        self.optimizer.zero_grad()
        return result

    def _update(self, result: StepResult) -> None:
        """The optimizer's step, unless it is skipped, and what counts steps."""
        if not result.skipped:
            self._move(result.lr)
        self.step_count = result.step
        self._tally.count(result)

    def _move(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def check_skipped(self) -> None:
        """End a run that learns nothing any more.

        Apart from ``step``, since a loss of NaN on one rank, which makes gradients NaN on all,
        is worth telling first.

        Raises:
            NonFiniteError: more than ``train.max_skipped`` steps in a row had gradients of NaN
                or Inf; on all ranks alike.
        """
        self._tally.check()

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """Held-out loss of this rank's share, without communication.

        Returns:
            The sum over samples of their mean loss in nats a target, and the number of samples;
            sums of both over all ranks give the mean.
        """
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        self.model.eval()
        try:
            with torch.no_grad(), self._autocast():
                for inputs, targets in batches:
                    inputs, targets = self._to_device(inputs, targets)
                    total += self.model(inputs, targets).double() * len(inputs)
                    count += len(inputs)
        finally:
            self.model.train()
        return float(total), count

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer, loss scale and counts: all that later steps depend on.

        Waits for the last step. The tensors are the engine's own. A tensor of several names stands
        under the first; ``ties`` tells the others. The optimizer's state is by field and
        parameter's name.
        """
        while self._pending:
            self._land()
        weights, ties = untied(self.model.state_dict())
        return {
            "model": weights,
            "ties": ties,
            "optimizer": by_name(self.model, self.optimizer),
            "step": self.step_count,
            **self._tally.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; rates, decays and the like stay as they are here.

        Raises:
            CheckpointError: it belongs to another model or optimizer; nothing was changed.
        """
        weights = dict(state["model"])
        weights |= {name: weights[first] for name, first in state["ties"].items()}
        check_weights(weights, self.model.state_dict())
        kept = by_number(self.model, self.optimizer, state["optimizer"])
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(
            {"state": kept, "param_groups": self.optimizer.state_dict()["param_groups"]}
        )
        self._pending.clear()
        self._read.clear()
        self.step_count = int(state["step"])
        self._tally.load_state_dict(state, self.step_count)

    def _backward(self, micro_batches: Sequence[Batch], scale: float) -> Tensor:
        """Accumulate gradients; the mean loss stays a tensor until nothing waits for it."""
        assert micro_batches, "a step without data"
        last, recorder, watch = len(micro_batches) - 1, self.recorder, self._watch
        recorder.joined = 0
        total: Tensor | None = None
        for index, (inputs, targets) in enumerate(micro_batches):
            inputs, targets = self._to_device(inputs, targets)
            with nullcontext() if index == last else self.data_parallel.no_sync():
                start = watch.mark()
                with self.streams.range("forward"), self._autocast():
                    loss = self.data_parallel(inputs, targets)
                between = watch.mark()
                with self.streams.range("backward"):
                    (loss * (scale / len(micro_batches))).backward()  # type: ignore[no-untyped-call]
                # The wait for other ranks at its end is no computation.
                ended = recorder.joined or watch.mark()
                watch.span(FORWARD, start, between)
                watch.span(BACKWARD, between, ended)
            found = loss.detach().float()
            total = found if total is None else total + found
        assert total is not None
        return total / len(micro_batches)

    def _scale_gradients(self, norm: float, scale: float) -> float:
        """Take the loss scale out and clip, in one pass over the gradients or none; by what factor
        that was."""
        clip = self.config.clip_norm
        factor = (min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0) / scale
        gradients = self._gradients()
        if factor != 1.0 and gradients:
            torch._foreach_mul_(gradients, factor)
        return factor

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _to_device(self, inputs: Tensor, targets: Tensor) -> Batch:
        if self.device.type != "cpu":  # only from pinned memory does the host not wait for the copy
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        return (
            inputs.to(self.device, non_blocking=True),
            targets.to(self.device, non_blocking=True),
        )


def skips_by_itself(optimizer: Optimizer) -> bool:
    """Whether its step can be told on the device to leave all as it is."""
    return type(optimizer) is AdamW and all(group["fused"] for group in optimizer.param_groups)


def multiply(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply in place by a float64 scalar on their device; float32 and float64 to the same bits
    as by a number."""
    plain: dict[torch.dtype, list[Tensor]] = {}
    for each in tensors:
        if each.dtype in (torch.float32, torch.float64):
            plain.setdefault(each.dtype, []).append(each)
        else:  # a scalar tensor would be rounded to their type first
            each.copy_(each.float() * factor.float())
    for dtype, found in plain.items():
        torch._foreach_mul_(found, factor.to(dtype))
