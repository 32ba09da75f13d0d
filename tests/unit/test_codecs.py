"""What every codec promises: kernel and NumPy alike bit for bit, NaN and Inf, errors fed back.

All codecs go through one exchange, simulated in this process: ``Exchange`` holds the ranks' stores,
and each ``step`` gives what travelled and what each rank got. A new codec is one line of CASES.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hpcsync import codecs
from hpcsync.codecs import Matrix, Moment, PieceCodec, Settings, Store, SumCodec
from hpcsync.codecs.base import OWNER, SENDER, Floats
from hpcsync.device import kernels
from tests.isas import ISAS, using


class Case(NamedTuple):
    """What to expect of a codec.

    Attributes:
        error: most that one exchange of normal numbers loses, as a share of their norm, without
            error feedback.
        drift: the same of the sum over 60 steps, with it.
        unbiased: whether it can round at random so that the mean of many codings is the input.
    """

    error: float
    drift: float
    unbiased: bool = False


CASES = {
    "none": Case(error=1e-7, drift=1e-7),
    "bf16": Case(error=4e-3, drift=1e-4, unbiased=True),
    "fp16": Case(error=5e-4, drift=1e-5, unbiased=True),
    "fp8": Case(error=0.04, drift=1e-3, unbiased=True),
    "int8": Case(error=0.01, drift=3e-4, unbiased=True),
    "int4": Case(error=0.2, drift=0.005, unbiased=True),
    "onebit": Case(error=0.9, drift=0.15),
    "topk": Case(error=0.9, drift=0.1),
    "threshold": Case(error=0.9, drift=0.02),
    "randomk": Case(error=3.5, drift=0.3),
    "powersgd": Case(error=1.0, drift=0.25),
    "int8_shared": Case(error=0.04, drift=1e-3, unbiased=True),
}

# Those whose coded forms are added: arrays with a type, not bytes.
SUMMED = ("randomk", "powersgd", "int8_shared")

# Enough is sent of short pieces.
SETTINGS = Settings(ratio=0.1, threshold=1.0, rank=2)
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-38, 1e-36, 3.4028235e38, -1e38]

every_codec = pytest.mark.parametrize("name", CASES)
every_unbiased = pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.unbiased])


def build(name: str, *, native: bool = False, **changed: Any) -> PieceCodec | SumCodec:
    chosen = Settings(**{**{f: getattr(SETTINGS, f) for f in SETTINGS.__slots__}, **changed})
    made = codecs.build(name, chosen, native=native)
    assert isinstance(made, PieceCodec | SumCodec)
    return made


def shapes(count: int) -> list[Matrix]:
    """A square matrix, and a vector of what is left of the piece."""
    side = math.isqrt(count)
    return [Matrix(0, (side, side)), Matrix(side * side, (count - side * side,))]


class Outcome(NamedTuple):
    """Of one exchange: coded forms, in order, and the ranks' results.

    After a two-pass exchange all ranks decode the same bytes: there it is one result.
    """

    coded: list[NDArray[Any]]
    results: list[Floats]


class Exchange:
    """Exchanges of one piece between ranks, by one codec."""

    def __init__(self, codec: PieceCodec | SumCodec, count: int, ranks: int) -> None:
        self.codec, self.count, self.ranks = codec, count, ranks
        self.matrices = shapes(count)
        self.owner = ranks // 2
        self.stores: list[Store | None]
        if isinstance(codec, SumCodec):
            self.stores = [codec.store(count, self.matrices) for _ in range(ranks)]
        else:
            roles = [OWNER if rank == self.owner else SENDER for rank in range(ranks)]
            self.stores = [codec.store(count, role) for role in roles]

    def step(self, pieces: Sequence[Floats], step: int = 0, divisor: int = 0) -> Outcome:
        """The mean (or the sum by ``divisor``) of the ranks' pieces."""
        moments = [
            Moment(step=step, seed=1000 * step + rank + 1, shared_seed=77 * step)
            for rank in range(self.ranks)
        ]
        with np.errstate(all="ignore"):
            if isinstance(self.codec, SumCodec):
                return self._summed(self.codec, pieces, moments, divisor or self.ranks)
            return self._two_pass(self.codec, pieces, moments, divisor or self.ranks)

    def _two_pass(
        self,
        codec: PieceCodec,
        pieces: Sequence[Floats],
        moments: Sequence[Moment],
        divisor: int,
    ) -> Outcome:
        coded: list[NDArray[Any]] = []
        for rank, piece in enumerate(pieces):
            if rank != self.owner:
                before = piece.copy()
                coded.append(self._encoded(codec, piece, self.stores[rank], moments[rank]))
                same_bits(piece, before)
        own, out = pieces[self.owner].copy(), fresh(codec.capacity(self.count))
        store, moment = self.stores[self.owner], moments[self.owner]
        used = codec.combine(own, self.owner, coded, divisor, out, store, moment)
        decoded = np.full(self.count, 5.0, np.float32)
        codec.decode(out[:used], decoded)
        same_bits(own, decoded)
        return Outcome([*coded, out[:used]], [own])

    def _encoded(
        self, codec: PieceCodec, piece: Floats, store: Store | None, moment: Moment
    ) -> NDArray[Any]:
        most = codec.capacity(self.count)
        room = fresh(most + 16)
        used = codec.encode(piece, room[:most], store, moment)
        assert used == most if codec.fixed else used <= most
        assert (room[most:] == 0xAA).all()
        return room[:used]

    def _summed(
        self, codec: SumCodec, pieces: Sequence[Floats], moments: Sequence[Moment], divisor: int
    ) -> Outcome:
        forms = codec.forms(self.count, self.matrices, self.ranks)
        values = [piece.copy() for piece in pieces]
        arrays = [[np.full(form.count, 99, form.dtype) for form in forms] for _ in pieces]
        running = [
            codec.rounds(*each, self.matrices, self.ranks, divisor, store, moment)
            for *each, store, moment in zip(values, arrays, self.stores, moments, strict=True)
        ]
        coded: list[NDArray[Any]] = []
        for index, form in enumerate(forms):
            assert {next(each) for each in running} == {index}
            parts = [mine[index] for mine in arrays]
            coded += [each.copy() for each in parts]
            add = np.maximum if form.op == "max" else np.add
            total = functools.reduce(add, parts)
            for each in parts:
                each[:] = total
        assert {next(each, None) for each in running} == {None}
        return Outcome(coded, values)


def fresh(count: int) -> NDArray[np.uint8]:
    """Bytes of a pattern, so that those that are not written show."""
    return np.full(count, 0xAA, np.uint8)


def bits(array: NDArray[Any]) -> NDArray[Any]:
    """The bits, those of every NaN made alike."""
    if array.dtype != np.float32:
        return array
    return np.where(np.isnan(array), np.uint32(0x7FC00000), array.view(np.uint32))


def same_bits(one: NDArray[Any], other: NDArray[Any]) -> None:
    np.testing.assert_array_equal(bits(one), bits(other), strict=True)


def same(one: Exchange, other: Exchange, pieces: Sequence[Floats], step: int, divisor: int) -> None:
    """One more step of both; all that can be seen is alike."""
    mine, theirs = one.step(pieces, step, divisor), other.step(pieces, step, divisor)
    for left, right in zip(
        [*mine.coded, *mine.results], [*theirs.coded, *theirs.results], strict=True
    ):
        same_bits(left, right)
    for left, right in zip(one.stores, other.stores, strict=True):
        assert (left is None) == (right is None)
        if left and right:
            for field in left.fields:
                same_bits(left.read(field), right.read(field))
                assert np.isfinite(left.read(field)).all()


def normal(count: int, ranks: int, seed: int = 0) -> list[Floats]:
    generator = np.random.default_rng([count, seed])
    return list(generator.standard_normal((ranks, count), dtype=np.float32))


def lengths(name: str) -> list[int]:
    """On and off every boundary, up to three blocks."""
    block = build(name).block
    around = [b + d for b in (16, 64, block, 2 * block) for d in (-1, 0, 1, 3)]
    return sorted({0, 1, 2, 3, 7, 9, *around, block + block // 2 + 1})


# ---- kernel = reference ----------------------------------------------------------------------


@every_codec
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "random"])
@pytest.mark.parametrize("isa", ISAS)
def test_kernels_are_the_reference(name: str, stochastic: bool, isa: str) -> None:
    with using(isa):
        for count in lengths(name):
            for feedback, ranks, divisor in ((True, 3, 3), (True, 2, 1), (False, 4, 4)):
                chosen = {"stochastic": stochastic, "error_feedback": feedback}
                one = Exchange(build(name, native=True, **chosen), count, ranks)
                other = Exchange(build(name, native=False, **chosen), count, ranks)
                for step in range(2):
                    same(one, other, normal(count, ranks, step), step, divisor)


@st.composite
def drawn_pieces(draw: st.DrawFn, block: int, ranks: int) -> list[Floats]:
    """Pieces of any length up to two blocks, of any magnitude, with special values."""
    count = draw(st.integers(0, 2 * block + 3))
    generator = np.random.default_rng(draw(st.integers(0, 1000)))
    kind = draw(st.sampled_from(["normal", "spread", "any", "zeros", "sparse"]))
    pieces = generator.standard_normal((ranks, count))
    if kind == "spread":
        pieces *= 10.0 ** generator.integers(-20, 20, pieces.shape)
    if kind == "sparse":
        pieces *= generator.random(pieces.shape) < 0.02
    pieces *= 0.0 if kind == "zeros" else 10.0 ** draw(st.integers(-46, 39))
    with np.errstate(all="ignore"):
        made = pieces.astype(np.float32)
    if kind == "any":
        made = np.frombuffer(generator.bytes(made.nbytes), np.float32).reshape(made.shape).copy()
    for _ in range(draw(st.integers(0, 3))):
        if count:
            place = draw(st.integers(0, count - 1))
            made[draw(st.integers(0, ranks - 1)), place] = draw(st.sampled_from(SPECIAL))
    return list(made)


@every_codec
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_kernels_are_the_reference_on_anything(name: str, isa: str, data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, 3))
    stochastic, feedback = data.draw(st.booleans()), data.draw(st.booleans())
    chosen = {"stochastic": stochastic, "error_feedback": feedback}
    block = min(build(name).block, 1024)
    first = data.draw(drawn_pieces(block, ranks))
    count = first[0].shape[0]
    with using(isa):
        one = Exchange(build(name, native=True, **chosen), count, ranks)
        other = Exchange(build(name, native=False, **chosen), count, ranks)
        same(one, other, first, 0, data.draw(st.integers(1, 5)))
        same(one, other, normal(count, ranks), 1, ranks)


@every_codec
def test_kernels_are_the_reference_on_ten_million(name: str) -> None:
    count = 10_000_000
    pieces = normal(count, 2)
    pieces[0][::1000] *= 1e3
    with using((kernels.load() or pytest.skip(kernels.missing())).isa):
        one = Exchange(build(name, native=True), count, 2)
        other = Exchange(build(name, native=False), count, 2)
        same(one, other, pieces, 0, 2)


@pytest.mark.parametrize("name", [n for n in CASES if n not in SUMMED])
def test_coded_bytes_need_no_alignment(name: str) -> None:
    codec = build(name, native=True)
    assert isinstance(codec, PieceCodec)
    (values,) = normal(1000, 1)
    straight, shifted = fresh(codec.capacity(1000)), fresh(codec.capacity(1000) + 3)[3:]
    used = codec.encode(values, straight, None, Moment())
    assert codec.encode(values, shifted, None, Moment()) == used
    np.testing.assert_array_equal(straight[:used], shifted[:used])
    one, other = np.ones(1000, np.float32), np.ones(1000, np.float32)
    codec.decode_add(straight[:used], one)
    codec.decode_add(shifted[:used], other)
    same_bits(one, other)


# ---- what coding loses -----------------------------------------------------------------------


def distance(got: Floats, wanted: NDArray[Any]) -> float:
    """Relative, by the Euclidean norm."""
    wide = wanted.astype(np.float64)
    return float(np.linalg.norm(got - wide) / np.linalg.norm(wide))


both_forms = pytest.mark.parametrize("native", [False, True], ids=["numpy", "native"])


@every_codec
@both_forms
def test_one_exchange_loses_little(name: str, native: bool) -> None:
    # The outermost magnitudes are those at which fp16 (not the others) would lose more.
    for scale in (1.0, 1e-3, 1e4) if name in ("fp16", "threshold") else (1.0, 1e-30, 1e30):
        changed = {"threshold": scale} if name == "threshold" else {}
        codec = build(name, native=native, error_feedback=False, **changed)
        pieces = [each * np.float32(scale) for each in normal(3001, 3)]
        for got in Exchange(codec, 3001, 3).step(pieces).results:
            assert distance(got, np.mean(pieces, axis=0, dtype=np.float64)) <= CASES[name].error


@every_codec
@both_forms
def test_errors_are_made_good(name: str, native: bool) -> None:
    """The sum of what came out tends to the sum of what went in."""
    steps, count, ranks = 60, 1500, 2
    exchange = Exchange(build(name, native=native), count, ranks)
    constant = normal(count, ranks, seed=99)
    wanted, got = np.zeros(count), np.zeros(count)
    lost = []
    for step in range(steps):
        pieces = [a + b for a, b in zip(constant, normal(count, ranks, step), strict=True)]
        wanted += np.mean(pieces, axis=0, dtype=np.float64)
        got += exchange.step(pieces, step).results[0]
        lost.append(distance(got, wanted))
    assert lost[-1] <= CASES[name].drift
    assert lost[-1] <= lost[0] / 2 or lost[-1] < 1e-6


@every_unbiased
@both_forms
def test_rounding_at_random_is_unbiased(name: str, native: bool) -> None:
    draws, count = 400, 700
    exchange = Exchange(build(name, native=native, stochastic=True, error_feedback=False), count, 1)
    (values,) = normal(count, 1)
    got = np.stack([exchange.step([values], step).results[0] for step in range(draws)])
    got = got.astype(np.float64)
    spread = got.std(axis=0)
    fixed = spread == 0
    assert fixed.mean() < 0.05, "most elements lie between two codes"
    away = (got.mean(axis=0) - values)[~fixed] / (spread[~fixed] / math.sqrt(draws))
    # Standard normal numbers, if there is no bias.
    assert abs(away.mean()) < 5 / math.sqrt(away.size)
    assert 0.85 < away.std() < 1.15
    assert np.abs(away).max() < 6


@every_unbiased
def test_random_rounding_depends_on_the_seed_alone(name: str) -> None:
    pieces = normal(1000, 1)
    codec = build(name, stochastic=True, error_feedback=False)
    first, again, other = (Exchange(codec, 1000, 1).step(pieces, step) for step in (3, 3, 4))
    same_bits(first.results[0], again.results[0])
    assert (first.results[0] != other.results[0]).any()


@every_codec
@both_forms
def test_zeros_stay_zeros(name: str, native: bool) -> None:
    for count in (0, 1, 300, 2100):
        exchange = Exchange(build(name, native=native), count, 2)
        zeros = [np.zeros(count, np.float32)] * 2
        for step in range(2):
            for got in exchange.step(zeros, step).results:
                np.testing.assert_array_equal(got, zeros[0])
        for store in exchange.stores:
            assert not store or not store.read("error").any()


@both_forms
def test_none_is_exact(native: bool) -> None:
    pieces = [np.float32([*SPECIAL, 1.5]), np.float32([0.0] * (len(SPECIAL) + 1))]
    for got in (
        Exchange(build("none", native=native), len(SPECIAL) + 1, 2).step(pieces, 0, 1).results
    ):
        np.testing.assert_array_equal(got, pieces[0])


# ---- NaN and Inf -----------------------------------------------------------------------------


@every_codec
@both_forms
@pytest.mark.parametrize("feedback", [True, False], ids=["feedback", "without"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_nan_and_inf_reach_every_rank(name: str, native: bool, feedback: bool, bad: float) -> None:
    ranks = 3
    for count in (1, 3, 300, 1025):
        for place in {0, count // 2, count - 1}:
            for rank in range(ranks):
                exchange = Exchange(
                    build(name, native=native, error_feedback=feedback), count, ranks
                )
                exchange.step(normal(count, ranks), 0)
                pieces = normal(count, ranks, 1)
                pieces[rank][place] = bad
                for got in exchange.step(pieces, 1).results:
                    assert not np.isfinite(got).all()
                for got in exchange.step(normal(count, ranks, 2), 2).results:
                    assert np.isfinite(got).all(), "the store was poisoned"


# ---- stores ----------------------------------------------------------------------------------


@every_codec
@both_forms
def test_a_store_moves_to_another(name: str, native: bool) -> None:
    count, ranks = 1300, 2
    codec = build(name, native=native)
    one, other = Exchange(codec, count, ranks), Exchange(codec, count, ranks)
    for step in range(3):
        one.step(normal(count, ranks, step), step)
    for old, new in zip(one.stores, other.stores, strict=True):
        assert (old is None) == (new is None)
        if old and new:
            assert old.fields == new.fields
            assert old.nbytes == new.nbytes
            for field in old.fields:
                new.write(field, old.read(field).copy())
    for step in range(3, 6):
        same(one, other, normal(count, ranks, step), step, ranks)


@every_codec
def test_nothing_is_remembered_without_error_feedback(name: str) -> None:
    exchange = Exchange(build(name, error_feedback=False), 100, 2)
    for store in exchange.stores:
        assert store is None or "error" not in store.fields


def test_every_builtin_codec_is_tested() -> None:
    assert set(CASES) == set(codecs.BUILTINS)


@every_codec
def test_codecs_know_their_names(name: str) -> None:
    codec = build(name)
    assert codec.name == name
    assert codec.lossless == (name == "none")
    assert codec.block > 0
