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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..collectives import Collectives
from ..collectives.coding import Held
from ..collectives.kept import Keeper
from ..config import CommConfig
from ..errors import HpcsyncError, ModelError, UserError
from ..trace.recorder import DRIVEN, EXPOSED, FILL, now
from . import memory
from .auto import Auto
from .bucket import Bucket, Transform
from .compression import Compression
from .layout import BucketLayout
from .norms import total_norm
from .plan import BucketPlan
from .stats import StepComm, step_comm

_MIB = 1 << 20


class Reducer:
    """Gradient averaging for a list of parameters.

    Args:
        named: (name, parameter) pairs in the order of registration, the same on every rank.
        collectives: of this rank.
        config: the ``comm`` section.
        compression: how gradients are coded; not at all if not given.
        transform: makes what is exchanged in place of gradients.
        auto: choose codec, algorithm and bucket size from measurements.

    Attributes:
        layout: the parameters, and the buckets in force.
        stats: of the last exchange.

    Raises:
        ModelError: the ranks' parameters differ, or a parameter is not in host memory.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        collectives: Collectives,
        config: CommConfig,
        compression: Compression | None = None,
        transform: Transform | None = None,
        auto: bool = False,
    ) -> None:
        self._collectives = collectives
        self._compression = compression
        self.transform = transform
        self.layout = BucketLayout(collectives, config, compression)
        self._auto: Auto | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._sync = True
        self._callback = False
        self._exchanged = self.layout.keepers
        self.stats = StepComm()
        # Without a free core a thread beside the backward pass only takes time from it.
        self._drives = collectives.runtime.crowding * torch.get_num_threads() >= 1
        self._adopt_parameters(named)
        if compression is not None and auto:
            self._auto = Auto(compression, config, self.layout.described)

    @property
    def codec(self) -> str:
        """The codec of the next exchange."""
        warm = self._compression is not None and self._compression.warm
        return self._compression.config.codec if self._compression and warm else "none"

    @property
    def buckets(self) -> tuple[BucketPlan, ...]:
        """The plan in force."""
        return self.layout.plans

    @property
    def algorithm(self) -> str:
        """The algorithm of the buckets' allreduce."""
        names = {bucket.collective.algorithm for bucket in self.layout.buckets}
        return "+".join(sorted(names)) if names else "none"

    def plain_bytes(self) -> dict[str, int]:
        """Bytes that this rank would send to other nodes in a step without coding, by level."""
        found: dict[str, int] = {}
        for bucket in self.layout.buckets:
            for level, sent in bucket.collective.plain_bytes().items():
                found[level] = found.get(level, 0) + sent
        return found

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
        if self._callback:
            self._abandon()
        if self._auto is not None and self._sync:
            self._auto.begin_step()
        if self.layout.fits(named):
            self._settle()
        else:
            self._adopt_parameters(named)

    def close(self) -> None:
        """Take the hooks off the parameters and free the collectives; gradients stay local."""
        while self._hooks:
            self._hooks.pop().remove()
        for bucket in self.layout.buckets:
            bucket.collective.close()

    def norm(self) -> Tensor:
        """Global 2-norm of all gradients, a float32 scalar (float64 if any gradient is); the same
        on every rank.

        It is made of norms a parameter in the order of registration, so that it does not depend
        on the buckets.
        """
        grads = [param.grad for param in self.layout.params if param.grad is not None]
        return total_norm(grads)

    def finite(self) -> bool:
        """Whether no gradient holds NaN or Inf; the same on every rank."""
        return bool(torch.isfinite(self.norm()))

    def rescale(self, factor: float) -> None:
        """Gradients come ``factor`` times as large from now on: what codecs hold back follows."""
        memory.rescale(self.layout.buckets, factor)

    def state_dict(self) -> dict[str, Any]:
        """What later exchanges on this rank depend on: the order of the buckets, and what codecs
        hold back, by parameter (``held``), which belongs to this rank of this many. Collective.
        """
        settled = self.settled_state()  # first: stores are those of the layout that it leaves
        held = memory.state(self.layout.buckets, self.layout.described) if self._compression else {}
        return settled | {"held": held}

    def settled_state(self) -> dict[str, Any]:
        """``state_dict`` without ``held``; collective."""
        self._settle()  # the next step would, and the state is of the layout it begins with
        layout = self.layout
        return {
            "order": [layout.names[index] for index in layout.order] if layout.ordered else [],
            "compression": self._compression.state() if self._compression else None,
            "auto": self._auto.state_dict() if self._auto else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, to the same bits; collective.

        Raises:
            AgreedError: the state is of other parameters, ranks, nodes or settings.
        """
        problem: UserError | None = None
        if not self.restore(state):
            problem = UserError(
                "exchange state: it belongs to other ranks, nodes or settings of compress; "
                "resume with those of before"
            )
        self._collectives.runtime.agree(problem)

    def restore(self, state: Mapping[str, Any]) -> bool:
        """Go on from there; False, on all ranks, if ``held`` does not fit; collective.

        Raises:
            AgreedError: the state is of other parameters.
        """
        self.restore_settled(state, state["held"])
        index_of = self.layout.index_of()
        held = {index_of[name]: parts for name, parts in state["held"].items()}
        fits = memory.restore(held, self.layout.buckets)
        return bool(self._collectives.runtime.allreduce_scalar([fits], "min")[0])

    def restore_settled(self, state: Mapping[str, Any], names: Iterable[str] = ()) -> None:
        """Go on from a ``settled_state``, with nothing held back; collective.

        Args:
            names: of further parameters that must be there.

        Raises:
            AgreedError: the state is of other parameters.
        """
        problem: UserError | None = None
        if not {*state["order"], *names} <= set(self.layout.names):
            problem = UserError("exchange state: it belongs to a model of other parameters")
        self._collectives.runtime.agree(problem)
        if self._auto is not None:
            self._auto.load_state_dict(state["auto"])
            self.layout.config = self._auto.comm
        if self._compression is not None and state["compression"]:
            self._compression.load_state(state["compression"])
        self.layout.restore(state["order"])
        self._begin()

    @property
    def compression(self) -> Compression | None:
        """How gradients are coded."""
        return self._compression

    @property
    def on_trial(self) -> bool:
        """Whether another codec may yet be chosen; what this one holds back then dies with it."""
        return self._auto is not None and not self._auto.settled

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What is exchanged, by name."""
        return dict(zip(self.layout.names, self.layout.params, strict=True))

    @property
    def held(self) -> tuple[tuple[int, Held], ...]:
        """What codecs remember on this rank, each with its bucket's index."""
        return tuple(
            (bucket.plan.index, held)
            for bucket in self.layout.buckets
            for held in bucket.collective.held
        )

    @property
    def keepers(self) -> tuple[tuple[int, Keeper], ...]:
        """What this rank keeps of each step's means, each with its bucket's index, after ``keep``;
        the same tuple as long as the buckets are the same ones."""
        assert self._exchanged is self.layout.keepers, "the buckets changed since the exchange"
        return self._exchanged

    def keep(self) -> None:
        """Keep what a replay log needs, from the next exchange on."""
        self.layout.keep()

    def deal(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Take up what another job's codecs held back, in place of what is held now; collective.

        Args:
            states: ``held`` of some of that job's ranks: each of them on one rank of this one.
        """
        layout = self.layout
        sums = memory.Sums(layout.described)
        for held in states:
            sums.add(held)
        pending = sums.over(self._collectives.runtime)
        layout.build()
        self._begin()
        if self._compression is not None:
            topology = self._collectives.topology
            everybody = self._compression.config.where == "all"
            holders = self._collectives.runtime.size if everybody else topology.node_count
            memory.deal_mean(pending, layout.buckets, layout.described, holders)

    def _adopt_parameters(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        self.layout.adopt(named)
        self._begin()
        self._ready: list[int] = []
        while self._hooks:
            self._hooks.pop().remove()
        for index, param in enumerate(self.layout.params):
            hook = _Hook(self, index)
            handle = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            self._hooks.append(handle)

    def _settle(self) -> None:
        """Lay the buckets out as the next step has them."""
        if self.layout.settle():
            self._begin()

    def _begin(self) -> None:
        """Forget the last exchange."""
        self._used = [False] * len(self.layout.params)
        self._came = [False] * len(self.layout.params)
        self._callback = False
        self._driven_ns = 0  # that the computing thread spent on rounds of the exchange
        for bucket in self.layout.buckets:
            bucket.reset()

    def on_gradient(self, index: int) -> None:
        """A parameter's gradient is final for this backward pass."""
        bucket, slot = self.layout.place[index]
        if bucket.launched or (self._sync and self._came[index]):
            self._late(index)
        with torch.no_grad():
            bucket.adopt(slot, self.transform if self._sync else None)
        self._used[index] = True
        if not self._sync:
            return
        if not self._callback:
            self._callback = True
            self._collectives.recorder.count_step()
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        self._came[index] = True
        if not self.layout.ordered:
            self._ready.append(index)
        if bucket.pending == len(bucket.params):
            bucket.filling = now()
        bucket.pending -= 1
        if bucket.pending == 0 and self.layout.config.overlap:
            self._launch(bucket)
        if self._drives:
            start = now()
            if self._collectives.progress.drive():
                ended = now()
                self._collectives.recorder.add(DRIVEN, start, ended)
                self._driven_ns += ended - start

    def _late(self, index: int) -> None:
        raise ModelError(
            f"parameter {self.layout.names[index]} got a gradient twice in one backward pass, "
            "after its exchange could have begun; use checkpoint(..., use_reentrant=False), or "
            "wrap all backward passes but the last in no_sync()"
        )

    def _launch(self, bucket: Bucket) -> None:
        used = [self._used[index] for index in bucket.plan.params]
        if bucket.filling:
            recorder = self._collectives.recorder
            recorder.add(FILL, bucket.filling, now(), bucket.plan.nbytes, bucket.plan.index)
        # Later buckets hold the layers at the front, which the next step needs first.
        priority = -bucket.plan.index if self.layout.config.priority else 0
        bucket.launch(used, priority)

    def _finish(self) -> None:
        """The backward pass has ended: start what is left and wait for everything.

        Raises:
            HpcsyncError: another rank's backward pass failed, so there is no mean.
        """
        with torch.no_grad():
            for bucket in self.layout.buckets:
                if not bucket.launched:
                    self._fill_unused(bucket)
                    self._launch(bucket)
            recorder, start = self._collectives.recorder, now()
            recorder.joined = start
            for bucket in self.layout.buckets:
                bucket.collective.wait()
            ended = now()
            recorder.add(EXPOSED, start, ended)
            began, waited = start / 1e9, (ended - start) / 1e9
            self.stats = step_comm(
                [bucket.collective for bucket in self.layout.buckets], waited, self._driven_ns / 1e9
            )
            self._exchanged = self.layout.keepers
            failed = any(bucket.failed_anywhere() for bucket in self.layout.buckets)
            for index, used in enumerate(self._used):
                bucket, slot = self.layout.place[index]
                if not used and self._collectives.runtime.size > 1 and bucket.used_anywhere(slot):
                    self.layout.params[index].grad = bucket.views[slot]
        self._ended(began)
        if failed:
            raise HpcsyncError(
                "the backward pass of another rank raised an exception and was given up there; "
                "the gradients of this step are not a mean over all ranks"
            )

    def _ended(self, began: float) -> None:
        """An exchange is over, given up or not: all ranks count it, and agree on what follows."""
        if not self.layout.ordered:
            self.layout.follow(self._ready)
        if self._compression is not None and self._compression.stepped():
            self.layout.stale = True
        if self._auto is not None and self._auto.finish_step(
            self.layout.buckets, self.layout.order, self.stats, began
        ):
            self.layout.config = self._auto.comm
            self.layout.stale = True
        self._begin()

    def _abandon(self) -> None:
        """The last backward pass ended in an exception that somebody caught.

        Other ranks wait for what this one did not start. It starts that, marked as void, so that
        they can go on, or tell.
        """
        with torch.no_grad():
            for bucket in self.layout.buckets:
                if not bucket.launched:
                    bucket.launch([False] * len(bucket.params), 0, failed=True)
            for bucket in self.layout.buckets:
                bucket.collective.wait()
        for param in self.layout.params:
            param.grad = None
        self._ended(time.perf_counter())

    def _fill_unused(self, bucket: Bucket) -> None:
        """Parameters without a gradient of this rank take part with zeros."""
        for slot, index in enumerate(bucket.plan.params):
            if self._came[index]:
                continue
            if bucket.params[slot].grad is None:
                view = bucket.views[slot].zero_()
                if self.transform is not None and self.transform.active:
                    self.transform.apply(bucket.params[slot], view, view)
                self._used[index] = False  # it was, in a no_sync whose gradients were dropped
            else:  # left from before, or set by the user: it counts
                bucket.adopt(slot, self.transform)
                self._used[index] = True


class _Hook:
    """Calls the reducer for one parameter; a name, so that profiles show it."""

    __slots__ = ("_index", "_reducer")

    def __init__(self, reducer: Reducer, index: int) -> None:
        self._reducer = reducer
        self._index = index

    def __call__(self, param: Tensor) -> None:
        self._reducer.on_gradient(self._index)
