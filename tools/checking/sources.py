"""What the commands of tools/checkpoint.py share: naming checkpoints and tensors, plain values."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hpcsync import checkpoint
from hpcsync.checkpoint import source, state
from hpcsync.checkpoint.reader import Checkpoint
from hpcsync.errors import UserError

_LONGEST = 60  # characters of a text, in a table
_MANY = 8  # items of a list that are shown one by one


def add_source(parser: argparse.ArgumentParser, *names: str) -> None:
    """The folder of a checkpoint or of a run as an argument, or several."""
    for name in names or ("source",):
        parser.add_argument(
            name,
            type=Path,
            metavar=name.upper() if names else "RUN|CHECKPOINT",
            help="a checkpoint's folder, or a run's, whose newest is meant",
        )


def add_names(parser: argparse.ArgumentParser) -> None:
    """--name."""
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="PATTERN",
        help="only tensors and values of this name, such as 'model/*.weight'; may be repeated",
    )


def opened(path: Path) -> Checkpoint:
    """The checkpoint that is meant; errors as of ``source.locate`` and ``checkpoint.open``."""
    return checkpoint.open(source.locate(path))


def meant(name: str, patterns: list[str]) -> bool:
    """Whether a name fits one of the patterns, or there are none."""
    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


def check_any(found: object, patterns: list[str], where: object) -> None:
    """Raises UserError: patterns were given and nothing fits them."""
    if patterns and not found:
        raise UserError(f"--name: nothing in {where} is called {' or '.join(patterns)}")


def values(found: Checkpoint) -> dict[str, Any]:
    """All that is no tensor, by the way to it: ``sampler/step``, ``ranks/0/random/python/1``.

    Long lists are one value, a tuple.
    """
    manifest = found.manifest
    rows = dict(_leaves(_without_tensors(manifest.common), ""))
    for rank, own in enumerate(manifest.own):
        rows |= _leaves(_without_tensors(own), f"ranks/{rank}/")
    return rows


def _without_tensors(skeleton: Any) -> Any:
    """The tree with None for tensors: nothing of them is read."""
    return state.unflatten(skeleton, _Nothing())


class _Nothing(Mapping[str, Any]):
    def __getitem__(self, name: str) -> Any:
        return _TENSOR

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class _Tensor:
    """Stands for a tensor, and for the array that it may have been."""

    def numpy(self) -> _Tensor:
        return self


_TENSOR = _Tensor()


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}{key}/")
    elif isinstance(value, list | tuple) and _plain(value):
        yield path.removesuffix("/"), tuple(value)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}{index}/")
    elif value is not _TENSOR:
        yield path.removesuffix("/"), value


def _plain(items: list[Any] | tuple[Any, ...]) -> bool:
    return not any(isinstance(item, Mapping | list | tuple | _Tensor) for item in items)


def shown(value: Any) -> str:
    """A value in a table."""
    if isinstance(value, tuple):
        if len(value) > _MANY:
            return f"{len(value)} values"
        return "[" + ", ".join(map(shown, value)) + "]"
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def shape(value: Any) -> str:
    """``64x128``; ``scalar``."""
    return "x".join(map(str, value)) or "scalar"
