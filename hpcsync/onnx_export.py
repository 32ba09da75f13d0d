"""A model as ONNX: from inputs to logits, checked in onnxruntime against torch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .data import Source
from .errors import HpcsyncError, ModelError, UserError

_SAMPLES = 3
# Of the largest logit: far above what the order of FP32 sums does, far below what a wrong
# operator would.
_TOLERANCE = 1e-4
_MOST_BYTES = (1 << 31) - (1 << 24)  # of a protobuf message, with room for the graph


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        scores: Tensor = self.model.logits(inputs)  # type: ignore[operator]
        return scores


def sample(source: Source, seed: int) -> Tensor:
    """Inputs as the model takes them: drawn at random, in the shape of the data's."""
    generator = torch.Generator().manual_seed(seed)
    shape = (_SAMPLES, *source.sample_shape)
    if source.vocab:
        return torch.randint(0, source.vocab, shape, generator=generator)
    return torch.rand(shape, generator=generator)


def write(path: Path, model: nn.Module, inputs: Tensor, notes: Mapping[str, str]) -> float:
    """Write a model with a method ``logits(inputs)``; any number of samples may go in.

    Tokens may be fewer than ``inputs`` has, too: their dimension is free up to that.

    Args:
        inputs: a batch of samples, to trace the model with and to check the file by.
        notes: kept in the file.

    Returns:
        The largest difference between onnxruntime and torch, over the largest logit.

    Raises:
        ModelError: the model has no logits, or cannot be traced.
        UserError: a package is missing, or the model is too large for the format.
        OSError: the file cannot be written.
        HpcsyncError: onnxruntime computes something else than torch.
    """
    _check(model)
    model = _Logits(model).eval()
    text = inputs.ndim == 2 and not inputs.is_floating_point() and inputs.shape[1] > 2
    dims = {0: torch.export.Dim("batch")}
    if text:
        dims[1] = torch.export.Dim("time", max=inputs.shape[1])
    with _quiet():
        try:
            program: Any = torch.onnx.export(
                model,
                (inputs,),
                input_names=["inputs"],
                output_names=["logits"],
                dynamic_shapes={"inputs": dims},
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        except Exception as error:  # of many kinds; the last line but the first says what is wrong
            reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(f"the model cannot be traced for ONNX: {reason}") from error
        program.model.metadata_props.update(notes)
        program.save(path, external_data=False)
    batches = [inputs, inputs[:1]]
    if text:
        batches.append(inputs[:2, : inputs.shape[1] // 2])
    return _compare(path, model, batches)


def _check(model: nn.Module) -> None:
    """Raises UserError: what is needed is not there."""
    missing = []
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise UserError(
            f"--to: {', '.join(missing)} not installed, and ONNX needs it: "
            "pip install 'hpcsync[onnx]'"
        )
    if not callable(getattr(model, "logits", None)):
        raise ModelError(
            f"{type(model).__name__} has no method logits(inputs), which an export to ONNX calls; "
            "give it one, or export to .safetensors"
        )
    nbytes = sum(each.nbytes for each in model.state_dict().values())
    if nbytes > _MOST_BYTES:
        raise UserError(
            f"--to: the model has {nbytes / 2**30:.1f} GiB, and an ONNX file holds at most 2; use "
            ".safetensors"
        )


def _compare(path: Path, model: nn.Module, batches: list[Tensor]) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in batches:
        with torch.no_grad():
            ours = model(batch).numpy()
        (theirs,) = session.run(["logits"], {"inputs": batch.numpy()})
        if theirs.shape != ours.shape:
            raise HpcsyncError(
                f"ONNX: onnxruntime gives logits of {theirs.shape}, torch of {ours.shape}; no "
                "file was written"
            )
        largest = float(np.abs(ours).max(initial=0.0)) or 1.0
        difference = float(np.abs(theirs - ours).max(initial=0.0)) / largest
        worst = difference if difference > worst or np.isnan(difference) else worst
        if not difference <= _TOLERANCE and np.isfinite(ours).all():
            raise HpcsyncError(
                f"ONNX: onnxruntime and torch differ by {difference:.2g} of the largest logit; no "
                "file was written"
            )
    return worst


@contextmanager
def _quiet() -> Iterator[None]:
    """torch tells of packages that it could use, and of changes to come."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
