"""RUN/trace: timing traces; the collector of each node's first rank writes them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from .. import __version__
from ..collectives import Collectives
from ..config import TraceConfig
from ..trace.analysis.links import SLOW
from ..trace.clock import Clocks
from ..trace.collector import Collector, Source, event_cost_ns
from ..trace.links import Links
from ..trace.recorder import Ring, room
from ..trace.writer import Head, NodeFile
from ..transports.base import Buffer, private_buffer
from ..transports.shared_memory import SharedMemoryError
from .base import Observer, RunInfo, StepRecord

_PARTS = 1_000_000  # file numbers of a rank that writes for itself
_CLOCKS_EVERY = 500  # steps; and after the first ones, at doubling distances
_LINKS_SHARE = 0.001  # of the time that measuring links may take while steps run
_LOOKS = 3
_MOST_RATES = 8  # measurements of links that are kept


class Traces(Observer):
    """Every rank has one: what it does at the events is collective.

    Args:
        collectives: whose recorder is kept.
        config: the ``trace`` section of the deck.
        describe: texts for the files as they are now, see ``trace.writer.Head``.
        run_id: of the run.
    """

    def __init__(
        self,
        collectives: Collectives,
        config: TraceConfig,
        describe: Callable[[], Mapping[str, str]],
        run_id: str,
    ) -> None:
        self._collectives, self._config, self._run_id = collectives, config, run_id
        self._describe, self._told = describe, describe()
        self._runtime = collectives.runtime
        self._collector: Collector | None = None
        self._clocks: Clocks | None = None
        self._links: Links | None = None
        self._step = 0
        self._rates: list[dict[str, Any]] = []
        self._pause_until = 0.0  # no measurement of links before that
        self._buffer = self._ring()
        collectives.recorder.move(self._buffer.own)

    def started(self, info: RunInfo) -> None:
        if not self._config.enabled:
            return
        runtime, node = self._runtime, self._runtime.topology.node(self._runtime.rank)
        shared = self._buffer.shared
        pids = runtime.allgather_object(os.getpid())
        # Without shared memory each rank can only see itself, and writes a file of its own.
        mine = node if shared and runtime.rank == node[0] else () if shared else (runtime.rank,)
        self._clocks, self._links = Clocks(runtime), Links(runtime)
        if mine:
            head = Head(
                run_id=self._run_id,
                node=runtime.topology.node_of(runtime.rank),
                nodes=info.nodes,
                ranks=runtime.size,
                every=self._config.every,
                ring=self._config.ring,
                hpcsync=__version__,
                event_cost_ns=event_cost_ns(),
                run=self._told,
            )
            about = {
                rank: {"host": info.host, "local_rank": node.index(rank), "pid": pids[rank]}
                for rank in mine
            }
            first = 0 if shared else node.index(runtime.rank) * _PARTS
            sources = {}
            for rank in mine:
                memory = self._buffer.peer(node.index(rank)) if shared else self._buffer.own
                sources[rank] = Source(Ring(memory), pids[rank])
            try:
                file = NodeFile(info.folder / "trace", head, about, first)
                self._collector = Collector(file, sources, self._config.every)
                self._collector.start()
            except Exception as error:  # a trace is not worth the run
                self._warn(f"{type(error).__name__}: {error}".partition("\n")[0])
        self._measure(0)
        self._compare()

    def stepped(self, record: StepRecord) -> None:
        if self._collector is not None and self._collector.problem:
            self._warn(self._collector.problem)
            self._collector = None
        step = record.step
        if self._clocks is None:
            return
        if step % _CLOCKS_EVERY == 0 and self._due():
            self._measure(step)
        if step % _CLOCKS_EVERY == 0 or step & (step - 1) == 0:
            self._compare()
        self._step = step

    def ended(self, status: str, detail: str) -> None:
        if status == "done" and self._clocks is not None and self._links is not None:
            self._measure(self._step)
            self._compare()
            self._clocks.close()
            self._links.close()
        if self._collector is not None:
            self._collector.stop(complete=status == "done")
            if self._collector.problem:
                self._warn(self._collector.problem)

    def _warn(self, problem: str) -> None:
        where = f"node {self._runtime.topology.node_of(self._runtime.rank)}"
        text = f"hpcsync: warning: no more traces of {where} are written: {problem}"
        print(text, file=sys.stderr, flush=True)

    def _due(self) -> bool:
        """Whether links may be measured again; collective."""
        return bool(self._runtime.bcast(time.monotonic() > self._pause_until))

    def _measure(self, step: int) -> None:
        """Measure the nodes' links; collective."""
        assert self._links is not None
        nodes = self._runtime.topology.nodes
        if len(nodes) < 2:
            return
        began = time.monotonic()
        rates = [0.0] * len(nodes)
        # A link that seems slow is measured again: it may have been a busy moment.
        for _ in range(_LOOKS):
            found = self._runtime.allgather_object(self._links.measure())
            rates = [max(best, found[ranks[0]]) for best, ranks in zip(rates, nodes, strict=True)]
            if min(rates) >= SLOW * sorted(rates)[len(rates) // 2]:
                break
        ended = time.monotonic()
        self._pause_until = ended + (ended - began) / _LINKS_SHARE
        told = {str(node): rate for node, rate in enumerate(rates)}
        self._rates = [*self._rates, {"step": step, "nodes": told}][-_MOST_RATES:]

    def _compare(self) -> None:
        """Compare clocks; collective."""
        assert self._clocks is not None
        rows = self._runtime.allgather_object(self._clocks.compare())
        self._collectives.recorder.offset = int(rows[self._runtime.rank]["offset"][0])
        if self._collector is not None:
            for rank in self._collector.ranks:
                self._collector.add_clock(rank, rows[rank])
            # Buckets are laid out anew after the first steps, and when coding begins.
            if (now := self._texts()) != self._told:
                self._told = now
                self._collector.describe(now)

    def _texts(self) -> dict[str, str]:
        texts = dict(self._describe())
        if self._rates:
            texts["links"] = json.dumps({**json.loads(texts["links"]), "rates": self._rates})
        return texts

    def _ring(self) -> Buffer:
        """Memory for the ring, which the node's first rank sees if it can; collective."""
        nbytes = room(self._config.ring)
        shared = self._collectives.shared
        node = self._runtime.topology.node(self._runtime.rank)
        if shared is None or len(node) == 1:
            return private_buffer(nbytes)
        try:
            return shared.allocate(nbytes, 1)
        except SharedMemoryError:
            return private_buffer(nbytes)
