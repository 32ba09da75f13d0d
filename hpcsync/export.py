"""``python -m hpcsync.export RUN|CHECKPOINT --to FILE``: weights, or a model, for other programs.

    FILE.safetensors  FILE.pt     tensors by name
    FILE.onnx                     the model itself, from inputs to logits, checked in onnxruntime

Reads one checkpoint, the newest of a run's folder, and checks every byte that it takes. No MPI.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .errors import ModelError, UserError

if TYPE_CHECKING:
    from .checkpoint.reader import Checkpoint
    from .config import Config

_ONNX = ".onnx"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for.

    Attributes:
        source: the folder of a run or of a checkpoint.
        overrides: ``key=value`` words that replace keys of the checkpoint's deck.
        whole: all tensors, not the model's alone.
    """

    source: Path
    to: Path
    whole: bool
    force: bool
    overrides: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command: ends the process."""
    from . import launch

    words = list(sys.argv[1:] if argv is None else argv)
    launch.guard(lambda: command(words))


def command(argv: Sequence[str]) -> int:
    """Run the command and return its exit status.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or FILE cannot be written.
    """
    request = parse(argv)
    from . import checkpoint
    from .checkpoint import source

    found = checkpoint.open(source.locate(request.source))
    told = (to_onnx if request.to.suffix == _ONNX else to_tensors)(found, request)
    print(f"{request.to}: {told}, of step {found.manifest.step}")
    return 0


def to_tensors(found: Checkpoint, request: Request) -> str:
    """Write the tensors; what was written, in words."""
    from . import formats
    from .checkpoint import source

    form = formats.of(request.to)
    assert form is not None
    with formats.aside(request.to, force=request.force) as part:
        if request.whole:
            tensors = {name: found.tensor(name) for name in found.manifest.tensors}
        else:
            tensors = source.model(found)
        form.write(part, tensors, notes(found))
    nbytes = sum(each.nbytes for each in tensors.values())
    return f"{len(tensors)} tensors, {nbytes / (1 << 20):.1f} MiB"


def to_onnx(found: Checkpoint, request: Request) -> str:
    """Write the model; what was written, in words."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from . import dryrun, formats, models, onnx_export, weights
    from .checkpoint import source

    config = model_config(found, request)
    data, _ = dryrun.find_data(config)
    tensors = source.model(found)
    where, fix = str(found.folder), "give the model.* and data.* keys that the run had"
    # The deck may be a stranger's: memory is taken for what fits the weights that are there.
    if config.model.layers > len(tensors):
        raise ModelError(f"{where} does not fit the model: it has fewer layers; {fix}")
    with FakeTensorMode():
        empty = models.build(config.model, data)
    weights.check(empty, tensors, where, fix=fix)
    model = models.build(config.model, data)
    weights.put(model, tensors, where, fix=fix)
    with formats.aside(request.to, force=request.force) as part:
        inputs = onnx_export.sample(data, config.run.seed)
        difference = onnx_export.write(part, model, inputs, notes(found))
    return f"{config.model.name}; onnxruntime and torch differ by {difference:.1g} of the largest"


def model_config(found: Checkpoint, request: Request) -> Config:
    """The deck of the checkpoint with what the command line replaces.

    Raises:
        UserError: it names code of somebody's own, which only the user may.
    """
    from . import config as configs

    config = configs.loads(found.manifest.config, f"{found.folder}: deck", request.overrides)
    for key, name in (("model.name", config.model.name), ("data.name", config.data.name)):
        if ":" in name and not any(word.startswith(f"{key}=") for word in request.overrides):
            raise UserError(
                f"{found.folder}: its deck names code of its own, {key} = {name!r}; where you "
                f"trust that, say so: {key}={name}"
            )
    return config


def notes(found: Checkpoint) -> dict[str, str]:
    """Where the weights are from."""
    manifest = found.manifest
    return {
        "hpcsync_run_id": manifest.run_id,
        "hpcsync_step": str(manifest.step),
        "hpcsync_tokens": str(manifest.tokens),
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; --help lists what there is")


def parse(argv: Sequence[str]) -> Request:
    """Understand the command line; ``--help`` prints and exits.

    Raises:
        UserError: it cannot be understood.
    """
    parser = _Parser(
        prog="python -m hpcsync.export",
        description="Write the weights of a checkpoint, or its model, for other programs.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", type=Path, metavar="RUN|CHECKPOINT", help="a run's folder (its newest), or one")
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="for .onnx: keys of the run's deck that are others here, such as data.path=FILE",
    )
    add("--to", type=Path, required=True, metavar="FILE", help="ends in .safetensors, .pt or .onnx")
    add(
        "--what",
        choices=("model", "all"),
        default="model",
        help="model: its weights and buffers; all: the optimizer's and the ranks' tensors, too, "
        "under their names in the checkpoint (default: model)",
    )
    add("--force", action="store_true", help="replace FILE if it exists")
    found = parser.parse_intermixed_args(argv)
    whole, suffix = found.what == "all", found.to.suffix
    if suffix not in (".safetensors", ".pt", _ONNX):
        parser.error(f"--to: {found.to} does not end in .safetensors, .pt or .onnx")
    if suffix == _ONNX and whole:
        parser.error("--what all: ONNX holds a model, nothing else; use .safetensors or .pt")
    if suffix != _ONNX and found.overrides:
        parser.error(f"{found.overrides[0]}: only an export to .onnx needs the deck")
    return Request(
        source=found.source,
        to=found.to,
        whole=whole,
        force=found.force,
        overrides=tuple(found.overrides),
    )


if __name__ == "__main__":
    main()
