"""One training step: forward, backward, agreement on the gradients, optimizer.

    zero gradients
    for each micro-batch: forward under autocast, loss x scale / micro-batches, backward
                          (all but the last under no_sync; the last joins the exchange)
    global norm -> finite on every rank? -> unscale and clip in one pass -> learning rate -> AdamW
                                        \\-> skip the step, shrink the scale

Gradients are means over all ranks when backward returns, the same bits everywhere, so every
rank decides alike from its own copy and nothing more need be exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .config import TrainConfig
from .errors import CheckpointError, HpcsyncError, NonFiniteError
from .onebit_adam import OneBitAdam
from .rules import LossScale, learning_rate
from .trace.recorder import BACKWARD, FORWARD, OPTIMIZER, Recorder, now

Batch = tuple[Tensor, Tensor]


class ExhaustedError(HpcsyncError):
    """A rank has no more memory, of the host or of its device."""


class DataParallelLike(Protocol):
    """What the engine asks of ``hpcsync.DataParallel``."""

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor: ...

    def no_sync(self) -> AbstractContextManager[None]: ...

    def norm(self) -> Tensor: ...

    def rescale(self, factor: float) -> None: ...


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


class Engine:
    """A model, its optimizer and its gradients, one step at a time.

    Args:
        model: the module inside ``data_parallel``; on one device.
        optimizer: over the model's parameters.
        data_parallel: wraps ``model``: called with inputs and targets it gives the mean loss
            of a micro-batch; after the last backward its gradients are means over all ranks.
        config: lengths, precision, clipping and the learning rate.
        recorder: of the times of each step; made if not given.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        data_parallel: DataParallelLike,
        config: TrainConfig,
        recorder: Recorder | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.data_parallel = data_parallel
        self.config = config
        self.recorder = recorder or Recorder()
        self.scale = LossScale(config.loss_scale)
        self.momentum = optimizer.momentum if isinstance(optimizer, OneBitAdam) else None
        self.step_count = 0
        self.skipped = 0
        self.skipped_in_row = 0
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def step(self, micro_batches: Sequence[Batch]) -> StepResult:
        """Train on this rank's micro-batches of one global batch.

        Args:
            micro_batches: ``train.accumulate`` pairs of inputs and targets, of equal size on
                all ranks.
        """
        self.model.train()
        self.optimizer.zero_grad()
        scale = self.scale.value
        # Momentum comes without the loss scale, and is not clipped.
        scaled = self.momentum is None or not self.momentum.active
        if self.momentum is not None:
            self.momentum.scale = scale
        loss = self._backward(micro_batches, scale)
        start = now()
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
        self.recorder.add(OPTIMIZER, start, now())
        if self.scale.value != scale and scaled:
            self.data_parallel.rescale(self.scale.value / scale)
        return result

    def repeat(self, numbers: Mapping[str, Any]) -> StepResult:
        """Do a step's update again, to the same bits, on the gradients that stand in the
        parameters: those of the step, multiplied by its ``factor``.

        Args:
            numbers: the attributes of the ``StepResult``.
        """
        result = StepResult(**numbers)
        self._update(result)
        self.optimizer.zero_grad()
        return result

    def _update(self, result: StepResult) -> None:
        """The optimizer's step, unless it is skipped, and what counts steps."""
        if not result.skipped:
            for group in self.optimizer.param_groups:
                group["lr"] = result.lr
            self.optimizer.step()
        self.scale.update(not result.skipped)
        self.step_count = result.step
        self.skipped += result.skipped
        self.skipped_in_row = self.skipped_in_row + 1 if result.skipped else 0

    def check_skipped(self) -> None:
        """End a run that learns nothing any more.

        Apart from ``step``, since a loss of NaN on one rank, which makes gradients NaN on all,
        is worth telling first.

        Raises:
            NonFiniteError: more than ``train.max_skipped`` steps in a row had gradients of NaN
                or Inf; on all ranks alike.
        """
        if self.skipped_in_row > self.config.max_skipped:
            raise NonFiniteError(
                f"step {self.step_count}: gradients were NaN or Inf in {self.skipped_in_row} "
                f"steps in a row (train.max_skipped allows {self.config.max_skipped}); lower "
                "train.lr or set train.clip_norm"
            )

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """Held-out loss of this rank's share, without communication.

        Returns:
            The sum over samples of their mean loss in nats a target, and the number of samples;
            sums of both over all ranks give the mean.
        """
        total, count = 0.0, 0
        self.model.eval()
        try:
            with torch.no_grad(), self._autocast():
                for inputs, targets in batches:
                    inputs, targets = self._to_device(inputs, targets)
                    total += float(self.model(inputs, targets)) * len(inputs)
                    count += len(inputs)
        finally:
            self.model.train()
        return total, count

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer, loss scale and counts: all that later steps depend on.

        The tensors are the engine's own. A tensor of several names stands under the first;
        ``ties`` tells the others. The optimizer's state is by field and parameter's name.
        """
        weights, ties = untied(self.model.state_dict())
        return {
            "model": weights,
            "ties": ties,
            "optimizer": self._optimizer_state(),
            "loss_scale": self.scale.state_dict(),
            "step": self.step_count,
            "skipped": self.skipped,
            "skipped_in_row": self.skipped_in_row,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; rates, decays and the like stay as they are here.

        Raises:
            CheckpointError: it belongs to another model or optimizer; nothing was changed.
        """
        weights = dict(state["model"])
        weights |= {name: weights[first] for name, first in state["ties"].items()}
        check_weights(weights, self.model.state_dict())
        kept = self._checked(state["optimizer"])
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(
            {"state": kept, "param_groups": self.optimizer.state_dict()["param_groups"]}
        )
        self.scale.load_state_dict(state["loss_scale"])
        self.step_count = int(state["step"])
        self.skipped = int(state["skipped"])
        self.skipped_in_row = int(state["skipped_in_row"])

    def _optimizer_state(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        for param, fields in self.optimizer.state.items():
            for field, value in fields.items():
                found.setdefault(field, {})[names[param]] = value
        return found

    def _checked(self, fields: Mapping[str, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
        """The optimizer's state as torch counts its parameters."""
        names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        places = {names[param]: (index, param) for index, param in enumerate(params)}
        kept: dict[int, dict[str, Any]] = {}
        for field, values in fields.items():
            for name, value in values.items():
                place = places.get(name)
                sized = isinstance(value, Tensor) and value.ndim
                if place is None or (sized and value.shape != place[1].shape):
                    raise CheckpointError(
                        f"checkpoint: optimizer/{field}/{name} is of no parameter that is trained "
                        "here; resume with the model of before"
                    )
                kept.setdefault(place[0], {})[field] = value
        if "exp_avg_sq" not in fields and not isinstance(self.optimizer, OneBitAdam) and fields:
            raise CheckpointError(
                "checkpoint: its optimizer is onebit_adam, past the freeze, whose variance AdamW "
                "cannot take up; resume with train.optimizer=onebit_adam"
            )
        return kept

    def _backward(self, micro_batches: Sequence[Batch], scale: float) -> Tensor:
        """Accumulate gradients; the mean loss stays a tensor until nothing waits for it."""
        assert micro_batches, "a step without data"
        last, recorder = len(micro_batches) - 1, self.recorder
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for index, (inputs, targets) in enumerate(micro_batches):
            inputs, targets = self._to_device(inputs, targets)
            with nullcontext() if index == last else self.data_parallel.no_sync():
                start = now()
                with self._autocast():
                    loss = self.data_parallel(inputs, targets)
                between = now()
                (loss * (scale / len(micro_batches))).backward()  # type: ignore[no-untyped-call]
                # The wait for other ranks at its end is no computation.
                ended = recorder.joined if recorder.joined > between else now()
                recorder.add(FORWARD, start, between)
                recorder.add(BACKWARD, between, ended)
            total += loss.detach().float()
        return total / len(micro_batches)

    def _scale_gradients(self, norm: float, scale: float) -> float:
        """Take the loss scale out and clip, in one pass over the gradients or none; by what factor
        that was."""
        clip = self.config.clip_norm
        factor = (min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0) / scale
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if factor != 1.0 and gradients:
            torch._foreach_mul_(gradients, factor)
        return factor

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _to_device(self, inputs: Tensor, targets: Tensor) -> Batch:
        return (
            inputs.to(self.device, non_blocking=True),
            targets.to(self.device, non_blocking=True),
        )


def untied(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A module's state without tensors that are another one's memory, and these: name -> the
    first's name."""
    found: dict[str, Any] = {}
    ties: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, value in state.items():
        found[name] = value
        if isinstance(value, Tensor) and value.numel():
            key = (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device)
            if (first := seen.setdefault(key, name)) != name:
                ties[name] = first
                del found[name]
    return found, ties


def check_weights(given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """CheckpointError unless both have the same names and shapes, telling the first that differ."""
    faults = [f"{name} is missing" for name in wanted if name not in given]
    faults += [f"{name} is not in this model" for name in given if name not in wanted]
    faults += [
        f"{name} has shape {_shape(given[name])}, not {_shape(value)}"
        for name, value in wanted.items()
        if name in given and _shape(given[name]) != _shape(value)
    ]
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(
            f"checkpoint: it is of another model: {'; '.join(faults[:3])}{more}; resume with the "
            "model of before, or take its weights by model.init_from"
        )


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def compile_model(model: nn.Module) -> None:
    """torch.compile in place, block by block where the model names blocks.

    A backward pass compiled as one piece gives all gradients at its end, too late to overlap
    their exchange with it; blocks give them one after the other, and equal ones compile once.
    """
    listed = getattr(model, "blocks", None)
    blocks = list(listed()) if callable(listed) else []
    for module in blocks or [model]:
        module.compile()


@contextmanager
def memory_errors(where: str) -> Iterator[None]:
    """Turn running out of memory into one line that says what to change.

    Raises:
        ExhaustedError: out of memory; ``where`` names the stage, e.g. ``step 3``.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        # Without the place in torch's source that stands in front.
        reason = (str(error).strip() or "MemoryError").splitlines()[0].rpartition("] err == 0. ")[2]
        raise ExhaustedError(
            f"{where}: out of memory ({reason}); use more ranks or a larger train.accumulate, "
            "train.activation_checkpointing=true, or a smaller model or train.global_batch"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Host and device allocators of torch raise RuntimeErrors of several texts."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    words = ("can't allocate memory", "cannot allocate memory", "out of memory")
    return isinstance(error, RuntimeError) and any(word in text for word in words)
