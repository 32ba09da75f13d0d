"""The folder of a run: made by rank 0 alone, new, never one that holds something."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

from . import config as configs
from .arguments import Arguments
from .config import Config
from .errors import UserError


def make(config: Config, arguments: Arguments) -> Path:
    """Make the run folder and write config.toml into it.

    With ``--out`` that is the folder, which must be missing or empty; otherwise it is
    ``run.dir``/``run.name``, with -2, -3, ... appended where that exists. Without a name the
    deck's and the time make one.

    Raises:
        UserError: it cannot be made, or ``--out`` holds something.
    """
    out, deck = arguments.out, arguments.deck
    try:
        folder = _given(Path(out)) if out else _new(Path(config.run.dir) / _name(config, deck))
        (folder / "config.toml").write_text(configs.dump(config), encoding="utf-8")
    except OSError as error:
        place = out or config.run.dir
        raise UserError(
            f"{'--out' if out else 'run.dir'}: cannot make a folder for the run in {place}: "
            f"{error.strerror}; name a folder that you may write to"
        ) from error
    return folder


def _name(config: Config, deck: str | None) -> str:
    stem = Path(deck).stem if deck else "default"
    return config.run.name or f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def _given(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError(
            f"--out: {folder} is not empty, and a run overwrites nothing; name another folder"
        )
    return folder


def _new(base: Path) -> Path:
    for number in itertools.count(1):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("unreachable")
