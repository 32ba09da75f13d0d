"""Bucket plans: every parameter has one place of its own, in the order that was asked for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcsync.gradients.plan import BucketPlan, Parameter, plan_buckets

SIZES = {"float32": 4, "bfloat16": 2, "float64": 8}
LINE = 64  # bytes a cache line


@st.composite
def planned(draw: st.DrawFn) -> tuple[list[Parameter], list[int], int, int]:
    kinds = draw(
        st.lists(st.tuples(st.integers(0, 300), st.sampled_from(sorted(SIZES))), max_size=30)
    )
    params = [
        Parameter(f"p{index}", numel, dtype, SIZES[dtype])
        for index, (numel, dtype) in enumerate(kinds)
    ]
    order = draw(st.permutations(range(len(params))))
    return params, list(order), draw(st.integers(0, 4000)), draw(st.integers(0, 4000))


@given(planned())
def test_every_parameter_is_in_one_bucket_of_its_dtype(
    case: tuple[list[Parameter], list[int], int, int],
) -> None:
    params, order, cap, first = case
    plans = plan_buckets(params, order, cap, first)
    assert sorted(index for plan in plans for index in plan.params) == list(range(len(params)))
    assert [plan.index for plan in plans] == list(range(len(plans)))
    for plan in plans:
        assert plan.params
        assert {params[index].dtype for index in plan.params} == {plan.dtype}
        assert plan.itemsize == SIZES[plan.dtype]
        assert plan.nbytes == plan.numel * plan.itemsize


@given(planned())
def test_places_are_aligned_and_apart(case: tuple[list[Parameter], list[int], int, int]) -> None:
    params, order, cap, first = case
    for plan in plan_buckets(params, order, cap, first):
        end = 0
        for index, offset in zip(plan.params, plan.offsets, strict=True):
            assert offset * plan.itemsize % LINE == 0
            assert end <= offset < end + LINE // plan.itemsize
            end = offset + params[index].numel
        assert end <= plan.used_offset < end + LINE // plan.itemsize
        assert plan.numel == plan.used_offset + len(plan.params)


@given(planned())
def test_buckets_follow_the_order(case: tuple[list[Parameter], list[int], int, int]) -> None:
    params, order, cap, first = case
    plans = plan_buckets(params, order, cap, first)
    place = {index: position for position, index in enumerate(order)}
    last = [place[plan.params[-1]] for plan in plans]
    assert last == sorted(last), "a bucket stands where its last parameter becomes ready"
    for dtype in SIZES:
        seen = [index for plan in plans if plan.dtype == dtype for index in plan.params]
        assert seen == [index for index in order if params[index].dtype == dtype]


@given(planned())
def test_a_bucket_closes_as_soon_as_it_is_full(
    case: tuple[list[Parameter], list[int], int, int],
) -> None:
    params, order, cap, first = case
    plans = plan_buckets(params, order, cap, first)
    total = sum(param.numel * param.itemsize for param in params)
    cap = min(cap, max(total // 8, first))
    for dtype in SIZES:
        own = [plan for plan in plans if plan.dtype == dtype]
        for position, plan in enumerate(own):
            limit = cap if position else min(first, cap)
            filled = [params[index].numel * plan.itemsize for index in plan.params]
            assert len(filled) == 1 or sum(filled[:-1]) < limit
            assert position == len(own) - 1 or sum(filled) >= limit


def test_first_bucket_is_small() -> None:
    params = [Parameter(str(index), 100, "float32", 4) for index in range(20)]
    order = list(reversed(range(20)))
    plans = plan_buckets(params, order, 800, 400)
    assert [plan.params for plan in plans][:3] == [(19,), (18, 17), (16, 15)]
    params = params[:6]
    # A small model is cut into about eight, but into none smaller than the first.
    assert len(plan_buckets(params, order[-6:], 10**6, 400)) == 6
    plans = plan_buckets(params * 8, list(reversed(range(48))), 10**6, 400)
    assert [len(plan.params) for plan in plans] == [1, *[6] * 7, 5]
    plans = plan_buckets(params * 3, list(reversed(range(18))), 800, 400)
    assert plans[1].params == (16, 15)
    assert plans[1] == BucketPlan(1, "float32", 4, (16, 15), (0, 112), 224, 226)


def test_nothing_to_plan() -> None:
    assert plan_buckets([], [], 100, 100) == ()


def test_an_order_that_leaves_one_out_is_a_fault_of_ours() -> None:
    with pytest.raises(AssertionError, match="once"):
        plan_buckets([Parameter("a", 1, "float32", 4)] * 2, [0, 0], 1, 1)
