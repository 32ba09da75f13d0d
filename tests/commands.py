"""Commands called in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Call = Callable[..., tuple[int, str, str]]


def caller(main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> Call:
    """(status, stdout, stderr) of a command's ``main`` called with some words."""

    def called(*words: object) -> tuple[int, str, str]:
        try:
            status = main([str(word) for word in words])
        except SystemExit as error:
            status = int(error.code or 0)
        told = capsys.readouterr()
        return status, told.out, told.err

    return called
