"""Who stores which bytes: each byte once, in rows, evenly."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hpcsync.checkpoint import layout
from hpcsync.checkpoint.layout import Dataset, Piece, TensorMeta
from hpcsync.errors import CheckpointError

SHAPES = st.lists(st.integers(0, 9) | st.sampled_from([1, 1, 100]), max_size=4).map(tuple)
METAS = st.lists(st.tuples(st.sampled_from(sorted(layout.SIZES)), SHAPES), max_size=12).map(
    lambda found: [TensorMeta(f"t{at}", *each) for at, each in enumerate(found)]
)


@given(METAS, st.integers(1, 8), st.sets(st.integers(0, 11)))
@example([TensorMeta("t0", "float32", (1, 1, 1))], 8, set())
@example([], 3, set())
def test_each_byte_is_stored_once_and_evenly(
    metas: list[TensorMeta], writers: int, first: set[int]
) -> None:
    first_only = {f"t{at}" for at in first}
    shares = layout.share(metas, writers, first_only)
    assert len(shares) == writers
    of = {meta.name: meta for meta in metas}
    rows = defaultdict(list)
    for pieces in shares:
        for piece in pieces:
            assert piece.rows > 0
            assert piece.nbytes == piece.rows * of[piece.name].row_nbytes > 0
            rows[piece.name].append((piece.start, piece.start + piece.rows))
    for meta in metas:
        ends = [0, *(stop for _, stop in rows[meta.name])]
        assert [start for start, _ in rows[meta.name]] == ends[:-1]
        assert ends[-1] == (meta.rows if meta.nbytes else 0)
    for pieces in shares[1:]:
        assert not first_only & {piece.name for piece in pieces}
    _check_even(metas, shares, first_only)


def _check_even(
    metas: list[TensorMeta], shares: tuple[tuple[Piece, ...], ...], first_only: set[str]
) -> None:
    row = max((meta.row_nbytes for meta in metas if meta.name not in first_only), default=0)
    sizes = [sum(piece.nbytes for piece in pieces) for pieces in shares]
    fixed = sum(meta.nbytes for meta in metas if meta.name in first_only)
    even = sum(sizes) / len(sizes)
    if fixed <= even:
        assert all(abs(size - even) <= row + 1 for size in sizes)
    elif len(sizes) > 1:
        rest = (sum(sizes) - fixed) / (len(sizes) - 1)
        assert all(abs(size - rest) <= row + 1 for size in sizes[1:])


@given(METAS, st.integers(1, 4), st.integers(1, 3))
def test_pieces_of_a_node_make_one_dataset_a_tensor(
    metas: list[TensorMeta], nodes: int, ranks: int
) -> None:
    shares = layout.share(metas, nodes * ranks)
    stored = 0
    for node in range(nodes):
        pieces = [piece for each in shares[node * ranks :][:ranks] for piece in each]
        found = layout.datasets(metas, pieces)
        assert len({each.name for each in found}) == len(found)
        assert sum(each.nbytes for each in found) == sum(piece.nbytes for piece in pieces)
        stored += sum(each.nbytes for each in found)
    assert stored == sum(meta.nbytes for meta in metas)


def test_leading_dimensions_of_one_are_not_cut() -> None:
    meta = TensorMeta("w", "float64", (1, 1, 6, 2))
    assert (meta.axis, meta.rows, meta.row_nbytes) == (2, 6, 16)
    assert layout.share([meta], 2) == ((Piece("w", 0, 3, 48),), (Piece("w", 3, 3, 48),))
    assert Dataset(meta, 3, 3).shape == (1, 1, 3, 2)


def test_pieces_of_a_file_must_adjoin() -> None:
    metas = [TensorMeta("w", "float32", (9,))]
    shares = layout.share(metas, 3)
    with pytest.raises(CheckpointError, match="w: rows are missing"):
        layout.datasets(metas, [*shares[0], *shares[2]])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_element_is_one_row(shape: tuple[int, ...]) -> None:
    meta = TensorMeta("w", "bfloat16", shape)
    assert layout.whole(meta) == Piece("w", 0, 1, 2)
    assert meta.part(1) == shape
