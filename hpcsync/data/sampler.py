"""Which samples a step trains on: a pure function of the seed and the step.

Each epoch visits every sample once, in an order of its own. The order is a keyed permutation
computed entry by entry, a Feistel network walked until it lands inside the range (Black and
Rogaway, "Ciphers with arbitrary finite domains", 2002), so no rank holds a table and any step can
be asked for at once: resuming needs nothing but the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcsync.errors import DataError

_ROUNDS = 6
_MASK = 0xFFFFFFFFFFFFFFFF


class Sampler:
    """The order of samples, and the position in it.

    ``step`` is the position: the next step to train, counted from 0; ``samples`` are those trained
    on before it. ``global_batch`` counts samples of a step over all ranks and micro-batches; the
    order does not depend on how many ranks share it.
    """

    def __init__(self, source_size: int, global_batch: int, seed: int) -> None:
        assert source_size > 0
        assert global_batch > 0
        self.source_size = source_size
        self.global_batch = global_batch
        self.seed = seed
        self.step = 0
        self.samples = 0

    def indices(self, step: int) -> NDArray[np.int64]:
        """The samples of a global step, int64 (global_batch,); may cross an epoch's end."""
        first = step * self.global_batch
        position = np.arange(first, first + self.global_batch, dtype=np.int64)
        epochs, places = np.divmod(position, self.source_size)
        out = np.empty_like(places)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            out[here] = permute(places[here], self.source_size, self.seed, epoch)
        return out

    def shard(
        self, step: int, rank: int, size: int, micro: int = 0, accumulate: int = 1
    ) -> NDArray[np.int64]:
        """The samples of micro-batch ``micro`` (of ``accumulate``) on ``rank`` (of ``size``).

        int64 of shape (global_batch / (size * accumulate),). Over all ranks and micro-batches
        these are the samples of ``indices(step)``, each once.
        """
        assert 0 <= rank < size
        assert 0 <= micro < accumulate
        assert self.global_batch % (size * accumulate) == 0, "config.check_ranks was not asked"
        count = self.global_batch // (size * accumulate)
        first = (micro * size + rank) * count
        return self.indices(step)[first : first + count]

    def advance(self) -> None:
        """A step has been trained."""
        self.step += 1
        self.samples += self.global_batch

    def state_dict(self) -> dict[str, int]:
        """The position, and what it is a position in."""
        return {
            "step": self.step,
            "samples": self.samples,
            "seed": self.seed,
            "source_size": self.source_size,
            "global_batch": self.global_batch,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, anew: bool = False) -> None:
        """Take up a saved position.

        Args:
            anew: the order may be another one: go on at the same step of this one.

        Raises:
            DataError: it belongs to another order.
        """
        for key, text in (
            ("seed", "run.seed"),
            ("source_size", "the number of training samples"),
            ("global_batch", "train.global_batch"),
        ):
            now = getattr(self, key)
            if state[key] != now and not anew:
                raise DataError(
                    f"{text} is {now}, but the saved run had {state[key]}: its place in the data "
                    "cannot be taken up; use the saved value or start a new run"
                )
        self.step, self.samples = int(state["step"]), int(state["samples"])


def permute(places: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Entries ``places`` of a permutation of ``range(size)`` keyed by seed and epoch."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = [_mix(_mix(_mix(seed) ^ epoch) + r) for r in range(_ROUNDS)]
    out = _feistel(places.astype(np.uint64), half, keys)
    # The network permutes 4**half >= size values; stepping on from those outside the range
    # gives a permutation of the range. Fewer than four steps are needed on average.
    while (outside := out >= np.uint64(size)).any():
        out[outside] = _feistel(out[outside], half, keys)
    return out.astype(np.int64)


def step_seed(seed: int, step: int, rank: int) -> int:
    """What dropout draws from in a step on a rank: 64 bits, so nothing of it need be saved."""
    return _mix(_mix(_mix(seed) ^ step) ^ rank)


def spread(size: int, count: int) -> NDArray[np.int64]:
    """``min(size, count)`` indices of ``range(size)``, evenly spread, for evaluation."""
    count = min(size, count)
    return np.arange(count, dtype=np.int64) * size // max(count, 1)


def _feistel(values: NDArray[np.uint64], half: int, keys: list[int]) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix_array(right ^ np.uint64(key)) & mask)
    return (left << shift) | right


def _mix(value: int) -> int:
    """One output of splitmix64 (Steele, Lea and Flood, 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _mix_array(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """``_mix`` of each entry; integer arrays wrap around without a warning."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
