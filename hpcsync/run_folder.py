"""The folder of a run: made by rank 0 alone, new, never one that holds something but to go on."""

from __future__ import annotations

import contextlib
import itertools
import re
import time
from pathlib import Path

from . import config as configs
from .arguments import Arguments
from .config import Config
from .errors import UserError

CONFIG = "config.toml"


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
        (folder / CONFIG).write_text(configs.dump(config), encoding="utf-8")
    except OSError as error:
        place = out or config.run.dir
        raise UserError(
            f"{'--out' if out else 'run.dir'}: cannot make a folder for the run in {place}: "
            f"{error.strerror}; name a folder that you may write to"
        ) from error
    return folder


def find(config: Config, arguments: Arguments) -> Path | None:
    """The run folder that ``--resume auto`` means; None if there is none yet.

    That of ``--out``, else ``run.dir``/``run.name``; without a name the newest of this deck in
    ``run.dir`` that has checkpoints.
    """
    if arguments.out or config.run.name:
        named = Path(arguments.out) if arguments.out else Path(config.run.dir) / config.run.name
        return named if (named / CONFIG).is_file() else None
    stem = re.escape(_stem(arguments.deck))
    pattern = re.compile(rf"{stem}-(\d{{8}}-\d{{6}})(?:-(\d+))?")
    found = []
    with contextlib.suppress(OSError):
        for path in Path(config.run.dir).iterdir():
            match = pattern.fullmatch(path.name)
            if match and (path / "checkpoints").is_dir() and (path / CONFIG).is_file():
                found.append((match[1], int(match[2] or 1), path))
    return max(found)[2] if found else None


def reuse(folder: Path, config: Config) -> Path:
    """Write config.toml anew into the folder of a run that goes on; the old one stays beside it
    as config-1.toml, -2, ...

    Raises:
        UserError: the folder cannot be written to.
    """
    path, text = folder / CONFIG, configs.dump(config)
    try:
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            return folder
        numbers = itertools.count(1)
        old = next(p for n in numbers if not (p := folder / f"config-{n}.toml").exists())
        if path.exists():
            path.rename(old)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--resume: cannot write to {folder}: {error.strerror}; a run goes on in its own "
            "folder, or name one of its checkpoints to go on in a new folder"
        ) from error
    return folder


def _stem(deck: str | None) -> str:
    return Path(deck).stem if deck else "default"


def _name(config: Config, deck: str | None) -> str:
    return config.run.name or f"{_stem(deck)}-{time.strftime('%Y%m%d-%H%M%S')}"


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
