"""The choice of codec, algorithm and bucket size for ``compress.codec = "auto"``.

    first steps   the deck's own settings, uncoded: how long a step takes, what of it is exposed,
                  when gradients become complete
    prediction    of every candidate, with the link fitted to those steps; what is not predicted
                  to be faster is never tried
    race          the few best take turns with the uncoded one; measured steps decide
    steady        the winner stays; if steps become 20% slower or faster, all begins anew

Decisions are made from numbers that were agreed over the ranks, so all ranks decide alike at the
same step. Between decisions nothing is exchanged but a few numbers a window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Protocol

from ..config import CommConfig
from .candidates import Loads, candidates, predict_all, predicted_steps, shortlist, uncoded
from .costs import UNCODED, Choice, Layout, Measured, Profile
from .predict import Prediction, fit_link
from .trials import Race

_SETTLING = 2  # first steps, which warm caches up and lay buckets out anew
_WATCH = 20  # steps between looks at the steady step
_DRIFT = 0.2
_PATIENCE = 200  # fewest steps between two races; doubles with each that changes nothing
_BACKWARD = 0.65  # share of computing that the backward pass is taken for, if nobody tells


class Agreement(Protocol):
    """What the tuner asks of ``Runtime``."""

    def allreduce_scalar(self, values: Sequence[float], op: str = "sum") -> list[float]: ...


class Exchanged(Protocol):
    """What the tuner asks of a step's ``StepComm``."""

    @property
    def exposed_comm_ms(self) -> float: ...


class Tuner:
    """Chooses, watches the steps, and chooses better.

    Args:
        runtime: the job.
        comm: the deck's section.
        allow: codecs that may be chosen, besides none.
        measured: what ``probe`` found.
        layout: who exchanges with whom.
        loads: the buckets that a ``comm.bucket_mb`` gives, first ready first.
        warmup: first steps, which must go uncoded.
    """

    def __init__(
        self,
        runtime: Agreement,
        comm: CommConfig,
        allow: Sequence[str],
        measured: Measured,
        layout: Layout,
        loads: Loads,
        warmup: int = 0,
    ) -> None:
        self._runtime, self._comm, self._allow = runtime, comm, tuple(allow)
        self._probed = self._measured = measured
        self._layout, self._loads = layout, loads
        self._own = uncoded(comm)
        self._choice = self._own
        self._warmup = warmup
        self._step = self._since = self._skip = self._length = self._drifted = 0
        self._reference_s: float | None = None
        self._patience = _PATIENCE
        self._race: Race | None = None
        self._predicted: dict[Choice, float] = {}
        self._predictions: dict[Choice, Prediction] = {}
        self._exposed: dict[Choice, list[float]] = {}
        self._begin()

    @property
    def choice(self) -> Choice:
        """What to use from the next step on."""
        return self._choice

    @property
    def settled(self) -> bool:
        """Whether the choice stays, unless the job's steps change."""
        return self._phase == "steady"

    def observe(
        self, step_s: float, comm: Exchanged, leads: Sequence[tuple[float, float]] = ()
    ) -> bool:
        """Tell of a step; on every rank, after the exchange of the same step.

        Args:
            step_s: from the beginning of the first forward pass to the end of the exchange.
            leads: for each bucket, in order: the share of the gradients' bytes that is complete
                with it, and how many seconds before the end of the backward pass that was.

        Returns:
            Whether ``choice`` is another than before.
        """
        self._step += 1
        if self._skip:
            self._skip -= 1
            return False
        self._steps.append(step_s)
        self._waits.append(comm.exposed_comm_ms * 1e-3)
        before = self._choice
        if self._phase == "first":
            if len(self._steps) >= self._window() and self._step >= self._warmup:
                self._predict(leads)
        elif self._phase == "race":
            if len(self._steps) >= self._length:
                self._judge()
        elif len(self._steps) >= _WATCH:
            self._watch()
        if self._choice == before:
            return False
        self._skip = 1
        return True

    def line(self) -> str:
        """What was chosen and why, in one line."""
        link = self._probed.link
        rate = f"{1e-6 / link.wire_s:.0f} MB/s" if link.wire_s else "no limit"
        found = f"link {rate}, {link.latency_s * 1e6:.0f} us"
        found += f" by {self._probed.source}" if self._probed.source else ""
        return f"auto: {_name(self._choice)}: {self._why}; {found}"

    def state_dict(self) -> dict[str, Any]:
        """The choice, if it has been made: a resumed run need not look for it again."""
        return {
            "settled": self.settled,
            "choice": [self._choice.codec, self._choice.rail_algorithm, self._choice.bucket_mb],
            "own": [self._own.codec, self._own.rail_algorithm, self._own.bucket_mb],
            "ranks": [self._layout.nodes, self._layout.local],
            "why": self._why,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a choice over, unless the deck or the ranks have changed."""
        here = self.state_dict()
        codec, algorithm, bucket_mb = state["choice"]
        known = codec == UNCODED or (codec in self._allow and codec in self._measured.codecs)
        same = list(state["own"]) == here["own"] and list(state["ranks"]) == here["ranks"]
        if state["settled"] and known and same:
            self._settle(Choice(codec, algorithm, float(bucket_mb)), str(state["why"]))
            self._warmup = 0

    def _begin(self) -> None:
        self._phase = "first"
        self._choice = self._own
        self._skip = _SETTLING
        self._length = 0
        self._reference_s = None
        self._drifted = 0
        self._exposed = {}
        self._why = "steps are being measured"
        self._collect()

    def _collect(self) -> None:
        self._steps: list[float] = []
        self._waits: list[float] = []

    def _window(self) -> int:
        """Steps of a window, the same on all ranks: more of short steps, which vary more."""
        if not self._length and len(self._steps) >= 3:
            step_s = self._runtime.allreduce_scalar([median(self._steps)], "max")[0]
            self._length = 5 if step_s < 0.1 else 4 if step_s < 0.5 else 3
        return self._length or 3

    def _take_window(self) -> list[float]:
        """The window's steps as of the slowest rank; notes what was exposed on all ranks alike.

        A rank that waits for a slower one waits longer than the exchange takes: the least counts.
        """
        steps = self._steps[-self._length :]
        *steps, exposed = self._runtime.allreduce_scalar(
            [*steps, -median(self._waits[-self._length :])], "max"
        )
        self._exposed.setdefault(self._choice, []).append(-exposed)
        self._collect()
        return steps

    def _predict(self, leads: Sequence[tuple[float, float]]) -> None:
        """The first window is over."""
        steps = self._take_window()
        step_s, exposed_s = median(steps), self._exposed[self._choice][-1]
        profile = self._profile(step_s, exposed_s, leads)
        loads = self._loads(self._own.bucket_mb)
        self._measured = self._probed
        choices = candidates(self._comm, self._allow, self._probed, self._loads, self._layout)
        if len(choices) > 1:
            self._measured = fit_link(
                self._own, self._probed, loads, profile, self._layout, exposed_s
            )
        self._predictions = predict_all(choices, self._measured, self._loads, profile, self._layout)
        self._predicted = predicted_steps(self._own, self._predictions, step_s)
        contenders = shortlist(self._own, self._predictions, step_s, self._measured)
        if len(contenders) == 1:
            self._settle(self._own, self._nothing_better(step_s))
            return
        self._phase = "race"
        self._race = Race(contenders)
        self._race.add(steps)
        self._choice = self._race.current
        self._why = f"on trial against {', '.join(_name(each) for each in contenders)}"

    def _profile(
        self, step_s: float, exposed_s: float, leads: Sequence[tuple[float, float]]
    ) -> Profile:
        computing = max(step_s - exposed_s, 0.0)
        backward_s = _BACKWARD * computing
        if not leads:
            return Profile(backward_s)
        flat = self._runtime.allreduce_scalar([number for lead in leads for number in lead], "max")
        agreed = tuple(zip(flat[::2], flat[1::2], strict=True))
        return Profile(max(backward_s, *(lead for _, lead in agreed)), agreed)

    def _judge(self) -> None:
        """A window of the race is over."""
        assert self._race is not None
        self._race.add(self._take_window())
        self._choice = self._race.current
        if self._race.over:
            self._settle(self._choice, self._measured_why(self._race))

    def _settle(self, chosen: Choice, why: str) -> None:
        self._phase = "steady"
        self._choice = chosen
        self._why = why
        self._race = None
        self._since = self._step
        self._skip = 0
        self._collect()

    def _watch(self) -> None:
        """Begin anew if the steady step has changed for good."""
        step_s = self._runtime.allreduce_scalar([median(self._steps)], "max")[0]
        self._collect()
        if self._reference_s is None:
            self._reference_s = step_s
            return
        drifted = abs(step_s / self._reference_s - 1) > _DRIFT
        self._drifted = self._drifted + 1 if drifted else 0
        if self._drifted >= 2 and self._step - self._since >= self._patience:
            self._patience *= 2
            self._begin()

    def _nothing_better(self, step_s: float) -> str:
        others = [each for each in self._predicted if each.codec != UNCODED]
        if not others:
            return "nothing that may be coded goes between nodes"
        best = min(others, key=self._predicted.__getitem__)
        return (
            f"a step takes {step_s * 1e3:.0f} ms, {self._exposed_ms(self._own):.0f} of them "
            f"exposed exchange; {_name(best)} is predicted at {self._predicted[best] * 1e3:.0f}"
        )

    def _measured_why(self, race: Race) -> str:
        raced = [each for each in self._exposed if each != self._choice]
        others = [
            f"{_name(each)} {race.median_s(each) * 1e3:.0f} ({self._exposed_ms(each):.0f})"
            for each in sorted(raced, key=race.median_s)
        ]
        return (
            f"{race.median_s(self._choice) * 1e3:.0f} ms a step measured, "
            f"{self._exposed_ms(self._choice):.0f} of them exposed exchange; {', '.join(others)}"
        )

    def _exposed_ms(self, each: Choice) -> float:
        return median(self._exposed[each]) * 1e3


def _name(choice: Choice) -> str:
    return f"{choice.codec}/{choice.rail_algorithm}/{choice.bucket_mb:.3g} MiB"


def bucket_leads(
    launches: Sequence[tuple[float, int]], end_s: float
) -> tuple[tuple[float, float], ...]:
    """For ``Tuner.observe``.

    Args:
        launches: for each bucket, in order of the plan: when its exchange was started, and its
            bytes.
        end_s: end of the backward pass, by the same clock.
    """
    whole = sum(nbytes for _, nbytes in launches)
    leads: list[tuple[float, float]] = []
    complete = 0
    for started_s, nbytes in launches:
        complete += nbytes
        leads.append((complete / max(whole, 1), max(end_s - started_s, 0.0)))
    return tuple(leads)
