"""``compress.codec = "auto"``: the tuner, fed with a model's buckets and steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .. import codecs
from ..collectives import choice, saved_costs
from ..collectives.coding import settings_of
from ..collectives.costs import UNCODED, Layout, Load
from ..collectives.probe import probe
from ..collectives.saved_costs import Place, SavedCosts
from ..collectives.tuner import Tuner, bucket_leads
from ..config import CommConfig
from ..launch import mpi_library
from .compression import Compression, check, codable
from .layout import BucketLayout
from .plan import Parameter, plan_buckets
from .stats import Comm

_MIB = 1 << 20


class Auto:
    """Chooses codec, algorithm and bucket size of one model from what its steps take.

    Creating one measures the links and the codecs; collective over the job.

    Args:
        compression: of the model; uncoded until something better is found.
        comm: the deck's section.
        params: what is exchanged, in the order of registration.

    Attributes:
        comm: the section with what was chosen.
    """

    def __init__(
        self, compression: Compression, comm: CommConfig, params: Sequence[Parameter]
    ) -> None:
        self.comm = self._deck = comm
        self._compression = compression
        self._params: Sequence[Parameter] = list(params)
        self._order: Sequence[int] = range(len(params) - 1, -1, -1)
        self._began: float | None = None
        self._told = False
        self._tuner = self._make() if self._worth_it() else None

    def begin_step(self) -> None:
        """A forward pass begins; the first of a step counts."""
        if self._began is None:
            self._began = time.perf_counter()

    def finish_step(self, layout: BucketLayout, stats: Comm, end_s: float) -> bool:
        """A step's exchange is over, on all ranks; whether the choice changed.

        Args:
            layout: of the buckets, and of the parameters in them, which may have changed.
            end_s: when the backward pass ended, by ``time.perf_counter``.
        """
        began, self._began = self._began, None
        if self._tuner is None or began is None:
            return False
        self._params, self._order = layout.described, layout.order
        launches = [(each.collective.started_s, each.plan.nbytes) for each in layout.buckets]
        step_s = time.perf_counter() - began
        changed = self._tuner.observe(step_s, stats, bucket_leads(launches, end_s))
        if self._tuner.settled != self._told:
            self._told = self._tuner.settled
            self._tell()
        if changed:
            self._take()
        return changed

    @property
    def settled(self) -> bool:
        """Whether the choice has been made."""
        return self._tuner is None or self._tuner.settled

    def line(self) -> str:
        """What is chosen and why, in one line."""
        if self._tuner is None:
            return "auto: none: there is nothing to code between these ranks"
        return self._tuner.line()

    def state_dict(self) -> dict[str, Any]:
        """What was found, for a run that goes on."""
        return self._tuner.state_dict() if self._tuner else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a choice over; the buckets must be laid out anew."""
        if self._tuner is not None and state:
            self._tuner.load_state_dict(state)
            self._told = self._tuner.settled
            self._take()

    def _take(self) -> None:
        assert self._tuner is not None
        chosen = self._tuner.choice
        self._compression.use(chosen.codec)
        self.comm = replace(
            self._deck, rail_algorithm=chosen.rail_algorithm, bucket_mb=chosen.bucket_mb
        )

    def _tell(self) -> None:
        if self._compression.collectives.runtime.rank == 0 and self._told:
            print(f"hpcsync: {self.line()}", file=sys.stderr, flush=True)

    def _worth_it(self) -> bool:
        topology = self._compression.collectives.topology
        coded = any(codable(self._compression.config, each) for each in self._params)
        return coded and choice.codes(self._compression.config.where, topology)

    def _make(self) -> Tuner:
        compression = self._compression
        config, collectives = compression.config, compression.collectives
        topology = collectives.topology
        layout = Layout.of(topology, self._deck, config.where)
        settings = settings_of(config, compression.seed)
        shapes = [each.shape for each in self._params if codable(config, each)]
        allowed = {
            name: made
            for name in config.allow
            if name != UNCODED
            and not check(
                made := codecs.build(name, settings, device=collectives.device),
                config,
                self._params,
            )
        }
        measured = probe(
            collectives, allowed, layout, shapes, torch.get_num_threads(), self._saved_costs()
        )
        return Tuner(
            collectives.runtime,
            self._deck,
            tuple(allowed),
            measured,
            layout,
            self._loads,
            config.warmup,
        )

    def _saved_costs(self) -> SavedCosts | None:
        """What preflight saved, if it fits this job; collective. Rank 0 reads, and tells."""
        runtime = self._compression.collectives.runtime
        found: SavedCosts | None = None
        if runtime.rank == 0:
            job = Place.here(runtime.topology, mpi_library()[0])
            found, why = saved_costs.find(self._deck.costs, job)
            if found is not None:
                why = f"auto: link as of {self._deck.costs}, {found.describe()}"
            if why:
                print(f"hpcsync: {why}", file=sys.stderr, flush=True)
        kept: SavedCosts | None = runtime.bcast(found)
        return kept

    def _loads(self, bucket_mb: float) -> list[Load]:
        """The buckets that ``bucket_mb`` would give, first ready first."""
        config = self._compression.config
        params = [replace(each, coded=codable(config, each)) for each in self._params]
        first = min(bucket_mb, self._deck.first_bucket_mb)
        plans = plan_buckets(params, self._order, int(bucket_mb * _MIB), int(first * _MIB))
        return [
            Load(plan.coded_numel, plan.nbytes - plan.coded_numel * plan.itemsize, plan.itemsize)
            for plan in plans
        ]
