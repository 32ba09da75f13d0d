"""Top-k: each piece sends its k elements of largest magnitude, and holds the others back.

Deep Gradient Compression (Lin et al., arXiv 1712.01887): momentum correction and masking, the
warm-up of the share (section 3.3), a threshold found by a sample (section 5; here it only speeds
up the search, the k elements are exact). k is fixed for every piece, so owners of equal pieces
have equal work, whatever the gradient.
"""

from __future__ import annotations

from . import sparse_form
from .sparse import SparseCodec

FIRST_SHARE = 0.25


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

    def minimum(self) -> float:
        return 0.0

    def capacity(self, count: int) -> int:
        return sparse_form.most_bytes(count, self.most(count, 0))

    def expected(self, count: int) -> float:
        entries = self.most(count, self.settings.ratio_warmup)
        return float(sparse_form.most_bytes(count, entries, full=False))
