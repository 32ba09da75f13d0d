"""How often something is done: every so many steps or seconds, or as often as pays."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_TIME = re.compile(r"(\d{1,9}(?:\.\d{1,9})?) ?(s|min|h)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Interval:
    """One of the three; never, if steps and seconds are 0 and it is not automatic."""

    steps: int = 0
    seconds: float = 0.0
    auto: bool = False


def parse(value: int | str) -> Interval:
    """``500``, ``"10min"``, ``"auto"``.

    Raises:
        ValueError: it is none of these; in words for the user.
    """
    if isinstance(value, int):
        return Interval(steps=value)
    if value == "auto":
        return Interval(auto=True)
    found = _TIME.fullmatch(value.strip())
    if found is None or not (seconds := float(found[1]) * _UNITS[found[2]]):
        raise ValueError(
            f"must be a number of steps, a time such as 30s, 10min or 2h, or auto, not {value!r}"
        )
    return Interval(seconds=seconds)


def best(cost_s: float, mtbf_s: float) -> float:
    """Seconds between checkpoints that lose least time, to first order.

    Too many cost ``cost_s`` each; too few lose half an interval at each failure.
    (Young, "A first order approximation to the optimum checkpoint interval", CACM 17, 1974.)
    """
    return math.sqrt(2 * cost_s * mtbf_s)
