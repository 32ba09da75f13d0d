"""What bench_auto makes of its samples: ratios, verdicts, the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tools.benchmark import median

TOLERANCE = 0.03


def ratio(these: Sequence[float], those: Sequence[float]) -> tuple[float, float]:
    """Median of the ratios round by round, and its standard error.

    The error is that of a median of normal values, whose deviation is estimated by the median
    absolute one, so that a round that something disturbed counts little.
    """
    found = [one / other for one, other in zip(these, those, strict=True)]
    middle = median(found)
    deviation = 1.4826 * median(abs(each - middle) for each in found)
    return middle, float(1.2533 * deviation / len(found) ** 0.5)


def judge(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """auto against the fixed choices, from samples by name."""
    fixed = [name for name in seconds if name != "auto"]
    best = min(fixed, key=lambda name: median(seconds[name]))
    over_best, best_error = ratio(seconds["auto"], seconds[best])
    over_none, none_error = ratio(seconds["auto"], seconds["none"])
    return {
        "best": best,
        "over_best": over_best,
        "over_none": over_none,
        "error": max(best_error, none_error),
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines that say how well auto chose."""

    def share(key: str) -> tuple[int, float]:
        good = sum(row[key] <= 1 + TOLERANCE for row in rows)
        return good, max(row[key] for row in rows) - 1

    best, worst = share("over_best")
    none, worst_none = share("over_none")
    percent = TOLERANCE * 100
    gain = sum(row["over_none"] < 1 - TOLERANCE for row in rows)
    sure = sum(row["over_best"] - 2 * row["error"] > 1 + TOLERANCE for row in rows)
    return [
        f"at most {percent:.0f}% slower than the best fixed choice: {best} of {len(rows)} setups "
        f"({best / len(rows) * 100:.0f}%), at worst {worst * 100:+.1f}%; slower than that by more "
        f"than two standard errors: {sure}",
        f"at most {percent:.0f}% slower than uncoded: {none} of {len(rows)} setups "
        f"({none / len(rows) * 100:.0f}%), at worst {worst_none * 100:+.1f}%; "
        f"more than {percent:.0f}% faster: {gain}",
    ]


def heads(allow: Sequence[str]) -> list[str]:
    """Of the table."""
    fixed = [f"{name}(ms)" for name in allow]
    return ["layout", "model", "link", *fixed, "auto(ms)", "auto/best", "+-", "auto/none", "chose"]


def cells(row: Mapping[str, Any], allow: Sequence[str]) -> list[str]:
    """A setup as text."""
    steps = [f"{median(row['seconds'][name]) * 1e3:.1f}" for name in [*allow, "auto"]]
    return [
        row["layout"],
        row["model"],
        row["link"],
        *steps,
        f"{row['over_best']:.3f}",
        f"{row['error']:.3f}",
        f"{row['over_none']:.3f}",
        row["chose"],
    ]
