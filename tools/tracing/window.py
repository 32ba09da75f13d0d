"""Which ranks and steps of a trace a view shows."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hpcsync.errors import UserError
from hpcsync.trace.events import LANE, Events
from hpcsync.trace.file import Trace
from hpcsync.wording import ranges

from . import output


@dataclass(frozen=True, slots=True)
class Window:
    """What is shown; both ascending."""

    ranks: tuple[int, ...]
    steps: tuple[int, ...]

    def tables(self, trace: Trace) -> Iterator[tuple[int, Events]]:
        """(rank, its events of these steps in order of their start, on rank 0's clock)."""
        for rank in self.ranks:
            found = trace.aligned(rank, self.steps)
            yield rank, found[np.argsort(found["start"], kind="stable")]


def choose(trace: Trace, options: argparse.Namespace, most: int) -> Window:
    """The ranks and steps that the options name; all ranks, and the last ``most`` steps that are
    whole, where they name none.

    Raises:
        UserError: none of them is there.
    """
    ranks = output.chosen_ranks(trace, options)
    # Ranks may have lost different steps; the first and the last chosen ones stand for all.
    tables = [trace.events(rank) for rank in dict.fromkeys((ranks[0], ranks[-1]))]
    held = np.unique(np.concatenate([found["step"] for found in tables]))
    if not held.size:
        raise UserError(f"{trace.folder}: ranks {ranges(ranks)} have no events; name others")
    if options.steps is not None:
        steps = output.chosen_steps(trace, options, [int(step) for step in held])
        return Window(tuple(ranks), tuple(steps))
    ended = [found["step"][found["lane"] == LANE["step"]] for found in tables]
    whole = np.unique(np.concatenate(ended))
    last = (whole if whole.size else held)[-most:]
    return Window(tuple(ranks), tuple(int(step) for step in last))


def clock_note(trace: Trace, ranks: Sequence[int]) -> str:
    """How far times of different ranks may be apart for no reason, in words."""
    if len(ranks) == 1:
        return "one clock"
    errors = {rank: trace.uncertainty(rank) for rank in ranks}
    never = [rank for rank, error in errors.items() if math.isinf(error)]
    if never:
        return f"clocks of ranks {ranges(never)} were never compared: do not compare across them"
    return f"clocks aligned within {max(errors.values()) / 1e3:.1f} us"
