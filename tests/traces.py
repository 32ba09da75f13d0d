"""Traces made by hand: a schedule that is known, with faults planted, written as a run writes it.

    make(folder, ranks=8, nodes=4, slow_forward={5: 40.0})   ->  folder, with trace/node0.h5, ...

A step: all ranks begin together; batch, forward, backward; a bucket is filled in a share of the
backward pass, its exchange begins once all ranks have launched it and the one before is done, and
ends on all ranks within microseconds; whoever came early waits. Times are made for all steps and
ranks at once, so that 10 million events take seconds. ``schedule`` gives the true times alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpcsync.trace import recorder
from hpcsync.trace.events import BINS, CLOCK, EVENT, LANES, MEMORY, Events, bins_of
from hpcsync.trace.file import FOLDER
from hpcsync.trace.writer import Head, NodeFile

Times = NDArray[np.float64]  # ns of rank 0's clock

MS = 1e6
US = 1e3
MIB = 1 << 20
RATE = 1.2e8  # bytes/s of a link that is not slow
BEGIN = 5_000 * MS  # of the first step: room for clocks that are behind


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What happens. Times in ms; faults add to them from ``fault_from`` on, the n-th written step.

    Attributes:
        segments: of a bucket.
        rail_ms: of a bucket's exchange between nodes, for each MiB.
        slow_forward, slow_backward, slow_data: ms more, by rank.
        slow_link: by node: so many times as long takes what passes its link; every node's exchange
            waits for it, and only the measured rates tell whose link it is.
        ready: share of the backward pass at which each bucket is ready; even if not given.
        held: by (rank, bucket): ms by which the bucket is launched late.
        hooked: by (rank, bucket): ms by which the backward pass stands still before the bucket is
            ready.
        clock_off: seconds by which a rank's clock is ahead; in its clock rows unless in ``unsaid``.
        drift_ppm: of the clocks, by rank; in the clock rows.
        uncertainty_us: of the clock rows, which are wrong by less.
        changes: keys of the deck's text.
    """

    ranks: int = 4
    nodes: int = 2
    steps: int = 12
    every: int = 1
    buckets: int = 4
    segments: int = 2
    bucket_mib: float = 4.0
    codec: str = "none"
    data_ms: float = 1.0
    forward_ms: float = 30.0
    backward_ms: float = 60.0
    optimizer_ms: float = 5.0
    rail_ms: float = 1.0
    node_ms: float = 0.5
    noise: float = 0.01
    seed: int = 0
    slow_forward: Mapping[int, float] = field(default_factory=dict)
    slow_backward: Mapping[int, float] = field(default_factory=dict)
    slow_data: Mapping[int, float] = field(default_factory=dict)
    slow_link: Mapping[int, float] = field(default_factory=dict)
    ready: tuple[float, ...] = ()
    held: Mapping[tuple[int, int], float] = field(default_factory=dict)
    hooked: Mapping[tuple[int, int], float] = field(default_factory=dict)
    fault_from: int = 0
    clock_off: Mapping[int, float] = field(default_factory=dict)
    unsaid: tuple[int, ...] = ()
    drift_ppm: Mapping[int, float] = field(default_factory=dict)
    uncertainty_us: float = 50.0
    run_id: str = "20260101-000000-traces"
    config: str = ""
    links: str = ""
    complete: bool = True

    @property
    def per_node(self) -> int:
        return self.ranks // self.nodes

    def node(self, rank: int) -> int:
        return rank // self.per_node


@dataclass(frozen=True)
class Schedule:
    """True times in ns, (steps, ranks) or (steps, ranks, buckets); ``done`` is the same on all
    ranks but for microseconds, ``transfer`` (steps, buckets) is without any waiting."""

    begin: Times
    data: Times
    forward: Times
    backward: Times
    filling: Times
    launched: Times
    first: Times
    begun: Times
    done: Times
    exposed: Times
    optimizer: Times
    end: Times
    transfer: Times


def schedule(plan: Plan) -> Schedule:
    """When everything ends (or, by its name, begins), in true time."""
    rng = np.random.default_rng(plan.seed)
    steps, ranks, buckets = plan.steps, plan.ranks, plan.buckets

    def lasting(base: float, more: Mapping[int, float]) -> Times:
        long = base * MS * (1 + plan.noise * rng.standard_normal((steps, ranks)).clip(-3, 3))
        for rank, extra in more.items():
            long[plan.fault_from :, rank] += extra * MS
        return long

    data = lasting(plan.data_ms, plan.slow_data)
    forward = data + lasting(plan.forward_ms, plan.slow_forward)
    backward = forward + lasting(plan.backward_ms, plan.slow_backward)
    long = (backward - forward)[:, :, None]
    ready = np.array(plan.ready or np.arange(1, buckets + 1) / buckets)
    filling = forward[:, :, None] + long * np.concatenate([[0.0], ready[:-1]])
    launched = forward[:, :, None] + long * ready
    for (rank, bucket), late in plan.hooked.items():
        launched[plan.fault_from :, rank, bucket:] += late * MS
        backward[plan.fault_from :, rank] += late * MS
    for (rank, bucket), late in plan.held.items():
        launched[plan.fault_from :, rank, bucket] += late * MS
    factor = max(plan.slow_link.values(), default=1.0)
    rail = np.full((steps, buckets), plan.bucket_mib * plan.rail_ms * MS)
    rail *= 1 + plan.noise * rng.standard_normal(rail.shape).clip(-3, 3)
    rail[plan.fault_from :] *= factor
    transfer = rail + 2 * plan.node_ms * MS
    first, begun, done = np.empty_like(launched), np.empty((steps, buckets)), launched * 0.0
    over = np.zeros(steps)
    for k in range(buckets):
        first[:, :, k] = launched[:, :, k] + 20 * US
        if k > 1:  # two are on the way at once
            first[:, :, k] = np.maximum(first[:, :, k], done[:, :, k - 2])
        begun[:, k] = np.maximum(first[:, :, k].max(axis=1), over)
        over = begun[:, k] + transfer[:, k]
        done[:, :, k] = over[:, None] + rng.uniform(0, 5 * US, (steps, ranks))
    exposed = np.maximum(backward, done.max(axis=2)) if ranks > 1 else backward
    optimizer = exposed + lasting(plan.optimizer_ms, {})
    end = np.broadcast_to(optimizer.max(axis=1, keepdims=True) + 100 * US, (steps, ranks))
    lengths = (end[:, 0] + 200 * US) * plan.every
    begin = BEGIN + np.concatenate([[0.0], np.cumsum(lengths)[:-1]])
    at, at3 = begin[:, None], begin[:, None, None]
    return Schedule(
        begin=np.broadcast_to(at, (steps, ranks)),
        data=data + at,
        forward=forward + at,
        backward=backward + at,
        filling=filling + at3,
        launched=launched + at3,
        first=first + at3,
        begun=begun + at,
        done=done + at3,
        exposed=exposed + at,
        optimizer=optimizer + at,
        end=end + at,
        transfer=transfer,
    )


class _Table:
    """Columns of a rank's events, a block of (steps,) for each span of a step."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.spans: list[Events] = []

    def add(
        self,
        span: recorder.Span,
        start: Times,
        end: Times,
        *,
        nbytes: float = 0,
        bucket: int = -1,
        number: int = 0,
        parent: int = 1,
    ) -> None:
        """Numbers count from 1 in each step; 1 is the step's own."""
        block = np.zeros(self.plan.steps, EVENT)
        block["start"], block["end"] = np.rint(start), np.rint(np.maximum(start, end))
        block["id"], block["parent"] = number or len(self.spans) + 1000, parent
        block["name"], block["lane"] = span
        block["bytes"], block["bucket"] = int(nbytes), bucket
        block["step"] = np.arange(self.plan.steps) * self.plan.every + self.plan.every
        block["thread"] = bucket >= 0
        self.spans.append(block)

    def events(self) -> Events:
        """In the order of their ends, with numbers that are unique."""
        table = np.empty((self.plan.steps, len(self.spans)), EVENT)
        for column, span in enumerate(self.spans):
            table[:, column] = span
        lift = (np.arange(self.plan.steps) * 10_000)[:, None]
        table["id"] += lift
        table["parent"] += np.where(table["parent"], lift, 0)
        order = np.argsort(table["end"], axis=1, kind="stable")
        return np.take_along_axis(table, order, axis=1).ravel()


def _events(plan: Plan, true: Schedule, rank: int) -> Events:
    """A rank's events, in true time."""
    table = _Table(plan)
    times = [getattr(true, name)[:, rank] for name in ("begin", "data", "forward", "backward")]
    begin, data, forward, backward = times
    exposed, optimizer, end = (
        getattr(true, name)[:, rank] for name in ("exposed", "optimizer", "end")
    )
    table.add(recorder.STEP, begin, end, number=1, parent=0)
    table.add(recorder.DATA, begin, data)
    table.add(recorder.FORWARD, data, forward)
    table.add(recorder.BACKWARD, forward, backward)
    if plan.ranks > 1:
        table.add(recorder.EXPOSED, backward, exposed)
        table.add(recorder.AGREEMENT, optimizer, end)
        for bucket in range(plan.buckets):
            _bucket(table, true, rank, bucket)
    table.add(recorder.OPTIMIZER, exposed, optimizer)
    return table.events()


def _bucket(table: _Table, true: Schedule, rank: int, bucket: int) -> None:
    plan, number = table.plan, 2 + bucket
    nbytes = plan.bucket_mib * MIB
    at = (slice(None), rank, bucket)
    launched, first, done = true.launched[at], true.first[at], true.done[at]
    table.add(recorder.FILL, true.filling[at], launched, nbytes=nbytes, bucket=bucket)
    table.add(recorder.QUEUED, launched, first, bucket=bucket, parent=number)
    table.add(recorder.BUCKET, launched, done, nbytes=nbytes, bucket=bucket, number=number)
    mates = slice(plan.node(rank) * plan.per_node, (plan.node(rank) + 1) * plan.per_node)
    together = true.first[:, mates, bucket].max(axis=1)  # the node's ranks
    begun = true.begun[:, bucket]
    piece = (done - begun) / plan.segments
    local = np.minimum(plan.node_ms * MS, 0.4 * piece)
    share = nbytes / plan.segments
    sent = share / plan.per_node * 2 * (plan.nodes - 1) / plan.nodes
    sent *= 0.25 if plan.codec == "int8" else 1.0
    for index in range(plan.segments):
        stop = begun + piece * (index + 1)
        node = recorder.WIRE["node"]
        # Segments go through their stages one behind the other.
        early = np.minimum(together + local, begun + piece * index + local)
        early = np.maximum(early, together + local * 0.5)
        table.add(node, first + index * US, early, bucket=bucket, parent=number)
        if plan.nodes > 1:
            _rail(table, rank, bucket, early, stop - local, sent, true)
        table.add(
            node, stop - local if plan.nodes > 1 else early, stop, bucket=bucket, parent=number
        )


def _rail(
    table: _Table,
    rank: int,
    bucket: int,
    start: Times,
    stop: Times,
    sent: float,
    true: Schedule,
) -> None:
    plan = table.plan
    if plan.codec != "none":
        coding = 0.1 * (stop - true.begun[:, bucket]) / plan.segments
        for span, at in (
            (recorder.ENCODE, start),
            (recorder.COMBINE, (start + stop) / 2),
            (recorder.DECODE, stop - coding),
        ):
            table.add(span, at, at + coding, nbytes=sent / 2, bucket=bucket)
    spot = recorder.WIRE["rail"]
    table.add(spot, start, stop, nbytes=sent, bucket=bucket, parent=2 + bucket)


def make(folder: Path, plan: Plan | None = None, **changes: object) -> Path:
    """Write the trace of a plan, or of the default one with changes; the run's folder."""
    plan = plan or Plan(**changes)  # type: ignore[arg-type]
    assert plan.ranks % plan.nodes == 0
    true = schedule(plan)
    for node in range(plan.nodes):
        ranks = range(node * plan.per_node, (node + 1) * plan.per_node)
        attributes = {
            rank: {"host": f"node{node}", "local_rank": rank - ranks[0], "pid": 1000 + rank}
            for rank in ranks
        }
        file = NodeFile(folder / FOLDER, _head(plan, node), attributes)
        for rank in ranks:
            _write(file, plan, true, rank)
        file.flush(complete=plan.complete)
        file.discard()
    return folder


def _head(plan: Plan, node: int) -> Head:
    every = [list(range(at, at + plan.per_node)) for at in range(0, plan.ranks, plan.per_node)]
    elements = int(plan.bucket_mib * MIB) // 4
    bucket = {"bytes": elements * 4, "elements": elements}
    bucket["coded"] = elements if plan.codec != "none" else 0
    return Head(
        run_id=plan.run_id,
        node=node,
        nodes=plan.nodes,
        ranks=plan.ranks,
        every=plan.every,
        ring=4096,
        hpcsync="0.0",
        event_cost_ns=900.0,
        run={
            "config": plan.config or f'[compress]\ncodec = "{plan.codec}"\n',
            "topology": json.dumps(every),
            "codec": plan.codec,
            "algorithm": "hierarchical" if plan.nodes > 1 else "direct",
            "buckets": json.dumps([{"index": k, **bucket} for k in range(plan.buckets)]),
            "links": plan.links or _links(plan),
        },
    )


def _links(plan: Plan) -> str:
    """Rates as they are measured at the beginning and at the end."""
    if plan.nodes < 3:
        return "{}"
    found = [
        {
            "step": step,
            "nodes": {
                str(node): RATE / (1.0 if step < plan.fault_from else plan.slow_link.get(node, 1.0))
                for node in range(plan.nodes)
            },
        }
        for step in (0, plan.steps * plan.every)
    ]
    return json.dumps({"rates": found})


def _write(file: NodeFile, plan: Plan, true: Schedule, rank: int) -> None:
    rng = np.random.default_rng((plan.seed, rank))
    events = _events(plan, true, rank)
    ahead, drift = plan.clock_off.get(rank, 0.0) * 1e9, plan.drift_ppm.get(rank, 0.0) * 1e-6
    durations = events["end"] - events["start"]
    histogram = np.zeros((len(LANES), BINS), np.uint64)
    np.add.at(histogram, (events["lane"], bins_of(durations)), 1)
    for name in ("start", "end"):
        events[name] += np.rint(ahead + drift * (events[name] - BEGIN)).astype(np.int64)
    last = float(true.end[-1, 0])
    at = np.linspace(BEGIN - 100 * MS, last + 100 * MS, 5)
    clock = np.zeros(5, CLOCK)
    off = ahead + drift * (at - BEGIN)
    said = drift * (at - BEGIN) if rank in plan.unsaid else off
    clock["local"] = np.rint(at + off)
    if rank:
        error = rng.uniform(-0.5, 0.5, 5) * plan.uncertainty_us * US
        clock["offset"] = np.rint(error - said)
        clock["uncertainty"] = round(plan.uncertainty_us * US)
    memory = np.zeros(plan.steps, MEMORY)
    memory["step"] = np.arange(1, plan.steps + 1) * plan.every
    memory["resident"], memory["peak"] = (300 + rank) * MIB, (350 + rank) * MIB
    file.add(rank, events)
    file.add_clock(rank, clock)
    file.add_memory(rank, memory)
    file.count(rank, histogram, 0)
