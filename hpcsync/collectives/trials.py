"""A race of choices on the real job: windows of steps, compared in pairs; pure.

Steps differ by a few per cent from one to the next, and machines become slower and faster over
minutes. So choices take turns in short windows: each round runs each of them once, forwards and
then backwards, so that a steady drift cancels. Rounds are compared by the ratio of their windows'
medians. What is clearly slower drops out after each round; in the end the simplest of those that
cannot be told from the best wins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median, stdev

from .costs import Choice

# Differences below are not worth a less simple choice; nor are, where steps are noisy, those below
# two standard errors, but what is above the second share is taken even then.
_TIE, _MOST_TIE = 0.015, 0.025
# Slower than the best by such a share, and so many standard errors, after 1, 2, 3, ... rounds: out.
# A neighbour's burst outlasts a window, so the first rounds are judged with more care.
_CLEAR = ((0.10, 4.0), (0.05, 3.0), (0.02, 2.5))
_ROUNDS = 4
_MOST_WINDOWS = 14  # in all, where those rounds are too noisy
_GOOD_ENOUGH = 0.01  # standard error for which no further rounds are run


class Race:
    """Windows of steps of a few choices.

    Args:
        contenders: two or more, simplest first.
    """

    def __init__(self, contenders: Sequence[Choice]) -> None:
        self._alive = list(contenders)
        self._windows: dict[Choice, list[list[float]]] = {each: [] for each in contenders}
        self._order = list(contenders)
        self._rounds = 0

    @property
    def over(self) -> bool:
        return not self._order

    @property
    def current(self) -> Choice:
        """Whose window is to be run next; the winner when the race is over."""
        return self._order[0] if self._order else self.winner

    def add(self, samples: Sequence[float]) -> None:
        """The step times of a window of ``current``, in seconds; the same on all ranks."""
        assert not self.over
        self._windows[self._order.pop(0)].append(list(samples))
        if self._order:
            return
        self._rounds += 1
        self._drop()
        if len(self._alive) > 1 and not self._decided():
            forwards = self._rounds % 2 == 0
            self._order = self._alive[:] if forwards else self._alive[::-1]

    @property
    def winner(self) -> Choice:
        """The simplest of those that are as good as the best."""
        slower = self._slower()
        tie = min(max(_TIE, 2 * self.error), _MOST_TIE)
        return next(each for each in self._alive if slower[each] <= tie)

    def median_s(self, contender: Choice) -> float:
        """Median step of all windows of ``contender``; NaN if it had none."""
        samples = [one for window in self._windows[contender] for one in window]
        return median(samples) if samples else math.nan

    @property
    def error(self) -> float:
        """Standard error of the difference of two contenders, as a share of a step."""
        steps, count = [], 0
        for windows in self._windows.values():
            for window in windows:
                middle = median(window)
                count = max(count, len(window))
                steps += [abs(math.log(one / middle)) for one in window if one != middle]
        # A window's median is one of its few steps, so the others look nearer to it than they are.
        sigma = 1.3 * median(steps) if steps else 0.0
        # That of a median is 1.25 times that of a mean.
        within = 1.25 * sigma * math.sqrt(2 / (max(count, 1) * max(self._rounds, 1)))
        between = [
            stdev(ratios) / math.sqrt(len(ratios))
            for ratios in map(self._ratios, self._alive[1:])
            if len(ratios) >= 3
        ]
        return max([within, *between])

    def _ratios(self, contender: Choice) -> list[float]:
        """Logarithm of each round's step time, relative to the simplest that is left."""
        own, first = self._windows[contender], self._windows[self._alive[0]]
        return [math.log(median(a) / median(b)) for a, b in zip(own, first, strict=False)]

    def _slower(self) -> dict[Choice, float]:
        """By which share each contender is slower than the best."""
        ratios = {each: fmean(self._ratios(each)) for each in self._alive}
        best = min(ratios.values())
        return {each: ratio - best for each, ratio in ratios.items()}

    def _drop(self) -> None:
        share, errors = _CLEAR[min(self._rounds, len(_CLEAR)) - 1]
        limit = max(share, errors * self.error)
        slower = self._slower()
        self._alive = [each for each in self._alive if slower[each] <= limit]

    def _decided(self) -> bool:
        if self._rounds < _ROUNDS:
            return False
        windows = (self._rounds + 1) * len(self._alive)
        return windows > _MOST_WINDOWS or self.error <= _GOOD_ENOUGH
