"""What is told of a deck that is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from hpcsync import config
from hpcsync.errors import ConfigError


def problems(deck: str | Path | None, overrides: Sequence[str] = ()) -> list[str]:
    """What is wrong with a deck and overrides; each problem is one line."""
    with pytest.raises(ConfigError) as caught:
        config.load(deck, overrides)
    assert all("\n" not in problem for problem in caught.value.problems)
    return list(caught.value.problems)


def fault(text: str) -> str:
    """The one problem of a deck with this text, without the name of the deck."""
    Path("d.toml").write_text(text, encoding="utf-8")
    (problem,) = problems("d.toml")
    assert problem.startswith("d.toml:")
    return problem.removeprefix("d.toml:")
