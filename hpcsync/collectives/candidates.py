"""What auto may choose, and which of it is worth a trial: pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from ..config import RAIL_ALGORITHMS, CommConfig
from .costs import UNCODED, Choice, Layout, Load, Measured, Profile
from .predict import Prediction, predict

Loads = Callable[[float], Sequence[Load]]

# A trial costs steps with what may be slower, but predictions miss by some per cent.
_WORTH = 0.003
# A variant of a codec must be so much better than the deck's own to be tried beside it.
_VARIANT = 0.02
# What is predicted to be so much slower than the best will not turn out to be the best.
_HOPELESS = 0.10
_MOST = 3  # beside the uncoded one
_LEAST_BUCKET_MB = 0.25
_MIB = 1 << 20


def uncoded(comm: CommConfig) -> Choice:
    """The deck's own settings without a codec: what everything is compared with."""
    return Choice(UNCODED, comm.rail_algorithm, comm.bucket_mb)


def candidates(
    comm: CommConfig, allow: Sequence[str], measured: Measured, loads: Loads, layout: Layout
) -> list[Choice]:
    """All that may be chosen: the deck's settings uncoded, then the others."""
    own = uncoded(comm)
    codecs = [UNCODED]
    if layout.group(coded=True).ranks > 1:
        codecs += [name for name in dict.fromkeys(allow) if name in measured.codecs]
    found: dict[Choice, None] = {own: None}
    for codec in codecs:
        for bucket_mb in _bucket_sizes(comm, loads):
            for algorithm in _algorithms(comm, codec, measured, layout):
                found[Choice(codec, algorithm, bucket_mb)] = None
    return list(found)


def shortlist(
    own: Choice, predictions: Mapping[Choice, Prediction], step_s: float, measured: Measured
) -> list[Choice]:
    """The candidates worth a trial, simplest first; ``own`` is the first of them.

    A step with another choice is predicted to take what one with ``own`` was measured to take,
    and the difference of their predictions. Whatever is not predicted to be faster is left out.

    Args:
        step_s: measured with ``own``.
    """
    steps = predicted_steps(own, predictions, step_s)
    faster = [each for each in steps if each != own and steps[each] <= step_s * (1 - _WORTH)]
    tried: list[Choice] = []
    for codec in dict.fromkeys(each.codec for each in faster):
        variants = [each for each in faster if each.codec == codec]
        best = min(variants, key=lambda each: (steps[each], each))
        plain = Choice(codec, own.rail_algorithm, own.bucket_mb)
        if plain in variants:
            tried.append(plain)
        if best != plain and steps[best] <= steps.get(plain, step_s) * (1 - _VARIANT):
            tried.append(best)
    if tried:
        limit = min(steps[each] for each in tried) * (1 + _HOPELESS)
        tried = sorted((each for each in tried if steps[each] <= limit), key=steps.__getitem__)

    def simplicity(each: Choice) -> tuple[bool, float, bool]:
        coded = each.codec != UNCODED
        nbytes = measured.codecs[each.codec].nbytes if coded else 0.0
        plain = Choice(each.codec, own.rail_algorithm, own.bucket_mb)
        return coded, -nbytes, each != plain

    return [own, *sorted(tried[:_MOST], key=simplicity)]


def predicted_steps(
    own: Choice, predictions: Mapping[Choice, Prediction], step_s: float
) -> dict[Choice, float]:
    """Seconds of a step with each choice."""
    base = predictions[own].span_s
    return {each: step_s + found.span_s - base for each, found in predictions.items()}


def predict_all(
    choices: Sequence[Choice],
    measured: Measured,
    loads: Loads,
    profile: Profile,
    layout: Layout,
) -> dict[Choice, Prediction]:
    """A prediction for each choice."""
    planned = {size: loads(size) for size in dict.fromkeys(each.bucket_mb for each in choices)}
    return {
        each: predict(each, measured, planned[each.bucket_mb], profile, layout) for each in choices
    }


def _bucket_sizes(comm: CommConfig, loads: Loads) -> Iterator[float]:
    """The deck's, and some that really give other buckets."""
    own = loads(comm.bucket_mb)
    seen = {tuple(own)}
    yield comm.bucket_mb
    largest = max((load.nbytes for load in own), default=0) / _MIB
    size = min(comm.bucket_mb, largest)
    for other in (size / 2, size / 4, comm.bucket_mb * 4):
        if other < _LEAST_BUCKET_MB:
            continue
        planned = tuple(loads(other))
        if planned not in seen:
            seen.add(planned)
            yield other


def _algorithms(
    comm: CommConfig, codec: str, measured: Measured, layout: Layout
) -> tuple[str, ...]:
    """Names along the rail: the deck's, and the others if it leaves the choice and they differ."""
    own = comm.rail_algorithm
    free = own == "auto" and not comm.reproducible and not layout.flat and layout.nodes > 1
    if not free or (codec != UNCODED and not measured.codecs[codec].rounds):
        return (own,)
    others = [name for name in RAIL_ALGORITHMS if name not in (own, "native")]
    return (own, *others)
