"""What the commands of tools/trace.py share: options, choosing steps and ranks, opening a trace."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hpcsync import trace as traces
from hpcsync.errors import UserError
from hpcsync.trace.file import Trace
from hpcsync.wording import ranges

# -- options ------------------------------------------------------------------------------


def add_run(parser: argparse.ArgumentParser, *names: str) -> None:
    """The run's folder as an argument, or several."""
    for name in names or ("run",):
        parser.add_argument(name, type=Path, help="the run's folder, or its trace folder")


def add_choice(parser: argparse.ArgumentParser) -> None:
    """--steps and --ranks."""
    parser.add_argument("--steps", type=Range, help="only these: 10, 10-20, 100-, 5,7-9")
    parser.add_argument("--ranks", type=Range, help="only these: 0, 0-7, 0,4,8-")


class Range:
    """Numbers as the user names them: ``5,7-9,100-``.

    Raises:
        argparse.ArgumentTypeError: cannot be understood.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._parts: list[tuple[int, float]] = []
        for part in text.split(","):
            match = re.fullmatch(r"(\d+)(-(\d*))?", part.strip())
            if match is None:
                raise argparse.ArgumentTypeError(
                    f"{text!r}: write it like 10, 10-20, 100- or 5,7-9"
                )
            low = int(match[1])
            high = math.inf if match[2] == "-" else int(match[3] or low)
            if high < low:
                raise argparse.ArgumentTypeError(f"{part!r} ends before it begins")
            self._parts.append((low, high))

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and any(low <= number <= high for low, high in self._parts)

    def among(self, there: Sequence[int], what: str, where: object) -> tuple[list[int], str]:
        """Those of ``there`` that are meant, and a warning if others are meant too, or nothing.

        Raises:
            UserError: none of them is there.
        """
        found = [number for number in there if number in self]
        if not found:
            known = ranges(there) if len(there) < 20 else f"{there[0]} to {there[-1]}"
            raise UserError(f"{where}: no {what} {self.text}; the trace has {known or 'none'}")
        # Of an open or a wide range whatever is there is meant: not every step is traced.
        low, high = min(there), max(there)
        outside = [
            f"{first}" if first == last else f"{first}-{last:g}"
            for first, last in self._parts
            if first > high or (math.isfinite(last) and last > high) or last < low
        ]
        warning = f"{what} {', '.join(outside)}: the trace has {low} to {high}" if outside else ""
        return found, warning


# -- opening ------------------------------------------------------------------------------


def warn(text: str) -> None:
    """One line to stderr."""
    print(f"trace: warning: {text}", file=sys.stderr)


@contextmanager
def opened(run: Path) -> Iterator[Trace]:
    """The trace of a run; its problems are told when all has been read.

    Raises:
        UserError: there is none, or nothing of it can be read.
    """
    with traces.open(run) as trace:
        try:
            yield trace
        finally:
            for problem in dict.fromkeys(trace.problems):
                warn(problem)


def chosen_ranks(trace: Trace, options: argparse.Namespace) -> list[int]:
    """The ranks that the options name, or all that are there; warns of others.

    Raises:
        UserError: none of them is there.
    """
    there = list(trace.ranks)
    if getattr(options, "ranks", None) is None:
        return there
    found, warning = options.ranks.among(there, "rank", trace.folder)
    if warning:
        warn(warning)
    return list(found)


def chosen_steps(trace: Trace, options: argparse.Namespace, there: Sequence[int]) -> list[int]:
    """The steps of ``there`` that the options name, or all; warns of others.

    Raises:
        UserError: none of them is there.
    """
    if getattr(options, "steps", None) is None:
        return list(there)
    found, warning = options.steps.among(list(there), "step", trace.folder)
    if warning:
        warn(warning)
    return list(found)
