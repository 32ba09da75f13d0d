"""The folder RUN/checkpoints: names in it, which checkpoints are kept, and what is set aside.

step-00000100/           a checkpoint, whole since it has this name
latest                   text: the name of the newest
.step-00000200.tmp/      being written, or left by a run that was killed: never read
.step-00000100.old.tmp/  a whole one, while another of its step takes its name
step-00000100.damaged/   set aside by a run that could not read it
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..errors import CheckpointError

FOLDER = "checkpoints"
LATEST = "latest"
MANIFEST = "manifest.json"
INDEX = "index.h5"
_STEP = re.compile(r"step-(\d{8,18})")
_OLD = ".old.tmp"
_ASIDE = re.compile(r"\.(step-\d{8,18}(-\d+|\.old)?|latest)\.tmp")


def step_name(step: int) -> str:
    """``step-00000100``."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's name; None if it is none."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found and step_name(int(found[1])) == name else None


def aside(checkpoints: Path, step: int) -> Path:
    """Where a checkpoint is while it is written."""
    return checkpoints / f".{step_name(step)}.tmp"


def data_file(index: int, of_nodes: bool = False) -> str:
    """``rank-00003.h5`` or ``node-00003.h5``."""
    return f"{'node' if of_nodes else 'rank'}-{index:05d}.h5"


def steps(checkpoints: Path) -> list[int]:
    """The steps of the checkpoints that have their final name, ascending.

    Raises:
        CheckpointError: the folder is there and cannot be read.
    """
    try:
        with os.scandir(checkpoints) as entries:
            found = [step_of(each.name) for each in entries if each.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{checkpoints}: cannot be read: {error.strerror}") from error
    return sorted(step for step in found if step is not None)


def latest(checkpoints: Path) -> str | None:
    """The name in ``latest``; None without one, or if it is no checkpoint's."""
    try:
        with open(checkpoints / LATEST, "rb") as file:
            name = file.read(64).decode("ascii", "replace").strip()
    except OSError:
        return None
    return name if step_of(name) is not None else None


def set_latest(checkpoints: Path, step: int) -> None:
    """Make ``latest`` name a checkpoint, at once and durably."""
    fresh = checkpoints / f".{LATEST}.tmp"
    with open(fresh, "w", encoding="ascii") as file:
        file.write(step_name(step) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, checkpoints / LATEST)
    sync_folder(checkpoints)


def superfluous(steps: Sequence[int], keep: int, keep_every: int = 0) -> list[int]:
    """Which of these steps' checkpoints may go: all but the last ``keep`` (0: all are kept) and
    those of each ``keep_every``-th step (0: none for ever). The newest always stays."""
    if keep <= 0:
        return []
    old = sorted(steps)[:-keep]
    return [step for step in old if not keep_every or step % keep_every]


def prune(checkpoints: Path, keep: int, keep_every: int = 0) -> list[int]:
    """Remove superfluous checkpoints; the steps that went."""
    gone = superfluous(steps(checkpoints), keep, keep_every)
    for step in gone:
        remove(checkpoints / step_name(step))
    return gone


def remove(folder: Path) -> None:
    """Remove a checkpoint: it loses its name first, so that none is ever seen in part."""
    if step_of(folder.name) is not None:
        folder = _out_of_the_way(folder)
    shutil.rmtree(folder)


def clean(checkpoints: Path) -> list[str]:
    """Remove what killed runs left half-written; the names. Only where no other run writes.

    A checkpoint that was about to be replaced gets its name back if no other has it.
    """
    try:
        found = [name for name in os.listdir(checkpoints) if _ASIDE.fullmatch(name)]
    except FileNotFoundError:
        return []
    removed = []
    for name in found:
        path = checkpoints / name
        final = checkpoints / name.removeprefix(".").removesuffix(_OLD)
        if name.endswith(_OLD) and not os.path.lexists(final):
            os.rename(path, final)
            continue
        removed.append(name)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return sorted(removed)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint to ``step-00000100.damaged`` (-2, -3, ...); its new path."""
    for number in itertools.count(1):
        tail = ".damaged" if number == 1 else f".damaged-{number}"
        target = folder.with_name(folder.name + tail)
        if not os.path.lexists(target):
            os.rename(folder, target)
            sync_folder(folder.parent)
            return target
    raise AssertionError("unreachable")


def publish(fresh: Path, final: Path) -> None:
    """Give a written folder its name, durably; a checkpoint that had it goes."""
    sync_folder(fresh)
    old = final.with_name(f".{final.name}{_OLD}")
    replaces = os.path.lexists(final)
    if replaces:
        if os.path.lexists(old):
            shutil.rmtree(_out_of_the_way(old, final.name))
        os.rename(final, old)
    try:
        os.rename(fresh, final)
    except OSError:
        if replaces:
            os.rename(old, final)
        raise
    sync_folder(final.parent)
    sync_folder(final.parent.parent)  # any rank may just have made the folder of checkpoints
    if os.path.lexists(old):
        with contextlib.suppress(OSError):  # the next run's ``clean`` removes it
            shutil.rmtree(_out_of_the_way(old, final.name))


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _out_of_the_way(folder: Path, name: str = "") -> Path:
    """Rename it to what ``clean`` removes: what goes in part must never come back."""
    for number in itertools.count(1):
        target = folder.with_name(f".{name or folder.name}-{number}.tmp")
        if not os.path.lexists(target):
            os.rename(folder, target)
            return target
    raise AssertionError("unreachable")
