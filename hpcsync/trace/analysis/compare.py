"""Two runs: what got slower, by lane and by bucket, with confidence intervals.

A step is one observation: the mean over the ranks of what it took. The interval of the difference
of two means with unequal scatter is Welch's (The generalization of Student's problem when several
different population variances are involved, Biometrika 34, 1947); it takes steps as independent of
each other. It is given as a share of the first run's mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from ...errors import UserError
from ..file import RunFacts
from .account import STAGES
from .exchange import exchange
from .tables import Numbers, Tables
from .verdict import settings

LANES = (
    *("whole", "compute", "forward", "backward", "exposed", "data", "optimizer", "idle", "other"),
    *("comm", *STAGES),
)
_SAME = ("model", "data")
_SAME_KEYS = (("train", "global_batch"), ("train", "accumulate"), ("train", "precision"))


@dataclass(frozen=True, slots=True)
class Change:
    """One thing in both runs.

    Attributes:
        a_ms, b_ms: mean of a step.
        change: (b - a) / a; ``low`` and ``high`` are the ends of its interval.
        of_step: (b - a) as a share of the first run's step.
        verdict: ``slower`` or ``faster`` if the interval is on one side of nothing, and the change
            is beyond the threshold; else ``same``.
    """

    name: str
    a_ms: float
    b_ms: float
    change: float
    low: float
    high: float
    of_step: float
    verdict: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """The changes by lane, ``whole`` first, and by bucket; and keys of the decks that differ."""

    lanes: list[Change]
    buckets: list[Change]
    settings: list[tuple[str, str, str]]
    slower: bool


def compare(
    a: Tables, b: Tables, facts: tuple[RunFacts, RunFacts], threshold: float, level: float = 0.95
) -> Comparison:
    """Compare the run ``b`` with the run ``a``.

    Args:
        threshold: change from which something counts as slower, e.g. 0.05.
        level: of confidence.
    """
    step = float(a.columns["whole"].mean())
    judge = _Judge(step, threshold, level)
    lanes = [judge.change(name, _by_step(a, name), _by_step(b, name)) for name in LANES]
    lanes = [each for each in lanes if each.a_ms > 0 or each.b_ms > 0]
    found, other = exchange(a), exchange(b)
    buckets = []
    if _plans(a) == _plans(b):
        for k, bucket in enumerate(a.buckets.tolist()):
            one, two = _known(found.transfer[:, k]), _known(other.transfer[:, k])
            if one.shape[0] and two.shape[0]:
                buckets.append(judge.change(str(bucket), one, two))
    return Comparison(lanes, buckets, _differing(facts), lanes[0].verdict == "slower")


def check_comparable(one: RunFacts, other: RunFacts) -> None:
    """Refuse runs that do not do the same work on as many ranks.

    Raises:
        UserError: naming what differs.
    """
    for what, first, second in (
        ("ranks", one.ranks, other.ranks),
        ("nodes", one.nodes, other.nodes),
    ):
        if first != second:
            raise UserError(
                f"diff: the runs do not compare: {first} and {second} {what}; give --anyway to "
                "compare them nevertheless"
            )
    for key, mine, theirs in _differing((one, other)):
        section, _, name = key.partition(".")
        if section in _SAME or (section, name) in _SAME_KEYS:
            raise UserError(
                f"diff: the runs do not compare: {key} is {mine} in one and {theirs} in the "
                "other; give --anyway to compare them nevertheless"
            )


def same_buckets(a: Tables, b: Tables) -> bool:
    """Whether both runs cut their gradients alike."""
    return _plans(a) == _plans(b)


class _Judge:
    def __init__(self, step: float, threshold: float, level: float) -> None:
        self.step, self.threshold, self.level = step, threshold, level

    def change(self, name: str, a: Numbers, b: Numbers) -> Change:
        """Of two samples in ns, one value a step."""
        one, two = float(a.mean()), float(b.mean())
        half = welch(a, b, self.level)
        base = one if one > 0 else float("nan")
        change, low, high = ((two - one + each) / base for each in (0.0, -half, half))
        if change > self.threshold and low > 0:
            verdict = "slower"
        elif change < -self.threshold and high < 0:
            verdict = "faster"
        else:
            verdict = "same"
        return Change(
            name, one / 1e6, two / 1e6, change, low, high, (two - one) / self.step, verdict
        )


def welch(a: Numbers, b: Numbers, level: float) -> float:
    """Half the width of the interval of the difference of the means; infinite for single values."""
    if min(a.shape[0], b.shape[0]) < 2:
        return math.inf
    first, second = float(a.var(ddof=1)) / a.shape[0], float(b.var(ddof=1)) / b.shape[0]
    if first + second == 0:
        return 0.0
    freedom = (first + second) ** 2 / (first**2 / (a.shape[0] - 1) + second**2 / (b.shape[0] - 1))
    return student(level, freedom) * math.sqrt(first + second)


def student(level: float, freedom: float) -> float:
    """The two-sided quantile of Student's t, within 1% from 3 degrees of freedom on.

    By the expansion in powers of 1/freedom (Abramowitz and Stegun, 26.7.5).
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def _by_step(tables: Tables, name: str) -> Numbers:
    values: Numbers = tables.columns[name].mean(axis=0)
    return values


def _known(values: Numbers) -> Numbers:
    return values[np.isfinite(values)]


def _plans(tables: Tables) -> list[tuple[int, float]]:
    """The buckets with their sizes in the last step."""
    sizes = np.nan_to_num(tables.nbytes[-1]) if tables.nbytes.size else np.zeros(0)
    return list(zip(tables.buckets.tolist(), sizes.tolist(), strict=True))


def _differing(facts: tuple[RunFacts, RunFacts]) -> list[tuple[str, str, str]]:
    """Keys of the decks that differ, and both values; the run's own name and folders apart."""
    one, other = _flat(settings(facts[0])), _flat(settings(facts[1]))
    keys = sorted(set(one) | set(other))
    return [
        (key, str(one.get(key, "not set")), str(other.get(key, "not set")))
        for key in keys
        if one.get(key) != other.get(key) and key.partition(".")[0] not in ("run", "trace")
    ]


def _flat(deck: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in deck.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
