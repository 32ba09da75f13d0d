"""States as skeletons and tensors: every tree comes back to the bit, and no more than trees do."""

from __future__ import annotations

import json
import math
import struct
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpcsync.checkpoint import layout, state
from hpcsync.errors import CheckpointError, DamagedError
from tests.checkpoints import same

TENSORS = st.builds(
    lambda shape, dtype: (torch.rand(shape) * 5).to(dtype),
    st.lists(st.integers(0, 3), max_size=4),
    st.sampled_from([state.torch_dtype(name) for name in layout.SIZES]),
)
ARRAYS = st.builds(
    lambda shape, dtype: np.ones(shape, dtype),
    st.lists(st.integers(0, 3), max_size=4),
    st.sampled_from(["?", "b", "B", "h", "H", "i", "I", "l", "L", "e", "f", "d", "F", "D"]),
)
LEAVES = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), TENSORS, ARRAYS)
)
KEYS = st.text(max_size=4) | st.sampled_from(["", ".", "..", "a/b", "%2F", "$tensor", "\ud800"])
TREES = st.dictionaries(
    KEYS,
    st.recursive(
        LEAVES,
        lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner),
        max_leaves=12,
    ),
)


@given(TREES)
def test_every_tree_comes_back(tree: dict[str, Any]) -> None:
    flat = state.flatten(tree)
    skeleton = json.loads(json.dumps(flat.skeleton, allow_nan=False))
    assert same(state.unflatten(skeleton, flat.tensors), tree)
    assert state.names(skeleton) == list(flat.tensors)
    for name in flat.tensors:
        assert all(part not in ("", ".") for part in name.split("/"))
        name.encode()


def test_floats_keep_all_bits() -> None:
    odd = struct.unpack(">d", bytes.fromhex("fff8000000000123"))[0]
    tree = {"a": [odd, -0.0, math.inf, -math.inf, 5e-324, 0.1]}
    back = state.unflatten(state.flatten(tree).skeleton, {})
    assert [struct.pack(">d", each) for each in back["a"]] == [
        struct.pack(">d", each) for each in tree["a"]
    ]


def test_names_are_the_way_in_the_tree() -> None:
    tree = OrderedDict(
        model={"blocks.0.w": torch.ones(2)}, more=[torch.ones(1), {"a/b": np.ones(1)}]
    )
    flat = state.flatten(tree, "ranks/3/")
    assert list(flat.tensors) == [
        *("ranks/3/model/blocks.0.w", "ranks/3/more/0", "ranks/3/more/1/a%2Fb")
    ]


def test_tensors_share_memory() -> None:
    weight = torch.ones(4, requires_grad=True)
    flat = state.flatten({"w": weight, "a": (array := np.ones(3))})
    assert flat.tensors["w"].data_ptr() == weight.data_ptr()
    assert not flat.tensors["w"].requires_grad
    assert flat.tensors["a"].data_ptr() == array.ctypes.data


def test_a_view_that_is_conjugate_or_negative_keeps_its_values() -> None:
    values = torch.tensor([1 + 2j, 3 - 4j])
    flat = state.flatten({"conjugate": values.conj(), "negative": values.conj().imag})
    assert not flat.tensors["conjugate"].is_conj()
    assert flat.tensors["negative"].tolist() == [-2.0, 4.0]


def test_arrays_of_other_byte_order_or_stride() -> None:
    array = np.arange(6, dtype=">i4").reshape(2, 3)[:, ::-1]
    back = state.unflatten(*state.flatten({"a": array}))["a"]
    assert back.tolist() == array.tolist()
    assert back.dtype == np.int32


def test_numpy_scalars_become_numbers() -> None:
    back = state.unflatten(*state.flatten({"a": np.float32(0.1), "b": np.int64(3)}))
    assert back == {"a": float(np.float32(0.1)), "b": 3}


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (object(), "state a/0: cannot be stored: a object"),
        ({1: 2}, "the key 1, which is no text"),
        (torch.ones(2).to_sparse(), "layout torch.sparse_coo"),
        (torch.ones(2, device="meta"), "on meta"),
        (np.array(["x"]), "NumPy array of dtype <U1"),
        (np.array([object()]), "NumPy array of dtype object"),
        (torch.ones([1] * 33), "more than 32 dimensions"),
        (b"bytes", "a bytes"),
        ({1, 2}, "a set"),
    ],
)
def test_what_cannot_be_stored_is_told_with_its_place(value: object, told: str) -> None:
    with pytest.raises(CheckpointError) as error:
        state.flatten({"a": [value]})
    assert told in str(error.value)
    assert str(error.value).startswith("state a/0")


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_a_dtype_that_files_have_no_name_for_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"state a: .* dtype torch.complex32"):
        state.flatten({"a": torch.empty(2, dtype=torch.complex32)})


def test_a_tree_without_end_is_refused() -> None:
    tree: dict[str, Any] = {}
    tree["a"] = tree
    with pytest.raises(CheckpointError, match="more than 32 levels"):
        state.flatten(tree)


@pytest.mark.parametrize(
    "skeleton",
    [
        {"$tensor": "missing"},
        {"$tensor": 3},
        {"$tensor": "x", "more": 1},
        {"$array": ["x"]},
        {"$float": "zz"},
        {"$float": "7ff80000000000000"},
        {"$tuple": {}},
        {"$dict": {}},
        {"$dict": [["a"]]},
        {"$dict": [[1, 2]]},
        {"$reduce": "os.system"},
        {"$array": "half"},
    ],
)
def test_a_malformed_skeleton_is_refused(skeleton: Any) -> None:
    with pytest.raises(DamagedError):
        state.unflatten([skeleton], {"x": torch.ones(1), "half": torch.ones(1).bfloat16()})


def test_a_skeleton_of_too_many_levels_is_refused() -> None:
    deep: Any = 1
    for _ in range(900):
        deep = [deep]
    with pytest.raises(DamagedError, match="too many levels"):
        state.names(deep)


def test_select() -> None:
    tree = {"model": {"w": torch.ones(1)}, "other": 1}
    for more in ({}, {"$odd": 2}):
        skeleton = state.select(state.flatten(tree | more).skeleton, ["model", "absent"])
        assert state.names(skeleton) == ["model/w"]
