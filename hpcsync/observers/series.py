"""Time series of this process, as the package prometheus_client collects them.

Values stand in plain dictionaries and arrays, so that a step with hundreds of transfers costs a
few additions; samples are made when somebody asks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from prometheus_client import Metric

PREFIX = "hpcsync_"


@dataclass(frozen=True, slots=True)
class Family:
    """A metric: its name without ``PREFIX``, what it says, and its own labels.

    Attributes:
        kind: ``gauge``, ``counter`` or ``histogram``.
        bounds: upper bounds of a histogram's bins; one more is open.
    """

    name: str
    kind: str
    text: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


@dataclass(slots=True)
class _Counts:
    """A histogram: values by bin, and their sum."""

    bins: NDArray[np.int64]
    total: float = 0.0


@dataclass(slots=True)
class _Values:
    """Of one metric, by the values of its labels."""

    family: Family
    numbers: dict[tuple[str, ...], float] = field(default_factory=dict)
    counts: dict[tuple[str, ...], _Counts] = field(default_factory=dict)


class Series:
    """The values of a list of metrics; what was never told has no sample.

    Args:
        constant: labels that every sample has.
    """

    def __init__(self, families: Iterable[Family], constant: Mapping[str, str]) -> None:
        self._values = {family.name: _Values(family) for family in families}
        self._constant = dict(constant)
        self._lock = threading.Lock()

    def set(self, name: str, value: float, *labels: str) -> None:
        """A gauge's value; labels in the order of ``Family.labels``."""
        with self._lock:
            self._values[name].numbers[labels] = value

    def add(self, name: str, value: float, *labels: str) -> None:
        """Add to a counter."""
        with self._lock:
            numbers = self._values[name].numbers
            numbers[labels] = numbers.get(labels, 0.0) + value

    def observe(self, name: str, values: float | Sequence[float], *labels: str) -> None:
        """Count one or several values into a histogram."""
        found = np.atleast_1d(np.asarray(values, np.float64))
        with self._lock:
            own = self._values[name]
            bounds = own.family.bounds
            counts = own.counts.setdefault(labels, _Counts(np.zeros(len(bounds) + 1, np.int64)))
            counts.bins += np.bincount(np.searchsorted(bounds, found), minlength=len(bounds) + 1)
            counts.total += float(found.sum())

    def collect(self) -> Iterator[Metric]:
        """Every metric that has samples, with them."""
        from prometheus_client.core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )
        from prometheus_client.utils import floatToGoString

        keys, constant = tuple(self._constant), tuple(self._constant.values())
        with self._lock:
            for own in self._values.values():
                family = own.family
                named = PREFIX + family.name, family.text
                if own.numbers:
                    kind = GaugeMetricFamily if family.kind == "gauge" else CounterMetricFamily
                    numbers = kind(*named, labels=keys + family.labels)
                    for labels, value in own.numbers.items():
                        numbers.add_metric(constant + labels, value)
                    yield numbers
                if own.counts:
                    counted = HistogramMetricFamily(*named, labels=keys + family.labels)
                    above = [*map(floatToGoString, family.bounds), "+Inf"]
                    for labels, counts in own.counts.items():
                        below = np.cumsum(counts.bins).tolist()
                        pairs = list(zip(above, map(float, below), strict=True))
                        counted.add_metric(constant + labels, pairs, counts.total)
                    yield counted
