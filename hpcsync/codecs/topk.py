"""Top-k: each piece sends its k elements of largest magnitude, and holds the others back.

An owner, who adds the pieces of all ranks to its own values, sends four times as many of the mean:
what waits there has waited at a sender before, and learning suffers from the sum of both.

Deep Gradient Compression (Lin et al., arXiv 1712.01887): momentum correction and masking, the
warm-up of the share (section 3.3), a threshold found by a sample (section 5; here it only speeds
up the search, the k elements are exact). k is fixed for every piece, so owners of equal pieces
have equal work, whatever the gradient.
"""

from __future__ import annotations

from . import sparse_form
from .sparse import SparseCodec

FIRST_SHARE = 0.25
_OWNER_TIMES = 4


class TopK(SparseCodec):
    """``settings.ratio`` of the elements; with ``ratio_warmup``, at first a quarter."""

    name = "topk"

    def share(self, step: int) -> float:
        """Share of the elements that goes in a step: it falls exponentially to the ratio."""
        ratio, steps = self.settings.ratio, self.settings.ratio_warmup
        if step >= steps or ratio >= FIRST_SHARE:
            return ratio
        return float(FIRST_SHARE * (ratio / FIRST_SHARE) ** (step / steps))

    def most(self, count: int, step: int) -> int:
        return max(1, round(self.share(step) * count)) if count else 0

    def most_of_mean(self, count: int, step: int) -> int:
        return min(count, _OWNER_TIMES * self.most(count, step))

    def minimum(self) -> float:
        return 0.0

    def capacity(self, count: int) -> int:
        return sparse_form.most_bytes(count, self.most_of_mean(count, 0))

    def expected(self, count: int) -> float:
        """Of both passes, on average."""
        step = self.settings.ratio_warmup
        entries = (self.most(count, step), self.most_of_mean(count, step))
        return sum(sparse_form.most_bytes(count, each, full=False) for each in entries) / 2
