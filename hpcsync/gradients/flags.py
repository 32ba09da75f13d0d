"""Which parameters have a gradient on which rank: one flag a parameter, summed with the exchange.

On the host they travel at the end of each bucket. What a device holds the host would have to wait
for; there they are a small exchange of their own, between the hosts, while the devices compute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ..collectives import Collectives
from ..device import dtype_of
from .plan import BucketPlan


class Flagged(Protocol):
    """A bucket, as far as flags are concerned."""

    plan: BucketPlan
    flags: Any


class Flags(Protocol):
    """What a reducer asks; of a backward pass, in this order."""

    def launched(self, bucket: Flagged, used: Sequence[bool], *, failed: bool) -> None:
        """A bucket is about to start: which of its parameters have a gradient here, or that this
        rank has none to give."""

    def exchange(self) -> None:
        """All buckets have been started; sleep until the flags of all ranks are there, as far as
        they do not travel in the buckets, whose exchange the caller has waited for. Called again
        in the same pass, after an exception of a signal handler, it goes on to wait."""

    def used_anywhere(self, bucket: Flagged, slot: int) -> bool:
        """Whether any rank had a gradient of the parameter."""

    def failed_anywhere(self, bucket: Flagged) -> bool:
        """Whether a rank had to give up in its backward pass."""

    def ended(self) -> None:
        """The pass is over, given up or not."""

    def close(self) -> None:
        """Free what is bound."""


class InBuckets:
    """At the end of each bucket, as elements of its type."""

    def launched(self, bucket: Flagged, used: Sequence[bool], *, failed: bool) -> None:
        if failed:
            bucket.flags.fill_(math.nan)
        elif all(used):
            bucket.flags.fill_(1)
        else:
            bucket.flags.copy_(bucket.flags.new_tensor(used))

    def exchange(self) -> None:
        pass

    def used_anywhere(self, bucket: Flagged, slot: int) -> bool:
        return bool(bucket.flags[slot] > 0)

    def failed_anywhere(self, bucket: Flagged) -> bool:
        return bool(bucket.flags[0].isnan())

    def ended(self) -> None:
        pass

    def close(self) -> None:
        pass


class BetweenHosts:
    """One exchange of host memory a backward pass, for all parameters.

    Args:
        count: of parameters.
    """

    def __init__(self, collectives: Collectives, count: int) -> None:
        nbytes = 4 * (count + 1)
        self._buffer = collectives.buffer(nbytes)
        self._values = self._buffer.own[:nbytes].view(np.float32)
        self._collective = collectives.allreduce(
            self._buffer, dtype_of("float32"), count=count + 1, label="flags of parameters"
        )
        self._started = False  # in this pass

    def launched(self, bucket: Flagged, used: Sequence[bool], *, failed: bool) -> None:
        self._values[list(bucket.plan.params)] = used
        self._values[-1] = failed

    def exchange(self) -> None:
        if not self._started:
            self._started = True
            self._collective.start()
        self._collective.wait()

    def used_anywhere(self, bucket: Flagged, slot: int) -> bool:
        return bool(self._values[bucket.plan.params[slot]] > 0)

    def failed_anywhere(self, bucket: Flagged) -> bool:
        return bool(self._values[-1] > 0)

    def ended(self) -> None:
        self._started = False

    def close(self) -> None:
        self._collective.close()
