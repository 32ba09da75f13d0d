"""What a run is bound by, in words, and the setting to try next."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..file import RunFacts
from .exchange import middle
from .findings import Finding
from .overlap import Hiding
from .tables import Tables

BOUND = 0.10  # share of the step from which communication or data bind it
_FAULTS = 0.05  # share of the step from which a fault is what the run is bound by


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict.

    Attributes:
        bound: ``communication``, ``compute``, ``data`` or ``straggler``.
        text: one line.
        advice: the setting to try next.
    """

    bound: str
    text: str
    advice: str


def data_bound(tables: Tables) -> list[Finding]:
    """A data loader that keeps all ranks waiting."""
    usual = middle(tables.columns["data"])
    whole = middle(tables.columns["whole"])
    share = float(usual.mean() / max(whole.mean(), 1.0))
    if share < BOUND:
        return []
    return [
        Finding(
            kind="data",
            lane="data",
            lost_ms=float(usual.mean()) / 1e6,
            text=f"data loader is slow: ranks wait {usual.mean() / 1e6:.1f} ms a step for their "
            f"batches, {share:.0%} of it",
            advice="data.name=tokens reads least; or put data.path on a faster file system",
        )
    ]


def judge(tables: Tables, hidden: Hiding, findings: Sequence[Finding], facts: RunFacts) -> Verdict:
    """What the run is bound by: the largest of what can be told apart."""
    step = tables.mean("whole")
    exposed, moving = tables.mean("exposed") / step, hidden.moving / step
    waited = 1 - moving / exposed if exposed else 0.0
    faults = [each for each in findings if each.fault and each.kind in ("straggler", "bucket")]
    lost = max(faults, key=lambda each: each.lost_ms, default=None)
    late = lost.lost_ms * 1e6 / step if lost is not None else 0.0
    slow_data = next((each for each in findings if each.kind == "data"), None)
    data = slow_data.lost_ms * 1e6 / step if slow_data is not None else 0.0
    if lost is not None and late >= _FAULTS and late >= max(moving, data):
        text = f"straggler: {lost.text.removeprefix('straggler: ')}"
        return Verdict("straggler", text, lost.advice)
    if slow_data is not None and data >= moving:
        return Verdict("data", f"data-bound: {slow_data.text}", slow_data.advice)
    if moving >= BOUND:
        link = next((each for each in findings if each.kind == "link"), None)
        text = f"communication-bound: {exposed:.0%} of a step is exposed communication"
        text += f" ({waited:.0%} of it waiting for late ranks)" if waited > 0.1 else ""
        text += f"; {_stage(tables)}" + (f"; {link.text}" if link else "")
        return Verdict("communication", text, _faster(tables, hidden, facts))
    compute = tables.mean("compute") / step
    text = f"compute-bound: {compute:.0%} of a step is forward and backward"
    if hidden.overlap > 0:
        text += f", and {hidden.overlap:.0%} of the communication is hidden behind them"
    uneven = exposed * waited + tables.mean("idle") / step
    if uneven >= BOUND / 2:
        text += f"; {uneven:.0%} is waiting for ranks that are late by turns"
    return Verdict("compute", text, _lighter(facts))


def _stage(tables: Tables) -> str:
    """Which part of the exchange takes longest."""
    comm = max(tables.mean("comm"), 1.0)
    coding = {name: tables.mean(name) / comm for name in ("encode", "combine", "decode")}
    wires = {name: tables.mean(name) / comm for name in ("wire.node", "wire.rail", "wire.world")}
    name = max(wires, key=lambda each: wires[each])
    text = f"{name} is busy in {wires[name]:.0%} of it"
    if sum(coding.values()) > 0.05:
        text += f", coding in {sum(coding.values()):.0%}"
    return text


def _faster(tables: Tables, hidden: Hiding, facts: RunFacts) -> str:
    """What would make communication shorter or hide more of it."""
    deck = settings(facts)
    comm, step = tables.mean("comm"), tables.mean("whole")
    coding = sum(tables.mean(name) for name in ("encode", "combine", "decode"))
    between = tables.mean("wire.rail") + tables.mean("wire.world")
    if _key(deck, "comm", "overlap") is False:
        return "try comm.overlap=true"
    if len(set(tables.node.tolist())) > 1 and facts.algorithm not in ("", "auto", "hierarchical"):
        return "try comm.algorithm=hierarchical, which sends less between nodes"
    if coding > 0.5 * comm:
        return "coding takes most of the time: try compress.codec=bf16 or none"
    sizes = np.nan_to_num(tables.nbytes[-1]) if tables.nbytes.size else np.zeros(1)
    if between >= tables.mean("wire.node") and facts.codec == "none":
        return "try compress.codec=auto, which measures whether coding pays (int8 sends a quarter)"
    if hidden.overlap < 0.5 and comm < 0.5 * step and sizes.shape[0] < 4:
        return "little is hidden, and buckets are few: try a smaller comm.bucket_mb"
    node = _key(deck, "comm", "transport", "node")
    if between < tables.mean("wire.node") and node == "mpi_host":
        return "try comm.transport.node=shared_memory"
    if between >= tables.mean("wire.node") and facts.codec in ("bf16", "fp16"):
        return "try compress.codec=int8, which sends half as much"
    return "try train.accumulate=2 with twice the train.global_batch: half as many exchanges"


def _lighter(facts: RunFacts) -> str:
    deck = settings(facts)
    if _key(deck, "train", "activation_checkpointing") is True:
        return "try train.activation_checkpointing=false if memory allows"
    if _key(deck, "train", "precision") == "fp32":
        return "try train.precision=bf16 where the processor has it, or train.compile=true"
    return "more ranks are what makes it faster; whatif tells how much"


def settings(facts: RunFacts) -> Mapping[str, Any]:
    """The run's deck as it stands in the trace; empty if it cannot be read."""
    try:
        return tomllib.loads(facts.config)
    except tomllib.TOMLDecodeError:
        return {}


def _key(deck: Mapping[str, Any], *path: str) -> Any:
    part: Any = deck
    for name in path:
        part = part.get(name) if isinstance(part, Mapping) else None
    return part
