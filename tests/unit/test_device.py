"""The CPU's sums, native and NumPy's, against float64, and rounding bit for bit against torch's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpcsync.device import Device, DType, dtype_of, get, kernels
from hpcsync.device.cpu import _BLOCK, CpuDevice, narrow, widen
from tests.isas import ISAS, using

FLOATS = ("float32", "float64", "float16", "bfloat16")
INTEGERS = ("int8", "uint8", "int16", "int32", "int64")
# One element, one below, on and above a block, and several blocks with a rest.
LENGTHS = (0, 1, 7, _BLOCK - 1, _BLOCK, _BLOCK + 1, 2 * _BLOCK + 513)


@pytest.fixture(scope="module", params=["native", "numpy"])
def device(request: pytest.FixtureRequest) -> Device:
    return native() if request.param == "native" else CpuDevice()


def native() -> CpuDevice:
    """A device with kernels."""
    loaded = kernels.load()
    if loaded is None:
        pytest.skip(kernels.missing())
    return CpuDevice(loaded)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set in use, while the test runs."""
    with using(request.param):
        yield request.param


def drawn(name: str, count: int, sources: int, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    """Random arrays in the storage of dtype ``name``."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(sources):
        if name in FLOATS:
            values = torch.randn(count, generator=generator, dtype=torch.float64) * 3
        else:
            values = torch.randint(0, 20, (count,), generator=generator)
        made.append(stored(values.to(getattr(torch, name))))
    return made


def stored(values: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor as the device stores it: a copy in NumPy, bfloat16 by its bits."""
    bits = values.view(torch.int16) if values.dtype == torch.bfloat16 else values
    array = bits.numpy().copy()
    return array.view(np.uint16) if values.dtype == torch.bfloat16 else array


def exact(array: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """Stored values in float64."""
    return (
        widen(array, dtype_of(name)).astype(np.float64)
        if name == "bfloat16"
        else array.astype(np.float64)
    )


def expected(sources: list[np.ndarray[Any, Any]], name: str, divisor: int) -> Any:
    """The contract, by torch: add from left to right in the accumulator's type, round once."""
    wide = torch.float32 if name in ("float16", "bfloat16") else getattr(torch, name)
    kind = getattr(torch, name)
    tensors = [
        torch.from_numpy(each.view(np.int16) if name == "bfloat16" else each).view(kind).to(wide)
        for each in sources
    ]
    total = tensors[0].clone()
    for each in tensors[1:]:
        total = total + each
    if divisor != 1:
        total = total / divisor
    return stored(total.to(kind))


@pytest.mark.parametrize("divisor", [1, 2, 3])
@pytest.mark.parametrize("sources", [1, 2, 3, 5])
@pytest.mark.parametrize("name", FLOATS)
def test_sum_of_floats(device: Device, name: str, sources: int, divisor: int) -> None:
    for count in LENGTHS:
        terms = drawn(name, count, sources)
        out = np.empty_like(terms[0])
        device.reduce([out], terms, dtype_of(name), divisor)
        np.testing.assert_array_equal(out, expected(terms, name, divisor))
        truth = sum(exact(each, name) for each in terms) / divisor
        tolerance = {"float16": 2e-3, "bfloat16": 1e-2, "float32": 1e-5, "float64": 1e-13}[name]
        np.testing.assert_allclose(exact(out, name), truth, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("name", INTEGERS)
def test_sum_of_integers(device: Device, name: str) -> None:
    for count in LENGTHS:
        terms = drawn(name, count, 3)
        out = np.empty_like(terms[0])
        device.reduce([out], terms, dtype_of(name))
        np.testing.assert_array_equal(out, sum(each.astype(np.int64) for each in terms))


def test_a_mean_of_integers_is_a_fault_of_ours(device: Device) -> None:
    terms = drawn("int32", 8, 2)
    with pytest.raises(AssertionError, match="int32"):
        device.reduce([terms[0]], terms, dtype_of("int32"), 2)


@pytest.mark.parametrize("name", [*FLOATS, "int32"])
@pytest.mark.parametrize("sources", [1, 2, 4])
def test_outputs_may_be_sources(device: Device, name: str, sources: int) -> None:
    divisor = 3 if name in FLOATS else 1
    for count in (1, _BLOCK + 5):
        for into in range(sources):
            terms = drawn(name, count, sources, seed=into)
            right = expected(terms, name, divisor)
            others = [each.copy() for index, each in enumerate(terms) if index != into]
            device.reduce([terms[into]], terms, dtype_of(name), divisor)
            np.testing.assert_array_equal(terms[into], right)
            kept = [each for index, each in enumerate(terms) if index != into]
            for one, other in zip(kept, others, strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", [*FLOATS, "int64"])
def test_all_sources_may_be_outputs_in_any_order(device: Device, name: str) -> None:
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        terms = drawn(name, _BLOCK + 3, 3)
        right = expected(terms, name, 1)
        further = np.empty_like(right)
        device.reduce([*(terms[index] for index in order), further], terms, dtype_of(name))
        for each in (*terms, further):
            np.testing.assert_array_equal(each, right)


def test_additions_go_from_left_to_right(device: Device) -> None:
    big, small = np.float32([1e8]), np.float32([1.0])
    for terms, right in (([big, -big, small], 1.0), ([small, big, -big], 0.0)):
        out = np.empty(1, np.float32)
        device.reduce([out], terms, dtype_of("float32"))
        assert out[0] == right


def test_low_precision_is_rounded_once(device: Device) -> None:
    one, little = torch.tensor([1.0]).bfloat16(), torch.tensor([2.0**-9]).bfloat16()
    terms = [stored(each) for each in (one, little, little, little, little)]
    out = np.empty(1, np.uint16)
    device.reduce([out], terms, dtype_of("bfloat16"))
    assert exact(out, "bfloat16")[0] == 1 + 2.0**-7


def test_a_mean_of_float16_does_not_overflow_in_between(device: Device) -> None:
    terms = [np.full(3, 60000, np.float16)] * 4
    out = np.empty(3, np.float16)
    device.reduce([out], terms, dtype_of("float16"), 4)
    np.testing.assert_array_equal(out, terms[0])


def _patterns() -> np.ndarray[Any, Any]:
    """float32 values on, half way between, and one unit beside all bfloat16 and float16 values."""
    upper = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    lower = np.uint32([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    of_bfloat16 = (upper[:, None] | lower).reshape(-1)
    with np.errstate(all="ignore"):
        halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    steps = np.uint32([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF])
    of_float16 = (halves.view(np.uint32)[:, None] + steps).reshape(-1)
    return np.concatenate([of_bfloat16, of_float16]).view(np.float32)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_rounding_is_torchs(name: str) -> None:
    dtype, kind = dtype_of(name), getattr(torch, name)
    values = _patterns()
    with np.errstate(all="ignore"):
        ours = narrow(values.copy(), dtype)
    theirs = torch.from_numpy(values).to(kind)
    nan = np.isnan(values)
    np.testing.assert_array_equal(ours[~nan], stored(theirs)[~nan])
    back = torch.from_numpy(ours.view(np.int16)).view(kind)
    assert torch.isnan(back)[torch.from_numpy(nan)].all()
    signs = np.signbit(values) == (ours.view(np.uint16) >> 15).astype(bool)
    assert signs[~nan].all()


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_widening_is_torchs(name: str) -> None:
    dtype, kind = dtype_of(name), getattr(torch, name)
    bits = np.arange(1 << 16, dtype=np.uint16)
    ours = widen(bits.view(dtype.storage), dtype)
    theirs = torch.from_numpy(bits.view(np.int16)).view(kind).float().numpy()
    nan = np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(ours), nan)
    np.testing.assert_array_equal(ours.view(np.uint32)[~nan], theirs.view(np.uint32)[~nan])


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("divisor", [1, 2, 3])
@pytest.mark.filterwarnings("error")
def test_nan_and_inf_survive(device: Device, name: str, divisor: int) -> None:
    special = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.0]
    pairs = torch.cartesian_prod(torch.tensor(special), torch.tensor(special))
    kind = getattr(torch, name)
    terms = [stored(pairs[:, column].to(kind)) for column in (0, 1)]
    out = np.empty_like(terms[0])
    device.reduce([out], terms, dtype_of(name), divisor)
    right = expected(terms, name, divisor)
    wide, truth = exact(out, name), exact(right, name)
    np.testing.assert_array_equal(np.isnan(wide), np.isnan(truth))
    number = ~np.isnan(truth)
    np.testing.assert_array_equal(
        out.view(np.uint8).reshape(len(out), -1)[number],
        right.view(np.uint8).reshape(len(out), -1)[number],
    )


def bits(values: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """The bits of stored values, those of a NaN made alike."""
    with np.errstate(all="ignore"):
        wide = exact(values, name)
    unsigned = values.view(np.dtype(f"uint{8 * values.dtype.itemsize}"))
    return np.where(np.isnan(wide), np.zeros_like(unsigned), unsigned)


def placed(values: np.ndarray[Any, Any], offset: int) -> np.ndarray[Any, Any]:
    """A copy that begins ``offset`` elements behind a cache line's boundary."""
    raw = np.empty(values.nbytes + 128 + offset * values.itemsize, np.uint8)
    start = -raw.ctypes.data % 64 + offset * values.itemsize
    made = raw[start : start + values.nbytes].view(values.dtype)
    made[:] = values
    return made


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("sources", [1, 2, 3, 4, 5, 9])
def test_kernels_add_as_numpy_does(isa: str, name: str, sources: int) -> None:
    """Any bit pattern, outputs among the sources and others, at odd places and lengths."""
    generator = np.random.default_rng(sources)
    storage = dtype_of(name).storage
    for count in (0, 1, 15, 63, 64, 65, 1023, 1025, 4099):
        for divisor in (1, 3, 4):
            offset = int(generator.integers(0, 16))
            raw = generator.bytes(sources * count * storage.itemsize)
            terms = [
                placed(each, offset + index % 2)
                for index, each in enumerate(np.frombuffer(raw, storage).reshape(sources, count))
            ]
            right = np.empty(count, storage)
            CpuDevice().reduce([right], terms, dtype_of(name), divisor)
            further = placed(np.zeros_like(right), offset)
            outs = [terms[sources // 2], further]
            native().reduce(outs, terms, dtype_of(name), divisor)
            for out in outs:
                np.testing.assert_array_equal(bits(out, name), bits(right, name))


def test_large_outputs_at_any_place(isa: str) -> None:
    """They are written past the caches, which wants aligned addresses."""
    count = (4 << 20) // 4 + 77
    terms = drawn("float32", count, 3)
    right = expected(terms, "float32", 3)
    for offsets in ((0, 0), (1, 1), (5, 5), (3, 4), (0, 7)):
        outs = [placed(np.zeros_like(right), offset) for offset in offsets]
        native().reduce(outs, terms, dtype_of("float32"), 3)
        for out in outs:
            np.testing.assert_array_equal(out, right)


def test_more_outputs_than_any_node_has_ranks(isa: str) -> None:
    terms = drawn("float32", 100, 70)
    right = expected(terms, "float32", 70)
    native().reduce(terms, terms, dtype_of("float32"), 70)
    for out in terms:
        np.testing.assert_array_equal(out, right)


@given(
    values=st.lists(st.floats(width=32), min_size=1, max_size=40),
    divisor=st.integers(1, 9),
)
def test_any_float_is_divided_as_numpy_does(values: list[float], divisor: int) -> None:
    source = np.float32(values)
    out = np.empty_like(source)
    get().reduce([out], [source, source], dtype_of("float32"), divisor)
    with np.errstate(all="ignore"):
        right = (source + source) / np.float32(divisor)
    np.testing.assert_array_equal(out, right)


def test_threads_do_not_share_scratch_memory(device: Device) -> None:
    wrong: list[int] = []

    def add(seed: int) -> None:
        terms = drawn("float32", 3 * _BLOCK + seed, 4, seed)
        right = expected(terms, "float32", 3)
        out = np.empty_like(terms[0])
        for _ in range(20):
            device.reduce([out], terms, dtype_of("float32"), 3)
            if not np.array_equal(out, right):
                wrong.append(seed)

    threads = [threading.Thread(target=add, args=(seed,)) for seed in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong


def test_copy(device: Device) -> None:
    source = np.arange(10, dtype=np.float32)
    out = np.zeros(10, np.float32)
    device.copy(out, source)
    np.testing.assert_array_equal(out, source)


@pytest.mark.parametrize("name", [*FLOATS, *INTEGERS])
def test_dtypes_go_by_all_their_names(name: str) -> None:
    wanted = dtype_of(name)
    assert dtype_of(getattr(torch, name)) is wanted
    assert wanted.itemsize == getattr(torch, name).itemsize
    assert wanted.floating == (name in FLOATS)
    if name != "bfloat16":
        assert dtype_of(np.dtype(name)) is wanted
        assert dtype_of(getattr(np, name)) is wanted


@pytest.mark.parametrize("kind", ["float8", torch.complex64, torch.bool, np.dtype("complex128")])
def test_what_cannot_be_added_is_named(kind: object) -> None:
    with pytest.raises(ValueError, match=r"dtype .* cannot be reduced; use one of: .*float32"):
        dtype_of(kind)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="device: 'tpu' is not one of: cpu"):
        get("tpu")


def test_accumulators() -> None:
    assert dtype_of("bfloat16") == DType("bfloat16", np.dtype("uint16"), np.dtype("float32"))
    assert dtype_of("float16").accumulate == np.float32
    assert dtype_of("float64").accumulate == np.float64
