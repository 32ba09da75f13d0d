"""Threshold: what has accumulated to a fixed magnitude goes, the rest is held back.

Strom, Scalable distributed DNN training using commodity GPU cloud computing (Interspeech 2015),
with values of 16 bits instead of one. The owner of a piece compares the mean with the threshold.
"""

from __future__ import annotations

from . import sparse_form
from .sparse import SparseCodec


class Threshold(SparseCodec):
    """Magnitudes from ``settings.threshold`` on; as many as there are."""

    name = "threshold"

    def most(self, count: int, step: int) -> int:
        return count

    def minimum(self) -> float:
        return self.settings.threshold

    def capacity(self, count: int) -> int:
        return sparse_form.most_bytes(count, count)

    def expected(self, count: int) -> float:
        """As if as many went as top-k would send: nobody knows before."""
        entries = round(self.settings.ratio * count)
        return float(sparse_form.most_bytes(count, entries, full=False))
