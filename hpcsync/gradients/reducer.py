"""The reducer: averages gradients over ranks while the backward pass still runs.

    prepare    before a forward pass: parameters that changed, buckets in the order that was seen
    backward   see ``backward``
    state      what later exchanges depend on, for checkpoints

A backward pass that failed on this rank, and whose exception was caught, is given up when the
reducer is next asked for something: until then other ranks wait in its exchange.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..collectives import Collectives
from ..collectives.coding import Held
from ..collectives.kept import Keeper
from ..config import CommConfig
from ..errors import UserError
from . import memory
from .auto import Auto
from .backward import BackwardPass
from .bucket import Transform
from .compression import Compression
from .layout import BucketLayout
from .norms import total_norm
from .plan import BucketPlan
from .stats import Comm

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

    Raises:
        ModelError: the ranks' parameters differ, or are not all on the device of the collectives.
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
        self._auto: Auto | None = None
        self.layout = BucketLayout(collectives, config, compression)
        self._pass = BackwardPass(self.layout, collectives, self._ended)
        self.transform = transform
        self._adopt_parameters(named)
        if compression is not None and auto:
            self._auto = Auto(compression, config, self.layout.described)

    @property
    def stats(self) -> Comm:
        """What the last exchange cost."""
        return self._pass.stats

    @property
    def transform(self) -> Transform | None:
        """What makes what is exchanged in place of gradients."""
        return self._pass.transform

    @transform.setter
    def transform(self, transform: Transform | None) -> None:
        self._pass.transform = transform

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
        return self._pass.sync

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of backward passes in this context stay local and add up."""
        before, self._pass.sync = self._pass.sync, False
        try:
            yield
        finally:
            self._pass.sync = before

    def prepare(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Before a forward pass: take over parameters that joined, left or were (un)frozen, and
        once, after the first exchange, put the buckets into the order seen there.
        """
        if self._pass.under_way and torch._C._current_graph_task_id() != -1:
            return  # it is computed again for the backward pass, which goes on
        self._recover()
        if self._auto is not None and self._pass.sync:
            self._auto.begin_step()
        if self.layout.fits(named):
            self._settle()
        else:
            self._adopt_parameters(named)

    def close(self) -> None:
        """Take the hooks off the parameters and free the collectives; gradients stay local."""
        if self._collectives.progress.works:
            self._recover()
        self.unhook()
        self.layout.close()

    def unhook(self) -> None:
        """Be told of no gradient any more, and be referred to by no parameter."""
        self._pass.unhook()

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
        self._recover()
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
        self._recover()
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
        self._pass.begin()

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
        kept = self._pass.exchanged
        assert kept is self.layout.keepers, "the buckets changed since the exchange"
        return kept

    def keep(self) -> None:
        """Keep what a replay log needs, from the next exchange on."""
        self.layout.keep()

    def deal(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Take up what another job's codecs held back, in place of what is held now; collective.

        Args:
            states: ``held`` of some of that job's ranks: each of them on one rank of this one.
        """
        self._recover()
        layout = self.layout
        sums = memory.Sums(layout.described)
        for held in states:
            sums.add(held)
        pending = sums.over(self._collectives.runtime)
        layout.build()
        self._pass.begin()
        if self._compression is not None:
            topology = self._collectives.topology
            everybody = self._compression.config.where == "all"
            holders = self._collectives.runtime.size if everybody else topology.node_count
            memory.deal_mean(pending, layout.buckets, layout.described, holders)

    def _adopt_parameters(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        self.layout.adopt(named)
        self._pass.begin()
        self._pass.hook()

    def _recover(self) -> None:
        """Give up a backward pass that ended in an exception; other ranks wait in its exchange."""
        if self._pass.under_way:
            self._pass.abandon()

    def _settle(self) -> None:
        """Lay the buckets out as the next step has them."""
        if self.layout.settle():
            self._pass.begin()

    def _ended(self, began: float) -> None:
        """An exchange is over, given up or not: all ranks count it, and agree on what follows."""
        layout = self.layout
        layout.flags.ended()
        if not layout.ordered:
            layout.follow(self._pass.ready)
        if self._compression is not None and self._compression.stepped():
            layout.stale = True
        if self._auto is not None and self._auto.finish_step(layout, self.stats, began):
            layout.config = self._auto.comm
            layout.stale = True
        self._pass.begin()
