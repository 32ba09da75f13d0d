"""Top-k and threshold: the kernels make the bits of the reference."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcsync.codecs.base import Floats, Moment, Settings
from hpcsync.codecs.rounding import random_at
from hpcsync.codecs.sparse import SparseCodec
from hpcsync.codecs.threshold import Threshold
from hpcsync.codecs.topk import TopK
from hpcsync.device import kernels
from hpcsync.device.kernels import empty_bytes
from tests.isas import ISAS, using
from tests.sparse import KINDS, LENGTHS, NATIVE, Make, normal, same


@pytest.fixture(params=ISAS)
def native(request: pytest.FixtureRequest) -> Iterator[kernels.Kernels]:
    """The kernels, with each instruction set that the processor has."""
    with using(request.param) as loaded:
        yield loaded


def compare(
    one: SparseCodec, other: SparseCodec, batches: list[Floats], divisor: int = 3, place: int = 1
) -> None:
    """Codes the same steps with both, as sender and as owner, and compares all bits."""
    count = batches[0].shape[0]
    pairs = [(codec, codec.store(count, "sender"), codec.store(count, "owner"))
             for codec in (one, other)]  # fmt: skip
    for step, values in enumerate(batches):
        results = []
        for codec, sender, owner in pairs:
            moment = Moment(step, 1000 + step, 5)
            out, mean = (empty_bytes(codec.capacity(count)) for _ in range(2))
            used = codec.encode(values, out, sender, moment)
            own = values[::-1].copy()
            final = codec.combine(own, place, [out[:used]] * 3, divisor, mean, owner, moment)
            stores = [each.read(name) for each in (sender, owner) if each for name in each.fields]
            results.append([out[:used], mean[:final], own, *stores])
        for left, right in zip(*results, strict=True):
            same(left, right)
            assert left.dtype == np.uint8 or np.isfinite(left).all() or left is results[0][2]


VARIANTS = [
    Settings(),
    Settings(error_feedback=False),
    Settings(momentum=0.9),
    Settings(ratio=0.3),
    Settings(ratio=0.001, ratio_warmup=2),
    Settings(ratio=1.0),
]


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_top_k_has_the_bits_of_its_reference(
    native: kernels.Kernels, make: Make, variant: int
) -> None:
    rng = np.random.default_rng(variant)
    chosen = VARIANTS[variant]
    for count in LENGTHS:
        batches = [make(rng, count) for _ in range(3)]
        compare(TopK(chosen, native), TopK(chosen), batches, place=variant % 4)


@pytest.mark.parametrize("make", KINDS)
def test_large_pieces_have_the_bits_of_the_reference(native: kernels.Kernels, make: Make) -> None:
    rng = np.random.default_rng(2)
    compare(TopK(Settings(), native), TopK(Settings()), [make(rng, 300_001) for _ in range(3)])


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize(("limit", "momentum"), [(1e-30, 0.5), (0.3, 0.0), (2.5, 0.5), (1e30, 0.0)])
def test_threshold_has_the_bits_of_its_reference(
    native: kernels.Kernels, make: Make, limit: float, momentum: float
) -> None:
    rng = np.random.default_rng(1)
    chosen = Settings(threshold=limit, momentum=momentum, error_feedback=limit < 1)
    for count in LENGTHS:
        batches = [make(rng, count) for _ in range(2)]
        compare(Threshold(chosen, native), Threshold(chosen), batches, divisor=4)


@pytest.mark.parametrize("sampled", [9.0, 0.0])
def test_a_sample_that_misleads_changes_nothing(native: kernels.Kernels, sampled: float) -> None:
    """Where the kernel looks first, all is large and the rest small, or the other way round."""
    count, seed, runs = 1 << 20, 1000, 1024
    stride = count // runs
    jitter = random_at(seed, np.arange(1, runs + 1)).astype(np.int64) * (stride - 7) >> 32
    places = (np.arange(runs) * stride + jitter)[:, None] + np.arange(8)
    values = normal(np.random.default_rng(14), count)
    values[places.ravel()] = sampled * values[places.ravel()] + sampled
    compare(TopK(Settings(), native), TopK(Settings()), [values])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), max_size=700),
    st.sampled_from([0.0, 0.9]),
    st.floats(0.001, 1.0),
    st.booleans(),
)
def test_any_values_have_the_bits_of_the_reference(
    listed: list[float], momentum: float, ratio: float, feedback: bool
) -> None:
    if NATIVE is None:
        pytest.skip("needs the native kernels (a C++ compiler when hpcsync is installed)")
    values = np.array(listed, np.float32)
    chosen = Settings(momentum=momentum, ratio=ratio, error_feedback=feedback, threshold=1e-3)
    for make in (TopK, Threshold):
        batches = [np.nan_to_num(values, posinf=3e38, neginf=-3e38) / 9, values, -values]
        stores = [make(chosen, each).store(values.shape[0], "sender") for each in (NATIVE, None)]
        for step, batch in enumerate(batches):
            coded = []
            for codec, store in zip((make(chosen, NATIVE), make(chosen)), stores, strict=True):
                out = empty_bytes(codec.capacity(batch.shape[0]))
                coded.append(out[: codec.encode(batch, out, store, Moment(step, step))])
            same(coded[0], coded[1])
            if stores[0] and stores[1]:
                for name in stores[0].fields:
                    same(stores[0].read(name), stores[1].read(name))
