"""What runs on the test double under many seeds: every transport of device memory, codecs, the
reducer, and buffers of models."""

from __future__ import annotations

from collections.abc import Sequence

from tests.double import buffered, flows, reduced
from tests.double.buffered import Buffered
from tests.double.flows import Bucket, Scenario
from tests.double.reduced import Training


def _ringed(count: int, dtype: str = "float32") -> Bucket:
    return Bucket(count, dtype, "ring")


def _halved(count: int) -> Bucket:
    return Bucket(count, "float32", "halving", mean=True)


_BOTH = (Bucket(300), Bucket(3000), Bucket(900, "int32"))

CODED = (
    Scenario("coded, staged", (Bucket(3000, codec="int8"), Bucket(2000, codec="topk")), 3, 1),
    Scenario(
        "coded, ipc and device",
        (Bucket(3000, "bfloat16", codec="int4"), Bucket(2000, codec="powersgd")),
        4,
        2,
        aware=True,
    ),
    Scenario(
        "coded between all",
        (Bucket(2000, codec="int8_shared"), Bucket(1500, "float16", codec="randomk")),
        3,
        3,
    ),
)
FLOWS = (
    Scenario("ipc", (Bucket(300), Bucket(3000), Bucket(700, "bfloat16"))),
    Scenario("ipc by steps", (_ringed(3000), Bucket(900, "float32", "halving")), 4, 4),
    Scenario("device", (*_BOTH, _ringed(3000, "float16")), 3, 1, aware=True),
    Scenario("staged", (Bucket(3000), _ringed(3100, "int32")), 3, 1),
    Scenario("ipc and staged", _BOTH, 4, 2),
    Scenario("ipc and device", _BOTH, 4, 2, aware=True, streams=2),
    Scenario(
        "device by steps",
        tuple(_ringed(count) for count in range(2400, 3000, 100)),
        4,
        1,
        aware=True,
    ),
    Scenario("nccl", (*_BOTH, _ringed(3000, "float16")), 3, 3, nccl=True),
    Scenario("nccl and staged", (*_BOTH, Bucket(1500), Bucket(2500)), 4, 2, nccl=True, streams=2),
)
HALVED = (
    Scenario("staged by halves", (_halved(3000), _halved(700)), 4, 1),
    Scenario("staged, folded", (_halved(3000), _halved(700)), 3, 1),
)
TRAININGS = (
    Training("reducer, ipc", streams=2),
    Training("reducer, ipc and staged", 4, 2),
    Training("reducer, device", 2, 1, aware=True, streams=2),
)
BUFFERED = (Buffered("buffers, ipc", overtakes=True), Buffered("buffers, staged", 3, 1))
Made = Scenario | Training | Buffered
ALL: tuple[Made, ...] = (*FLOWS, *HALVED, *CODED, *TRAININGS, *BUFFERED)


def first_fault(scenario: Made, seeds: Sequence[int]) -> str:
    """Run it under each seed; the first fault in words, empty if there is none."""
    if isinstance(scenario, Training):
        return reduced.first_fault(scenario, seeds)
    if isinstance(scenario, Buffered):
        return buffered.first_fault(scenario, seeds)
    return flows.first_fault(scenario, seeds)


def named(name: str) -> Made:
    return next(each for each in ALL if each.name == name)
