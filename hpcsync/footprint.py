"""What a model weighs, found without memory for it.

The model is built from fake tensors, which have shapes and no memory, and run forward once to
see what it keeps for the backward pass; so a model of any size is described by any laptop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from . import models, weights
from .config import Config
from .data import Source
from .gradients.plan import Parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a model weighs.

    Attributes:
        counts: elements, and bytes of weights and buffers.
        parameters: those that take gradients, in order of registration.
        activations: bytes kept for the backward pass of one micro-batch; None if the model
            could not be run on fake tensors.
    """

    counts: models.ParameterCounts
    parameters: tuple[Parameter, ...]
    activations: int | None


def measure(config: Config, source: Source, micro: int) -> Sizes:
    """Build the model without memory and see what it holds.

    Raises:
        ModelError: it cannot be built, or the weights of ``model.init_from`` are not its.
    """
    with FakeTensorMode():
        model = models.build(config.model, source)
        if config.train.activation_checkpointing:
            models.checkpoint_activations(model)
        parameters = tuple(
            Parameter(
                name,
                p.numel(),
                str(p.dtype).removeprefix("torch."),
                p.itemsize,
                tuple(p.shape),
            )
            for name, p in model.named_parameters()
            if p.requires_grad
        )
        sizes = Sizes(
            counts=models.parameter_counts(model),
            parameters=parameters,
            activations=_activations(model, config, source, micro),
        )
    if given := config.model.init_from:
        weights.fits(model, given, strict=config.model.init_strict)
    return sizes


def _activations(model: nn.Module, config: Config, source: Source, micro: int) -> int | None:
    """Bytes of what autograd saves in a forward pass, each piece of memory once.

    With activation checkpointing: the inputs of the blocks and what lies outside them; the one
    block that is computed again at a time comes on top.
    """
    inputs, targets = _sample(source, micro)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    def enter(block: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        for each in (*given, *named.values()):
            if isinstance(each, Tensor):
                keep(each)

    if config.train.activation_checkpointing:
        for block in model.blocks():  # type: ignore[operator]
            block.register_forward_pre_hook(enter, with_kwargs=True)
    half = config.train.precision == "bf16"
    try:
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
        ):
            model(inputs, targets)
    except Exception:  # a user's model may look at values, which fake tensors have not
        return None
    return sum(int(storage.nbytes()) for storage in kept.values())


def _sample(source: Source, micro: int) -> tuple[Tensor, Tensor]:
    shape = (micro, *source.sample_shape)
    if source.vocab:
        return torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    return torch.zeros(shape), torch.zeros(micro, dtype=torch.int64)
