"""Which parameters are exchanged, and in which buckets: one arena, laid out anew when it must be.

    adopt      parameters that joined, left or were (un)frozen -> a new arena and buckets
    follow     the order in which gradients became ready        -> the next ``settle`` takes it
    settle     before a step, if the order or the codec changed -> new buckets in the same arena

What codecs hold back of a parameter goes with it from layout to layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn

from ..collectives import Collectives
from ..collectives.kept import Keeper
from ..config import CommConfig
from . import memory
from .bucket import Bucket
from .checks import check_same
from .compression import Compression, check
from .flags import BetweenHosts, Flags, InBuckets
from .plan import BucketPlan, Parameter, arena_bytes, place_buckets, plan_buckets

_MIB = 1 << 20


class BucketLayout:
    """The parameters of a reducer and their buckets.

    Args:
        collectives: of this rank.
        config: the ``comm`` section.
        compression: how gradients are coded; not at all if None.

    Attributes:
        config: that in force; a new one counts from the next ``build`` on.
        names: of the parameters, in the order of registration.
        params: the parameters; an index below is one into them.
        described: the same for plans.
        buckets: in the order of their exchange.
        place: index of a parameter -> its bucket, and its slot there.
        order: indices, in the order in which gradients are expected.
        ordered: whether that order has been seen, not guessed.
        stale: ``settle`` must build anew.
        flags: of the parameters.
        keepers: what this rank keeps of each step's means, each with its bucket's index, after
            ``keep``; the same tuple as long as the buckets are the same ones.
    """

    def __init__(
        self, collectives: Collectives, config: CommConfig, compression: Compression | None
    ) -> None:
        self._collectives = collectives
        self.config = config
        self.compression = compression
        self.names: list[str] = []
        self.params: list[nn.Parameter] = []
        self.described: list[Parameter] = []
        self.buckets: list[Bucket] = []
        self.place: dict[int, tuple[Bucket, int]] = {}
        self.order: list[int] = []
        self.ordered = False
        self.stale = False
        self.keepers: tuple[tuple[int, Keeper], ...] = ()
        self.flags: Flags = InBuckets()
        self._identity: list[tuple[int, torch.dtype]] = []
        self._seen: list[int] = []
        self._keeping = False

    @property
    def plans(self) -> tuple[BucketPlan, ...]:
        """The plan in force."""
        return tuple(bucket.plan for bucket in self.buckets)

    def index_of(self) -> dict[str, int]:
        """Name of a parameter -> its index."""
        return {name: index for index, name in enumerate(self.names)}

    def fits(self, named: Sequence[tuple[str, nn.Parameter]]) -> bool:
        """Whether it is of those of these parameters that want a gradient."""
        return _identity(param for _, param in named if param.requires_grad) == self._identity

    def adopt(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Take over those parameters that want a gradient; collective.

        Raises:
            AgreedError: the ranks' parameters differ, or the codec cannot take them.
            ModelError: parameters are not all on the device of the collectives.
        """
        wanted = [(name, param) for name, param in named if param.requires_grad]
        check_same(self._collectives.runtime, wanted, self._collectives.device)
        described = [_describe(name, param) for name, param in wanted]
        if (made := self.compression) is not None:
            self._collectives.runtime.agree(check(made.codec, made.config, described))
        remembered = self._remembered()
        # Only now: parameters that were refused must be refused again.
        self.names = [name for name, _ in wanted]
        self.params = [param for _, param in wanted]
        self.described = described
        self._identity = _identity(self.params)
        for bucket in self.buckets:
            bucket.collective.close()
        # Gradients of before keep the old arena alive until they are moved or dropped.
        self.buckets = []
        self._arena = self._collectives.arena(
            max(arena_bytes(described), 1), pieces=2 * len(wanted)
        )
        if self._collectives.device.queued and self._collectives.runtime.size > 1:
            self.flags.close()
            self.flags = BetweenHosts(self._collectives, len(wanted))
        # Autograd goes from the loss to the front, more or less.
        self.order, self.ordered, self._seen = list(range(len(wanted) - 1, -1, -1)), False, []
        self.build()
        memory.deal(remembered, self.buckets, described)

    def follow(self, ready: Iterable[int]) -> None:
        """Take the order in which rank 0's gradients became ready, from the next step on;
        collective."""
        self.ordered = True
        order: list[int] = self._collectives.runtime.bcast(list(dict.fromkeys(ready)))
        seen = set(order)
        self._seen = order + [index for index in range(len(self.params)) if index not in seen]

    def settle(self) -> bool:
        """Lay the buckets out as the next step has them; True if they are others than before."""
        if not (self._seen or self.stale):
            return False
        self.order, self._seen = self._seen or self.order, []
        if not self.stale and self._plan() == self.plans:
            return False
        self.rebuild()
        return True

    def restore(self, order: Sequence[str]) -> None:
        """Lay the buckets out, with nothing held back, by an order of names that was seen
        elsewhere; an empty one changes none."""
        if order:
            index_of = self.index_of()
            self.order, self.ordered = [index_of[name] for name in order], True
            self._seen = []
        self.stale = False
        self.build()

    def rebuild(self) -> None:
        """Lay the buckets out by the order and the codec in force; nothing held back is lost."""
        self.stale = False
        remembered = self._remembered()
        self.build()
        memory.deal(remembered, self.buckets, self.described)

    def build(self) -> None:
        """Lay the buckets out anew, in the arena that is there: nothing more is taken."""
        plans = self._plan()
        starts, size = place_buckets(plans)
        assert size <= self._arena.nbytes
        # Gradients of before stand where others will.
        grads = [None if param.grad is None else param.grad.clone() for param in self.params]
        for bucket in self.buckets:
            bucket.collective.close()
        made = self.compression
        self.buckets = [
            Bucket(
                plan,
                self.params,
                self._collectives,
                self._arena,
                start,
                made.coding(plan, self.described) if made else None,
                self.config,
            )
            for plan, start in zip(plans, starts, strict=True)
        ]
        self.place = {
            index: (bucket, slot)
            for bucket in self.buckets
            for slot, index in enumerate(bucket.plan.params)
        }
        for index, grad in enumerate(grads):
            if grad is not None:
                bucket, slot = self.place[index]
                self.params[index].grad = grad
                bucket.adopt(slot)
        if self._keeping:
            self.keep()

    def keep(self) -> None:
        """Keep what a replay log needs, from the next exchange on."""
        self._keeping = True
        runtime = self._collectives.runtime
        self.keepers = tuple(
            (bucket.plan.index, keeper)
            for bucket in self.buckets
            for keeper in bucket.keepers(runtime.rank, runtime.size)
        )

    def close(self) -> None:
        """Free the collectives."""
        for bucket in self.buckets:
            bucket.collective.close()
        self.flags.close()

    def _remembered(self) -> memory.Pending:
        """What codecs hold back on this node."""
        if self.compression is None or not self.buckets:
            return {}
        where = self.compression.config.where
        return memory.gather(self._collectives, self.buckets, self.described, where)

    def _plan(self) -> tuple[BucketPlan, ...]:
        described = self.described
        if self.compression is not None:
            wants = self.compression.wants
            described = [replace(param, coded=wants(param)) for param in described]
        return plan_buckets(
            described,
            self.order,
            int(self.config.bucket_mb * _MIB),
            int(self.config.first_bucket_mb * _MIB),
        )


def _describe(name: str, param: nn.Parameter) -> Parameter:
    dtype = str(param.dtype).removeprefix("torch.")
    return Parameter(name, param.numel(), dtype, param.itemsize, tuple(param.shape))


def _identity(params: Iterable[nn.Parameter]) -> list[tuple[int, torch.dtype]]:
    return [(id(param), param.dtype) for param in params]
