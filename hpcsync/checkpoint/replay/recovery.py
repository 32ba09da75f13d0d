"""Replaying: which steps all ranks have, and doing them again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from torch import nn

from ...errors import CheckpointError
from ...gradients.reducer import Reducer
from ...runtime import Runtime
from .chain import Chain, Logged
from .gather import gather
from .means import Means
from .own import OwnState
from .records import Bytes, Record

_PARTS = ("none", "sizes", "moments")  # of a step, that all ranks need


class Repeats(Protocol):
    """What replaying asks of an ``Engine``."""

    model: nn.Module

    def repeat(self, numbers: Mapping[str, Any]) -> Any: ...


class Recovery:
    """One replay, on all ranks.

    Args:
        own: takes up the state that gradients do not tell.
    """

    def __init__(self, engine: Repeats, reducer: Reducer, runtime: Runtime, own: OwnState) -> None:
        self._engine, self._reducer, self._runtime, self._own = engine, reducer, runtime, own
        self._last: tuple[Mapping[str, Any], Bytes] | None = None
        self._layout: Record | None = None
        self._means: Means | None = None

    def plan(self, found: Chain, slots: Mapping[int, Record], step: int) -> tuple[int, str]:
        """The last step that all ranks can go on to, and a line for the user; collective.

        If it is not ``step``, the exchange and what codecs hold back are of that step now.
        """
        mine = [n for n, each in found.steps.items() if each.record.meta["own"] or n in slots]
        told = self._runtime.allgather_object((mine, max(found.steps, default=step), found.problem))
        problems = [f"rank {rank}: {why}" for rank, (_, _, why) in enumerate(told) if why]
        common = set.intersection(*(set(steps) for steps, _, _ in told))
        last = max(common, default=step)
        logged = min(end for _, end, _ in told)
        if last == step:
            if logged > step:
                problems.append(f"no step of {step + 1} to {logged} has all of its state")
            why = problems[0] if problems else f"nothing was logged after step {step}"
            return step, f"{why}; resuming from the checkpoint of step {step} alone"
        if not self._prepare(found.steps[last], slots.get(last)):
            return step, f"what codecs held back in step {last} does not fit; not used"
        ended = f" ({problems[0]})" if problems else ""
        return last, f"replayed steps {step + 1} to {last}{ended}"

    def _prepare(self, at: Logged, slot: Record | None) -> bool:
        """Put the exchange and its stores as they were after the last step; False if they do not
        fit, and then they are as they were before. Collective."""
        before = self._reducer.state_dict()
        meta = at.record.meta
        described: Mapping[str, Any] = meta["own"] or (slot.meta if slot else {})
        if meta["own"]:
            payload = at.record.read()
            data = payload[sum(map(sum, meta["sizes"])) :]
        else:
            assert slot is not None
            data = slot.read()
        self._reducer.restore_settled({**at.exchange, "compression": meta["counts"]})
        fits = self._own.fits(described)
        # A codec that was on trial only held things back for itself.
        lost = self._reducer.on_trial
        told = self._runtime.allreduce_scalar([fits or lost], "min")
        if not told[0]:
            self._reducer.restore(before)
            return False
        if fits:
            self._own.restore_stores(described, data)
        self._last = described, data
        return True

    def run(self, found: Chain, step: int, last: int, told: Callable[[Any], None] | None) -> None:
        """Do the steps after ``step`` again, up to ``last``; collective.

        Raises:
            AgreedError: a step cannot be decoded.
        """
        for number in range(step + 1, last + 1):
            result = self._repeat(found.steps[number])
            if told is not None:
                told(result)
        assert self._last is not None
        self._own.restore_rest(*self._last)

    def _repeat(self, logged: Logged) -> Any:
        record = logged.record
        if not record.meta["numbers"]["skipped"]:
            self._give(logged)
        return self._engine.repeat(record.meta["numbers"])

    def _give(self, logged: Logged) -> None:
        """Set the gradients of one step; collective."""
        meta = logged.record.meta
        problem: Exception | None = None
        payload: Bytes = np.empty(0, np.uint8)
        try:
            payload = logged.record.read()[: sum(map(sum, meta["sizes"]))]
        except OSError as error:
            problem = CheckpointError(f"{logged.record.path}: {error.strerror or error}")
        self._runtime.agree(problem)
        payloads = gather(self._runtime, payload)
        fresh = logged.layout is not self._layout
        steps = self._runtime.allgather_object((fresh, {key: meta[key] for key in _PARTS}))
        if any(each for each, _ in steps):
            told = self._runtime.allgather_object(logged.layout.meta)
            self._layout = logged.layout
        try:
            if self._means is None or any(each for each, _ in steps):
                self._means = Means(self._reducer, told)
            factor = float(meta["numbers"]["factor"])
            self._means.give([each for _, each in steps], payloads, factor)
        except (CheckpointError, LookupError, TypeError, ValueError) as error:
            problem = CheckpointError(
                f"replay log: step {logged.record.step} cannot be decoded: {error}; delete "
                f"{logged.record.path.parent} to resume from the checkpoint alone"
            )
        self._runtime.agree(problem)
