"""A backward pass: gradients go into buckets, and buckets on their way while it still runs.

    gradient   hook(param) -> gradient into its bucket -> bucket complete? -> start its exchange
    its end    start what is left, wait for all, hand out what only other ranks had

Autograd calls a hook as soon as a parameter's gradient is final, and a callback at the end of
the backward pass, so an unchanged training loop finds averaged gradients after ``backward()``.

Parameters that this rank did not use take part with zeros. Each bucket carries one flag a
parameter, summed with it: a parameter that no rank used keeps ``grad = None``, as it would on
one rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..collectives import Collectives
from ..errors import HpcsyncError, ModelError
from ..trace.recorder import DRIVEN, EXPOSED, FILL, now
from .bucket import Bucket, Transform
from .layout import BucketLayout
from .stats import Comm, DeviceComm, StepComm, step_comm


class BackwardPass:
    """The exchange of gradients in one backward pass after another.

    Args:
        layout: of the buckets; ``hook`` and ``begin`` follow another.
        collectives: of this rank.
        ended: told of each exchange that is over, given up or not, on all ranks: when the wait
            for it began, in seconds of ``time.perf_counter``.

    Attributes:
        sync: gradients are exchanged; else they stay local and add up.
        transform: makes what is exchanged in place of gradients.
        under_way: a gradient has come, and the end of the pass has not.
        ready: indices of parameters, as their gradients came, until an order has been seen.
        stats: of the last exchange.
        exchanged: ``keepers`` of the layout in the last exchange.
    """

    def __init__(
        self, layout: BucketLayout, collectives: Collectives, ended: Callable[[float], None]
    ) -> None:
        self._layout = layout
        self._collectives = collectives
        self._ended = ended
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.sync = True
        self.transform: Transform | None = None
        self.ready: list[int] = []
        self.stats: Comm = StepComm()
        self.exchanged = layout.keepers
        runtime = collectives.runtime
        self._alone = runtime.size == 1
        # Without a free core a thread beside the backward pass only takes time from it.
        crowded = runtime.crowding * torch.get_num_threads() >= 1
        self._drives = crowded and not self._alone
        self.begin()

    def hook(self) -> None:
        """Be told of the gradients of the layout's parameters."""
        self.ready = []
        self.unhook()
        for index, param in enumerate(self._layout.params):
            hook = _Hook(self, index)
            handle = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            self._hooks.append(handle)

    def unhook(self) -> None:
        """Be told of no gradient any more."""
        while self._hooks:
            self._hooks.pop().remove()

    def begin(self) -> None:
        """Forget the last exchange."""
        self._used = [False] * len(self._layout.params)
        self._came = [False] * len(self._layout.params)
        self.under_way = False
        self._driven_ns = 0  # that the computing thread spent on rounds of the exchange
        for bucket in self._layout.buckets:
            bucket.reset()

    def on_gradient(self, index: int) -> None:
        """A parameter's gradient is final for this backward pass.

        Raises:
            ModelError: it was so before.
        """
        layout, sync = self._layout, self.sync
        bucket, slot = layout.place[index]
        if bucket.launched or (sync and self._came[index]):
            self._late(index)
        if torch.is_grad_enabled():  # of a pass that makes a graph of its own
            with torch.no_grad():
                bucket.adopt(slot, self.transform if sync else None)
        else:
            bucket.adopt(slot, self.transform if sync else None)
        self._used[index] = True
        if not sync:
            return
        if not self.under_way:
            self.under_way = True
            self._collectives.recorder.count_step()
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        self._came[index] = True
        if not layout.ordered:
            self.ready.append(index)
        if bucket.pending == len(bucket.params):
            bucket.filling = now()
        bucket.pending -= 1
        if bucket.pending == 0 and layout.config.overlap:
            self._launch(bucket)
        if self._drives:
            start = now()
            if self._collectives.progress.drive():
                ended = now()
                self._collectives.recorder.add(DRIVEN, start, ended)
                self._driven_ns += ended - start

    def _late(self, index: int) -> None:
        raise ModelError(
            f"parameter {self._layout.names[index]} got a gradient twice in one backward pass, "
            "after its exchange could have begun; use checkpoint(..., use_reentrant=False), or "
            "wrap all backward passes but the last in no_sync()"
        )

    def _launch(self, bucket: Bucket) -> None:
        used = [self._used[index] for index in bucket.plan.params]
        if bucket.filling:
            recorder = self._collectives.recorder
            recorder.add(FILL, bucket.filling, now(), bucket.plan.nbytes, bucket.plan.index)
        # Later buckets hold the layers at the front, which the next step needs first.
        priority = -bucket.plan.index if self._layout.config.priority else 0
        self._layout.flags.launched(bucket, used, failed=False)
        bucket.launch(priority)

    def _finish(self) -> None:
        """The backward pass has ended: start what is left and wait for everything.

        Raises:
            HpcsyncError: another rank's backward pass failed, so there is no mean.
        """
        with torch.no_grad():
            for bucket in self._layout.buckets:
                if not bucket.launched:
                    self._fill_unused(bucket)
                    self._launch(bucket)
            recorder, start = self._collectives.recorder, now()
            device = self._collectives.device
            recorder.joined = device.current().record(timed=True) if device.queued else start
            self._join()
            self.stats = self._account(start)
            self.exchanged = self._layout.keepers
            flags = self._layout.flags
            failed = not self._alone and any(map(flags.failed_anywhere, self._layout.buckets))
            if failed:
                self._drop()
            elif not self._alone:
                self._hand_out()
        self._ended(start / 1e9)
        if failed:
            raise HpcsyncError(
                "the backward pass of another rank raised an exception and was given up there; "
                "the gradients of this step are not a mean over all ranks"
            )

    def abandon(self) -> None:
        """The last backward pass ended in an exception that somebody caught.

        Other ranks wait for what this one did not start. It starts that, marked as void, so that
        they can go on, or tell.
        """
        with torch.no_grad():
            for bucket in self._layout.buckets:
                if not bucket.launched:
                    unused = [False] * len(bucket.params)
                    self._layout.flags.launched(bucket, unused, failed=True)
                    bucket.launch(0)
            self._join()
        self._drop()
        self._ended(time.perf_counter())

    def _join(self) -> None:
        """Wait for all exchanges, which have been started."""
        if not self._alone:
            self._layout.flags.exchange()
        for bucket in self._layout.buckets:
            bucket.collective.wait()
            bucket.join()

    def _drop(self) -> None:
        """There is no mean: on no rank may a later pass add to what is left."""
        for param in self._layout.params:
            param.grad = None

    def _hand_out(self) -> None:
        """Give parameters their means that only other ranks had gradients of."""
        layout = self._layout
        for index, used in enumerate(self._used):
            bucket, slot = layout.place[index]
            if not used and layout.flags.used_anywhere(bucket, slot):
                layout.params[index].grad = bucket.views[slot]

    def _account(self, start: int) -> Comm:
        """What the exchange cost; the backward pass began to wait for it at ``start``."""
        recorder, device = self._collectives.recorder, self._collectives.device
        collectives = [bucket.collective for bucket in self._layout.buckets]
        driven_s = self._driven_ns / 1e9
        if device.queued:
            before, after = recorder.joined, device.current().record(timed=True)
            recorder.later.settle()  # of earlier steps, where no loop does
            recorder.later.add(EXPOSED, before, after)
            return DeviceComm(collectives, before, after, driven_s)
        ended = now()
        recorder.add(EXPOSED, start, ended)
        return step_comm(collectives, (ended - start) / 1e9, driven_s)

    def _fill_unused(self, bucket: Bucket) -> None:
        """Parameters without a gradient of this rank take part with zeros."""
        for slot, index in enumerate(bucket.plan.params):
            if self._came[index]:
                continue
            if bucket.params[slot].grad is None:
                bucket.zero(slot, self.transform)
                self._used[index] = False  # it was, in a no_sync whose gradients were dropped
            else:  # left from before, or set by the user: it counts
                bucket.adopt(slot, self.transform)
                self._used[index] = True


class _Hook:
    """Calls the pass for one parameter; a name, so that profiles show it."""

    __slots__ = ("_index", "_pass")

    def __init__(self, owner: BackwardPass, index: int) -> None:
        self._pass = owner
        self._index = index

    def __call__(self, param: Tensor) -> None:
        self._pass.on_gradient(self._index)
