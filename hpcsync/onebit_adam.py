"""The optimizer of 1-bit Adam: AdamW at first, then momentum over a frozen variance.

    first ``freeze`` updates of a parameter    AdamW on the mean gradient
    after these                                ranks exchange momentum, not gradients:

        m = beta1 * m + (1 - beta1) * g         before the exchange, on each rank (Momentum)
        m = mean over ranks, coded as may be    the exchange: ``param.grad`` holds it after
        w = w - lr * m / (sqrt(v) + eps)        with v as it was, and decay as AdamW's

(Tang et al., "1-bit Adam", ICML 2021, algorithm 1.) Adam divides by a variance that depends on
the gradient in a non-linear way, so that what a codec lost could never be made good by error
feedback; with the variance frozen the update is linear in what was exchanged. The optimizer asks
nothing of the codec: with an exchange that loses nothing it is Adam with a frozen variance.

Bias corrections go on as AdamW's: that of v stays as it was at the freeze, so that steps do not
change in size there. (The paper has none.) Elements whose variance is far below their tensor's
mean would be moved without bound by what a codec adds to them, so v counts as at least
``floor`` squared times its mean over the tensor.

In a parameter's second phase its gradient, after the exchange, is a momentum: it is not to be
clipped, and not to be divided by a loss scale, which ``Momentum`` has taken out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

_FROZEN = "denominator"


class Momentum:
    """What frozen parameters exchange in place of gradients.

    Attributes:
        active: whether any parameter is frozen. It changes within ``OneBitAdam.step``, on all
            ranks alike.
        scale: the factor on the loss with which gradients come; taken out while ``active``.
    """

    def __init__(self, optimizer: OneBitAdam) -> None:
        self._optimizer = optimizer
        self.active = False
        self.scale = 1.0

    @torch.no_grad()
    def apply(self, param: nn.Parameter, grad: Tensor, out: Tensor) -> None:
        """Write the momentum with this gradient to ``out``, which may be ``grad``.

        To be called once a step for each parameter, with the sum of its micro-batches. The
        gradient itself is written for a parameter that is not frozen.
        """
        state = self._optimizer.state.get(param, {})
        if self.scale != 1.0:
            grad = torch.mul(grad, 1.0 / self.scale, out=out)
        if _FROZEN in state:
            # As AdamW computes it, to the same bits.
            torch.lerp(state["exp_avg"], grad, 1 - self._optimizer.beta1(param), out=out)
        elif out.data_ptr() != grad.data_ptr():
            out.copy_(grad)


class OneBitAdam(Optimizer):
    """See the module. In its first phase its results are those of ``torch.optim.AdamW``.

    State of a parameter: ``step`` and ``exp_avg``; ``exp_avg_sq`` in the first phase, and in the
    second ``denominator``, sqrt(v) + eps with v's bias correction and floor.

    Args:
        params: parameters or groups of them, as for any optimizer of torch.
        lr: learning rate.
        betas: decay of the mean of gradients, and of their squares.
        eps: guard against division by zero.
        weight_decay: decoupled, as AdamW's.
        freeze: updates of a parameter after which its variance stays as it is; at least 1.
        floor: least root of the variance, as a share of that of its mean over the tensor.
        fused: as for ``torch.optim.AdamW``, in the first phase.

    Attributes:
        momentum: to be handed to whatever exchanges the gradients.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        freeze: int,
        floor: float = 0.1,
        fused: bool | None = None,
    ) -> None:
        _check(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, freeze=freeze, floor=floor)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "freeze": freeze,
            "floor": floor,
            "fused": fused,
        }
        self.momentum = Momentum(self)
        self._groups: dict[Tensor, dict[str, Any]] = {}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient, or, if frozen, a momentum."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            given = [param for param in group["params"] if param.grad is not None]
            frozen = [param for param in given if _FROZEN in self.state[param]]
            learning = [param for param in given if _FROZEN not in self.state[param]]
            if learning:
                self._learn(group, learning)
            if frozen:
                self._follow(group, frozen)
        return loss

    def beta1(self, param: Tensor) -> float:
        """The decay of a parameter's momentum, as its group has it now."""
        if not self._groups:
            self._groups = {each: group for group in self.param_groups for each in group["params"]}
        return float(self._groups[param]["betas"][0])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._groups = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._groups = {}
        self.momentum.active = any(_FROZEN in state for state in self.state.values())

    def _learn(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """AdamW; then freeze what has learnt enough."""
        states = [self._prepared(group, param) for param in params]
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [param.grad for param in params if param.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for state, step in zip(states, _steps(states), strict=True):
            if step >= group["freeze"]:
                _freeze(state, beta2, group["eps"], group["floor"])
                self.momentum.active = True

    def _prepared(self, group: dict[str, Any], param: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[param]
        if not state:
            device = param.device if group["fused"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state

    def _follow(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Move along the mean momentum, and keep it."""
        states = [self.state[param] for param in params]
        momenta = [param.grad for param in params if param.grad is not None]
        torch._foreach_add_([state["step"] for state in states], 1)
        torch._foreach_copy_([state["exp_avg"] for state in states], momenta)
        decay = 1 - group["lr"] * group["weight_decay"]
        if decay != 1:
            torch._foreach_mul_(params, decay)
        beta1 = group["betas"][0]
        sizes = [-group["lr"] / (1 - beta1**step) for step in _steps(states)]
        torch._foreach_addcdiv_(params, momenta, [state[_FROZEN] for state in states], sizes)


def _steps(states: list[dict[str, Any]]) -> list[float]:
    """The counts of updates; read at once, since each reading waits for the device."""
    steps: list[float] = torch.stack([state["step"] for state in states]).tolist()
    return steps


def _freeze(state: dict[str, Any], beta2: float, eps: float, floor: float) -> None:
    """Put the denominator of all later updates in the place of the variance."""
    variance = state.pop("exp_avg_sq")
    mean = variance.mean(dtype=torch.float32)
    correction = math.sqrt(1 - beta2 ** float(state["step"]))
    root = variance.clamp_(min=mean * (floor * floor)).sqrt_().div_(correction)
    # Without any gradient so far there is no scale to move by.
    state[_FROZEN] = root.add_(eps if mean > 0 else math.inf)


def _check(
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    freeze: int,
    floor: float,
) -> None:
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay), ("floor", floor)):
        if not value >= 0:
            raise ValueError(f"{name} = {value}: it must not be negative")
    for index, beta in enumerate(betas):
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{index}] = {beta}: it must be at least 0 and below 1")
    if freeze < 1:
        raise ValueError(f"freeze = {freeze}: the variance must be learnt in at least 1 step")
