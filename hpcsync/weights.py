"""Weights from elsewhere for a new model: a file .pt or .safetensors, a checkpoint, a run.

Names are taken as they are, or without what wrappers put before them: ``_orig_mod`` of
torch.compile, ``module`` of DistributedDataParallel. All of it fits, or nothing is changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from . import checkpoint, formats
from .checkpoint import source as sources
from .errors import ModelError

_COMPILED, _WRAPPED, _OURS = "_orig_mod", "module.", "model/"
_SHOWN = 3  # names of each kind that a message lists
_WHERE = "model.init_from: "
_FIX = "use the model.* keys of those weights"
_LOOSE = ", or model.init_strict=false to take what fits"


@dataclass(frozen=True, slots=True)
class Loaded:
    """What came of it.

    Attributes:
        missing: tensors of the model that the file lacks; they stay as they were.
        extra: names in the file that the model lacks; they were left out.
    """

    missing: tuple[str, ...]
    extra: tuple[str, ...]

    def describe(self, source: str) -> str:
        """For the banner."""
        words = source
        if self.missing:
            words += f"; {_listed(self.missing)} missing, left random"
        if self.extra:
            words += f"; {_listed(self.extra)} left out"
        return words


def load(model: nn.Module, source: str, *, strict: bool = True) -> Loaded:
    """Set a model's parameters and buffers to those of ``source``; nothing of it is run as code.

    Args:
        source: a file .pt, .pth or .safetensors, or the folder of a checkpoint or of a run.
        strict: the names must be the same on both sides. Shapes must be in any case.

    Raises:
        ModelError: it does not fit; the model is as it was.
        UserError: it cannot be read.
    """
    return put(model, read(source), _WHERE + source, fix=_FIX, loose=_LOOSE, strict=strict)


def fits(model: nn.Module, source: str, *, strict: bool = True) -> Loaded:
    """What ``load`` would take; the model may be without memory, and is left as it is.

    Raises:
        ModelError: it does not fit.
        UserError: it cannot be read.
    """
    found = read(source)
    return check(model, found, _WHERE + source, fix=_FIX, loose=_LOOSE, strict=strict)[0]


def put(
    model: nn.Module,
    found: Mapping[str, Tensor],
    source: str,
    *,
    fix: str,
    loose: str = "",
    strict: bool = True,
) -> Loaded:
    """Set a model's parameters and buffers to ``found``, all of them or none; as ``check``."""
    loaded, taken = check(model, found, source, fix=fix, loose=loose, strict=strict)
    wanted = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in taken.items():
            wanted[name].copy_(value)
    return loaded


def check(
    model: nn.Module,
    found: Mapping[str, Tensor],
    source: str,
    *,
    fix: str,
    loose: str = "",
    strict: bool = True,
) -> tuple[Loaded, dict[str, Tensor]]:
    """What a model would take of ``found``, under its own names; the model may be without memory.

    Args:
        source, fix: for the message: where it is from, and what may help.
        loose: goes with ``fix`` where ``strict`` alone is in the way.

    Raises:
        ModelError: it does not fit.
    """
    wanted = {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)
    }
    found = matching(found, wanted)
    missing = _missing(found, wanted)
    extra = tuple(name for name in found if name not in wanted)
    wrong = _wrong(found, wanted)
    common = any(name in wanted for name in found)
    if wrong or not common or (strict and (missing or extra)):
        fix += loose if common and not wrong else ""
        told = _differences(missing, extra, wrong)
        raise ModelError(f"{source} does not fit the model: {told}; {fix}")
    return Loaded(missing, extra), {name: found[name] for name in found if name in wanted}


def read(source: str) -> dict[str, Tensor]:
    """The weights that a file or folder holds, by name, on the CPU.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        return sources.model(checkpoint.open(sources.locate(path)))
    format = formats.of(path)
    if format is None:
        known = ", ".join(formats.SUFFIXES)
        raise ModelError(
            f"model.init_from: {source}: is neither a folder nor a file that ends in {known}"
        )
    if not path.is_file():
        raise ModelError(f"model.init_from: {source}: no such file; paths start at {Path.cwd()}")
    found = format.read(path)
    # A file of `hpcsync.export --what all` holds the optimizer's tensors, too.
    ours = {
        name.removeprefix(_OURS): value for name, value in found.items() if name.startswith(_OURS)
    }
    return ours or found


def matching(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``found`` under those of its names that the model knows most of: as they are, or bare."""
    best, most = dict(found), -1
    names = list(found)
    for _ in range(4):  # more wrappers than these nobody puts around each other
        known = sum(name in wanted for name in names)
        if known > most and len(set(names)) == len(names):
            best, most = dict(zip(names, found.values(), strict=True)), known
        bare = [_without_compiled(name) for name in names]
        if bare == names and all(name.startswith(_WRAPPED) for name in names):
            bare = [name.removeprefix(_WRAPPED) for name in names]
        names = bare
    return best


def _without_compiled(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def _missing(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names that the file lacks; not those of a tensor that it has under another name."""
    there = {id(value) for name, value in wanted.items() if name in found}
    return tuple(
        name for name, value in wanted.items() if name not in found and id(value) not in there
    )


def _wrong(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """What is there and cannot be taken, in words."""
    wrong: list[str] = []
    names: dict[int, str] = {}  # of a tensor that has several
    for name, value in found.items():
        target = wanted.get(name)
        if target is None:
            continue
        first = names.setdefault(id(target), name)
        if value.shape != target.shape:
            wrong.append(f"{name} is {_shape(value)}, and {_shape(target)} in the model")
        elif _kind(value) != _kind(target):
            wrong.append(f"{name} is {value.dtype}, and {target.dtype} in the model")
        elif first != name and not torch.equal(value, found[first]):
            wrong.append(f"{first} and {name} differ, and are one tensor in the model")
    return wrong


def _kind(value: Tensor) -> tuple[bool, bool]:
    return value.is_floating_point(), value.is_complex()


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "a single number"


def _listed(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} ({', '.join(names[:_SHOWN])}{more})"


def _differences(missing: Sequence[str], extra: Sequence[str], wrong: Sequence[str]) -> str:
    words = []
    if wrong:
        more = "; ..." if len(wrong) > _SHOWN else ""
        words.append(f"{len(wrong)} cannot be taken ({'; '.join(wrong[:_SHOWN])}{more})")
    if missing:
        words.append(f"{_listed(missing)} missing there")
    if extra:
        words.append(f"{_listed(extra)} not in the model")
    return ", ".join(words) or "it holds no tensors"
