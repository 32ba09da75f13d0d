"""The reducer: averages gradients over ranks while the backward pass still runs.

    backward   hook(param) -> gradient into its bucket -> bucket complete? -> start its exchange
    its end    start what is left, wait for all, hand out what only other ranks had

Autograd calls a hook as soon as a parameter's gradient is final, and a callback at the end of
the backward pass, so an unchanged training loop finds averaged gradients after ``backward()``.

Parameters that this rank did not use take part with zeros. Each bucket carries one flag a
parameter, summed with it: a parameter that no rank used keeps ``grad = None``, as it would on
one rank.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..collectives import Collectives
from ..config import CommConfig
from ..errors import ModelError
from .bucket import Bucket
from .checks import check_same, check_usable
from .norms import total_norm
from .plan import BucketPlan, Parameter, plan_buckets

_MIB = 1 << 20


@dataclass(frozen=True)
class StepComm:
    """Communication of one backward pass on this rank.

    Attributes:
        comm_ms: time in which at least one bucket was being exchanged.
        exposed_comm_ms: time that the end of the backward pass waited for it.
        internode_bytes: sent by this rank to other nodes.
        bytes: of gradients, once.
    """

    comm_ms: float = 0.0
    exposed_comm_ms: float = 0.0
    internode_bytes: int = 0
    bytes: int = 0


class Reducer:
    """Gradient averaging for a list of parameters.

    Args:
        named: (name, parameter) pairs in the order of registration, the same on every rank.
        collectives: of this rank.
        config: the ``comm`` section.

    Raises:
        ModelError: the ranks' parameters differ, or a parameter is not in host memory.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        collectives: Collectives,
        config: CommConfig,
    ) -> None:
        self._collectives = collectives
        self._config = config
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._buckets: list[Bucket] = []
        self._sync = True
        self.stats = StepComm()
        self._adopt_parameters(named)

    @property
    def buckets(self) -> tuple[BucketPlan, ...]:
        """The plan in force."""
        return tuple(bucket.plan for bucket in self._buckets)

    @property
    def algorithm(self) -> str:
        """The algorithm of the buckets' allreduce."""
        names = {bucket.collective.algorithm for bucket in self._buckets}
        return "+".join(sorted(names)) if names else "none"

    def buckets_description(self) -> str:
        """One line: how many buckets, of what sizes."""
        sizes = [plan.nbytes / _MIB for plan in self.buckets]
        if not sizes:
            return "none (no parameter wants a gradient)"
        noun = "bucket" if len(sizes) == 1 else "buckets"
        return (
            f"{len(sizes)} {noun}, {sum(sizes):.1f} MiB "
            f"(smallest {min(sizes):.2f}, largest {max(sizes):.2f})"
        )

    @property
    def syncing(self) -> bool:
        """False inside ``no_sync``."""
        return self._sync

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of backward passes in this context stay local and add up."""
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    def prepare(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Before a forward pass: take over parameters that joined, left or were (un)frozen, and
        once, after the first exchange, put the buckets into the order seen there.
        """
        if _identity(param for _, param in named if param.requires_grad) != self._identity:
            self._adopt_parameters(named)
        elif self._sync and not self._ordered and self._ready:
            self._rebuild()

    def norm(self) -> Tensor:
        """Global 2-norm of all gradients, a float32 scalar (float64 if any gradient is); the same
        on every rank.

        It is made of norms a parameter in the order of registration, so that it does not depend
        on the buckets.
        """
        grads = [param.grad for param in self._params if param.grad is not None]
        return total_norm(grads)

    def finite(self) -> bool:
        """Whether no gradient holds NaN or Inf; the same on every rank."""
        return bool(torch.isfinite(self.norm()))

    def _adopt_parameters(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        wanted = [(name, param) for name, param in named if param.requires_grad]
        for name, param in wanted:
            check_usable(name, param)
        self._names = [name for name, _ in wanted]
        self._params = [param for _, param in wanted]
        self._identity = _identity(self._params)
        check_same(self._collectives.runtime, wanted)
        while self._hooks:
            self._hooks.pop().remove()
        self._ordered = False
        self._ready: list[int] = []
        self._build(range(len(wanted) - 1, -1, -1))
        for index, param in enumerate(self._params):
            hook = _Hook(self, index)
            handle = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            self._hooks.append(handle)

    def _plan(self, order: Sequence[int]) -> tuple[BucketPlan, ...]:
        described = [
            Parameter(name, param.numel(), str(param.dtype).removeprefix("torch."), param.itemsize)
            for name, param in zip(self._names, self._params, strict=True)
        ]
        return plan_buckets(
            described,
            order,
            int(self._config.bucket_mb * _MIB),
            int(self._config.first_bucket_mb * _MIB),
        )

    def _build(self, order: Sequence[int]) -> None:
        old, self._buckets = self._buckets, []
        for plan in self._plan(order):
            bucket = Bucket(plan, self._params, self._collectives)
            self._buckets.append(bucket)
            for slot, param in enumerate(bucket.params):
                if param.grad is not None:
                    bucket.adopt(slot)
        for bucket in old:
            bucket.collective.close()
        self._place = {
            index: (bucket, slot)
            for bucket in self._buckets
            for slot, index in enumerate(bucket.plan.params)
        }
        self._begin()

    def _rebuild(self) -> None:
        """Put the buckets into the order in which rank 0's gradients became ready."""
        self._ordered = True
        order: list[int] = self._collectives.runtime.bcast(self._ready)
        seen = set(order)
        order += [index for index in range(len(self._params)) if index not in seen]
        if self._plan(order) != self.buckets:
            self._build(order)

    def _begin(self) -> None:
        """Forget the last exchange."""
        self._used = [False] * len(self._params)
        self._came = [False] * len(self._params)
        self._callback = False
        for bucket in self._buckets:
            bucket.reset()

    def on_gradient(self, index: int) -> None:
        """A parameter's gradient is final for this backward pass."""
        bucket, slot = self._place[index]
        if bucket.launched or (self._sync and self._came[index]):
            self._late(index)
        with torch.no_grad():
            bucket.adopt(slot)
        self._used[index] = True
        if not self._sync:
            return
        if not self._callback:
            self._callback = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        self._came[index] = True
        if not self._ordered:
            self._ready.append(index)
        bucket.pending -= 1
        if bucket.pending == 0 and self._config.overlap:
            self._launch(bucket)

    def _late(self, index: int) -> None:
        raise ModelError(
            f"parameter {self._names[index]} got a gradient twice in one backward pass, after "
            "its exchange could have begun; use checkpoint(..., use_reentrant=False), or wrap "
            "all backward passes but the last in no_sync()"
        )

    def _launch(self, bucket: Bucket) -> None:
        used = [self._used[index] for index in bucket.plan.params]
        # Later buckets hold the layers at the front, which the next step needs first.
        priority = -bucket.plan.index if self._config.priority else 0
        bucket.launch(used, priority)

    def _finish(self) -> None:
        """The backward pass has ended: start what is left and wait for everything."""
        with torch.no_grad():
            for bucket in self._buckets:
                if not bucket.launched:
                    self._fill_unused(bucket)
                    self._launch(bucket)
            began = time.perf_counter()
            for bucket in self._buckets:
                bucket.collective.wait()
            self._record(time.perf_counter() - began)
            for index, used in enumerate(self._used):
                bucket, slot = self._place[index]
                if not used and self._collectives.runtime.size > 1 and bucket.used_anywhere(slot):
                    self._params[index].grad = bucket.views[slot]
        if not self._ordered:
            self._ready = list(dict.fromkeys(self._ready))
        self._begin()

    def _fill_unused(self, bucket: Bucket) -> None:
        """Parameters without a gradient of this rank take part with zeros."""
        for slot, index in enumerate(bucket.plan.params):
            if self._came[index]:
                continue
            if bucket.params[slot].grad is None:
                bucket.views[slot].zero_()
                self._used[index] = False  # it was, in a no_sync whose gradients were dropped
            else:  # left from before, or set by the user: it counts
                bucket.adopt(slot)
                self._used[index] = True

    def _record(self, exposed_s: float) -> None:
        if self._collectives.runtime.size == 1:
            return
        busy = 0.0
        end = 0.0
        spans = sorted(
            (bucket.collective.started_s, bucket.collective.finished_s) for bucket in self._buckets
        )
        for start, stop in spans:
            busy += max(0.0, stop - max(start, end))
            end = max(end, stop)
        self.stats = StepComm(
            comm_ms=busy * 1e3,
            exposed_comm_ms=exposed_s * 1e3,
            internode_bytes=sum(each.collective.internode_bytes for each in self._buckets),
            bytes=sum(plan.nbytes for plan in self.buckets),
        )


def _identity(params: Iterable[nn.Parameter]) -> list[tuple[int, torch.dtype]]:
    return [(id(param), param.dtype) for param in params]


class _Hook:
    """Calls the reducer for one parameter; a name, so that profiles show it."""

    __slots__ = ("_index", "_reducer")

    def __init__(self, reducer: Reducer, index: int) -> None:
        self._reducer = reducer
        self._index = index

    def __call__(self, param: Tensor) -> None:
        self._reducer.on_gradient(self._index)
