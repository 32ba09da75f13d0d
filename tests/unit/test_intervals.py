"""How often checkpoints are taken: what a deck may say."""

from __future__ import annotations

import pytest

from hpcsync.intervals import Interval, best, parse


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, Interval()),
        (500, Interval(steps=500)),
        ("auto", Interval(auto=True)),
        ("30s", Interval(seconds=30.0)),
        ("10min", Interval(seconds=600.0)),
        (" 1.5 h ", Interval(seconds=5400.0)),
    ],
)
def test_what_is_understood(value: int | str, expected: Interval) -> None:
    assert parse(value) == expected


@pytest.mark.parametrize("value", ["", "10", "min", "10m", "0s", "-3min", "1e3s", "10min30s", "٣s"])
def test_what_is_not(value: str) -> None:
    with pytest.raises(ValueError, match="30s, 10min or 2h, or auto"):
        parse(value)


def test_the_best_interval_is_youngs() -> None:
    assert best(2.0, 100.0) == 20.0
