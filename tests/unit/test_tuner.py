"""The choice of codec, algorithm and bucket size, on simulated clusters whose steps are noisy."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest

from hpcsync.collectives.candidates import candidates, predict_all
from hpcsync.collectives.costs import Choice, CodecCost, Layout, LinkCost, Load, Measured, Profile
from hpcsync.collectives.predict import Prediction, predict
from hpcsync.collectives.trials import Race
from hpcsync.collectives.tuner import Tuner, bucket_leads
from hpcsync.config import CommConfig

MIB = 1 << 20
A, B, C = (Choice(name, "auto", 25.0) for name in ("none", "bf16", "int8"))


@dataclass(frozen=True)
class Comm:
    """A step's exchange."""

    exposed_comm_ms: float


class Alone:
    """A job of one rank: what it says is agreed."""

    def __init__(self) -> None:
        self.calls = 0

    def allreduce_scalar(self, values: Sequence[float], op: str = "sum") -> list[float]:
        self.calls += 1
        return list(values)


class Together:
    """A job of several ranks, each a thread."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=20)
        self.given: dict[int, list[float]] = {}

    def rank(self, rank: int) -> TogetherRank:
        return TogetherRank(self, rank)


class TogetherRank:
    def __init__(self, job: Together, rank: int) -> None:
        self.job, self.rank = job, rank

    def allreduce_scalar(self, values: Sequence[float], op: str = "sum") -> list[float]:
        job = self.job
        job.barrier.wait()
        job.given[self.rank] = list(values)
        job.barrier.wait()
        assert len({len(each) for each in job.given.values()}) == 1
        reduce = {"sum": sum, "max": max, "min": min}[op]
        found = [float(reduce(each)) for each in zip(*job.given.values(), strict=True)]
        job.barrier.wait()
        return found


@dataclass
class Cluster:
    """A machine that behaves as the model of predictions says, but with other numbers than the
    probe found, and with noise."""

    probed: Measured
    true: Measured
    profile: Profile
    rest_s: float
    layout: Layout
    mib: float
    allow: tuple[str, ...]
    comm: CommConfig
    noise: float
    rng: random.Random
    # By choice: what was found, and the machine and profile that it was found for.
    known: dict[Choice, tuple[Measured, Profile, Prediction]] = field(
        init=False, default_factory=dict
    )

    def loads(self, bucket_mb: float) -> list[Load]:
        size = min(bucket_mb, max(self.mib / 8, 1.0))
        count = max(1, round(self.mib / size))
        return [Load(int(self.mib * MIB / 4 / count), 2048) for _ in range(count)]

    def tuner(self, runtime: object = None, warmup: int = 0) -> Tuner:
        return Tuner(
            runtime or Alone(),  # type: ignore[arg-type]
            self.comm,
            self.allow,
            self.probed,
            self.layout,
            self.loads,
            warmup,
        )

    def found(self, choice: Choice) -> Prediction:
        """Without noise, and the same at every step until the machine changes."""
        true, profile, found = self.known.get(choice, (None, None, None))
        if found is None or true is not self.true or profile is not self.profile:
            loads = self.loads(choice.bucket_mb)
            found = predict(choice, self.true, loads, self.profile, self.layout)
            self.known[choice] = (self.true, self.profile, found)
        return found

    def step_s(self, choice: Choice) -> float:
        """Without noise."""
        return self.rest_s + self.found(choice).span_s

    def noisy_step_s(self, choice: Choice) -> float:
        late = 3.0 if self.rng.random() < 0.02 else 1.0
        return self.step_s(choice) * math.exp(self.rng.gauss(0, self.noise)) * late

    def leads(self, choice: Choice) -> tuple[tuple[float, float], ...]:
        launches, complete = [], 0
        loads = self.loads(choice.bucket_mb)
        whole = sum(load.nbytes for load in loads)
        for load in loads:
            complete += load.nbytes
            launches.append((self.profile.ready_s(complete / whole), load.nbytes))
        return bucket_leads(launches, self.profile.backward_s)

    def run(self, tuner: Tuner, most: int = 400) -> int:
        """Steps until the choice is settled."""
        for step in range(1, most + 1):
            choice = tuner.choice
            exposed = self.found(choice).exposed_s * self.rng.uniform(0.95, 1.15)
            tuner.observe(self.noisy_step_s(choice), Comm(exposed * 1e3), self.leads(choice))
            if tuner.settled:
                return step
        raise AssertionError(f"not settled after {most} steps: {tuner.line()}")

    def all(self) -> dict[Choice, float]:
        """The true step of everything that may be chosen."""
        found = candidates(self.comm, self.allow, self.true, self.loads, self.layout)
        made = predict_all(found, self.true, self.loads, self.profile, self.layout)
        return {each: self.rest_s + made[each].span_s for each in found}


def codecs(rng: random.Random, speed: float) -> dict[str, CodecCost]:
    def cost(nbytes: float, weight: float, rounds: int = 0) -> CodecCost:
        encode, decode = 1e-9 * weight * speed, 5e-10 * weight * speed
        larger = 1.0 if rounds else min(4 / nbytes, 4)
        return CodecCost(
            nbytes, encode, decode, decode * 1.2, encode + decode, rounds, larger * MIB
        )

    return {
        "bf16": cost(2.0, rng.uniform(0.5, 2)),
        "int8": cost(1.02, rng.uniform(1, 3)),
        "int4": cost(0.57, rng.uniform(2, 6)),
        "int8_shared": cost(2.2, rng.uniform(1, 4), rounds=2),
    }


def cluster(seed: int, noise: float = 0.03) -> Cluster:
    """A random one: links of 50 Mbit/s to 20 Gbit/s, 0.5 to 200 MiB of gradients."""
    rng = random.Random(seed)
    rate = math.exp(rng.uniform(math.log(6e6), math.log(2.5e9)))
    costs = codecs(rng, math.exp(rng.uniform(0, 1.5)))
    link = LinkCost(rng.uniform(2e-5, 2e-4), 1 / rate, rng.uniform(1e-10, 5e-10), 4e-5)
    probed = Measured(link, costs, 4e-10, rng.choice([0.0, 0.3, 1.0, 2.0]), rng.uniform(1, 2))
    wrong = {
        name: replace(
            each,
            encode_s=each.encode_s * rng.uniform(0.7, 1.5),
            decode_s=each.decode_s * rng.uniform(0.7, 1.5),
            combine_s=each.combine_s * rng.uniform(0.7, 1.5),
        )
        for name, each in costs.items()
    }
    true = replace(
        probed,
        link=replace(link.scaled(rng.uniform(0.7, 1.8)), cpu_s=link.cpu_s * rng.uniform(0.7, 1.5)),
        codecs=wrong,
    )
    backward_s = math.exp(rng.uniform(math.log(5e-3), math.log(1.0)))
    nodes, local = rng.choice([(2, 1), (2, 2), (4, 1), (8, 4)])
    return Cluster(
        probed=probed,
        true=true,
        profile=Profile(backward_s),
        rest_s=backward_s * rng.uniform(0.4, 1.0),
        layout=Layout(nodes, local, local),
        mib=math.exp(rng.uniform(math.log(0.5), math.log(200))),
        allow=rng.choice([("none", "bf16"), ("none", "bf16", "int8"), tuple(costs)]),
        comm=CommConfig(bucket_mb=rng.choice([25.0, 25.0, 4.0])),
        noise=noise,
        rng=rng,
    )


SETUPS = 80


@pytest.fixture(scope="module")
def outcomes() -> list[tuple[float, float, int]]:
    """For each of many clusters: the choice's step over the best one's, over the uncoded one's,
    and the steps that the choice took."""
    found = []
    for seed in range(SETUPS):
        here = cluster(seed)
        tuner = here.tuner()
        steps = here.run(tuner)
        chosen, every = here.step_s(tuner.choice), here.all()
        own = next(iter(every))
        found.append((chosen / min(every.values()), chosen / every[own], steps))
    return found


def test_the_choice_is_hardly_ever_slower_than_the_best(
    outcomes: list[tuple[float, float, int]],
) -> None:
    within = sum(over_best <= 1.03 for over_best, _, _ in outcomes)
    assert within >= 0.95 * SETUPS, sorted(over for over, _, _ in outcomes)[-10:]


def test_the_choice_is_never_slower_than_uncoded(
    outcomes: list[tuple[float, float, int]],
) -> None:
    assert max(over_own for _, over_own, _ in outcomes) <= 1.03


def test_choosing_takes_some_tens_of_steps(outcomes: list[tuple[float, float, int]]) -> None:
    steps = sorted(each for _, _, each in outcomes)
    assert steps[len(steps) // 2] <= 60
    assert steps[-1] <= 140


def clear(rate: float = 6e6) -> Cluster:
    """One where coding pays beyond doubt, or not, by the link's bytes a second."""
    here = cluster(0, noise=0.01)
    measured = Measured(LinkCost(6e-5, 1 / rate, 1e-11, 1e-5), codecs(random.Random(1), 1), 4e-10)
    return replace(
        here,
        probed=measured,
        true=measured,
        profile=Profile(0.05),
        rest_s=0.03,
        layout=Layout(2),
        mib=25.0,
        allow=("none", "bf16"),
        comm=CommConfig(),
    )


def test_a_slow_link_is_coded_for_and_the_line_says_why() -> None:
    here = clear()
    tuner = here.tuner()
    assert tuner.choice == A
    steps = here.run(tuner)
    assert tuner.choice.codec == "bf16"
    assert steps < 30, "what is clear is decided soon"
    line = tuner.line()
    assert "\n" not in line
    for text in ("bf16", "none", "6 MB/s", "60 us", "measured", "ms"):
        assert text in line


def test_a_fast_link_is_not_and_nothing_slower_is_ever_run() -> None:
    here = clear(rate=5e10)
    tuner = here.tuner()
    seen = set()
    for _ in range(60):
        seen.add(tuner.choice)
        step_s = here.noisy_step_s(tuner.choice)
        tuner.observe(step_s, Comm(here.found(tuner.choice).exposed_s * 1e3))
    assert {each.codec for each in seen} == {"none"}
    assert tuner.settled
    assert "predicted" in tuner.line()


def test_what_is_not_allowed_is_never_run() -> None:
    here = replace(clear(), allow=("none",))
    tuner = here.tuner()
    for _ in range(60):
        assert tuner.choice.codec == "none"
        tuner.observe(here.noisy_step_s(tuner.choice), Comm(1.0))


def test_the_first_steps_go_uncoded() -> None:
    here = clear()
    tuner = here.tuner(warmup=25)
    for step in range(1, 60):
        if step <= 25:
            assert tuner.choice == A, step
        exposed = here.found(tuner.choice).exposed_s
        tuner.observe(here.noisy_step_s(tuner.choice), Comm(exposed * 1e3))
    assert tuner.choice.codec == "bf16"


def test_a_prediction_that_misses_is_corrected_by_the_steps() -> None:
    here = clear(rate=1e8)
    slow = {name: replace(each, encode_s=2e-7) for name, each in here.probed.codecs.items()}
    here = replace(here, true=replace(here.true, codecs=slow))
    tuner = here.tuner()
    tried = set()
    for _ in range(60):
        tried.add(tuner.choice.codec)
        exposed = here.found(tuner.choice).exposed_s
        tuner.observe(here.noisy_step_s(tuner.choice), Comm(exposed * 1e3))
    assert tried == {"none", "bf16"}
    assert tuner.settled
    assert tuner.choice.codec == "none"


def test_the_step_after_a_change_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    windows: list[Sequence[float]] = []
    add = Race.add

    def spy(self: Race, samples: Sequence[float]) -> None:
        windows.append(samples)
        add(self, samples)

    monkeypatch.setattr(Race, "add", spy)
    here = clear()
    tuner = here.tuner()
    changed = True
    while not tuner.settled:
        step_s = here.step_s(tuner.choice) * (50 if changed else 1)
        exposed = here.found(tuner.choice).exposed_s
        changed = tuner.observe(step_s, Comm(exposed * 1e3))
    assert len(windows) > 1
    assert all(max(window) < 2 * min(window) for window in windows)
    assert tuner.choice.codec == "bf16"


def test_all_ranks_choose_alike_at_the_same_steps() -> None:
    ranks = 3
    job = Together(ranks)
    history: list[list[tuple[Choice, bool]]] = [[] for _ in range(ranks)]
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        here = replace(clear(rate=3e7), rng=random.Random(rank), noise=0.05)
        tuner = here.tuner(job.rank(rank))
        try:
            for _ in range(120):
                exposed = here.found(tuner.choice).exposed_s * (1 + rank)
                leads = here.leads(tuner.choice)
                changed = tuner.observe(here.noisy_step_s(tuner.choice), Comm(exposed * 1e3), leads)
                history[rank].append((tuner.choice, changed))
        except BaseException as error:
            failures.append(error)
            job.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert history[0] == history[1] == history[2]
    assert any(changed for _, changed in history[0])


def test_a_link_that_becomes_slow_is_noticed() -> None:
    here = clear(rate=5e10)
    tuner = here.tuner()

    def steps(here: Cluster, count: int) -> None:
        for _ in range(count):
            exposed = here.found(tuner.choice).exposed_s
            tuner.observe(here.noisy_step_s(tuner.choice), Comm(exposed * 1e3))

    steps(here, 250)
    assert tuner.choice.codec == "none"
    slow = replace(here, true=replace(here.true, link=replace(here.true.link, wire_s=1 / 6e6)))
    steps(slow, 150)
    assert tuner.settled
    assert tuner.choice.codec == "bf16"


def test_steady_steps_are_not_disturbed_by_noise() -> None:
    here = replace(clear(), noise=0.06)
    runtime = Alone()
    tuner = here.tuner(runtime)
    here.run(tuner)
    choice, calls = tuner.choice, runtime.calls
    for _ in range(1000):
        assert not tuner.observe(here.noisy_step_s(choice), Comm(1.0))
    assert runtime.calls - calls <= 50, "a few numbers every twenty steps"


def test_a_settled_choice_is_taken_over_by_the_run_that_goes_on() -> None:
    here = clear()
    tuner = here.tuner()
    here.run(tuner)
    state = tuner.state_dict()
    other = here.tuner(warmup=20)
    other.load_state_dict(state)
    assert other.settled
    assert other.choice == tuner.choice
    assert "measured" in other.line()
    for changed in (
        replace(here, layout=Layout(4)),
        replace(here, comm=CommConfig(bucket_mb=3)),
        replace(here, allow=("none",)),
    ):
        other = changed.tuner()
        other.load_state_dict(state)
        assert not other.settled
        assert other.choice.codec == "none"


def test_a_choice_on_trial_is_not_taken_over() -> None:
    here = clear()
    tuner = here.tuner()
    while tuner.choice == A:
        exposed = here.found(tuner.choice).exposed_s
        tuner.observe(here.step_s(tuner.choice), Comm(exposed * 1e3))
    other = here.tuner()
    other.load_state_dict(tuner.state_dict())
    assert other.choice == A
    assert not other.settled


def race(steps: Callable[[Choice, int], float], noise: float, seed: int) -> Race:
    rng = random.Random(seed)
    found = Race([A, B, C])
    at = 0
    while not found.over:
        samples = []
        for _ in range(4):
            at += 1
            samples.append(steps(found.current, at) * math.exp(rng.gauss(0, noise)))
        found.add(samples)
    return found


def test_a_race_finds_the_fastest() -> None:
    true = {A: 1.0, B: 0.95, C: 0.9}
    for seed in range(40):
        assert race(lambda each, at: true[each], 0.02, seed).winner == C


def test_equal_contenders_leave_the_simplest() -> None:
    winners = [race(lambda each, at: 1.0, 0.02, seed).winner for seed in range(100)]
    assert winners.count(A) >= 85


def test_a_steady_drift_favours_nobody() -> None:
    for rise in (0.004, -0.002):
        for seed in range(20):
            drifting = race(lambda each, at, rise=rise: 1.0 + rise * at, 0.01, seed)
            assert drifting.winner == A


def test_what_is_far_slower_is_run_once_only() -> None:
    count = {A: 0, B: 0, C: 0}

    def steps(each: Choice, at: int) -> float:
        count[each] += 1
        return {A: 1.0, B: 0.99, C: 2.0}[each]

    assert race(steps, 0.01, 0).winner == A
    assert count[C] == 4
    assert count[B] > 4


def test_leads_are_shares_of_bytes_and_seconds_before_the_end() -> None:
    assert bucket_leads([(1.0, 30), (1.5, 10)], 2.0) == ((0.75, 1.0), (1.0, 0.5))
    assert bucket_leads([(2.5, 10)], 2.0) == ((1.0, 0.0),)
    assert bucket_leads([], 2.0) == ()
