"""Coded exchanges of several ranks on a device: the sums, stores and kept pieces of the host's."""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
from numpy.typing import NDArray

from hpcsync import codecs
from hpcsync.codecs import Matrix, Settings
from hpcsync.collectives import codec_costs
from hpcsync.collectives.coding import Clock, Coding
from hpcsync.collectives.routes import Facts
from hpcsync.config import CommConfig
from hpcsync.device import dtype_of
from hpcsync.device.cpu import narrow
from hpcsync.errors import UserError
from hpcsync.transports.base import Region
from tests.double.device import machine
from tests.double.flows import little_is_much
from tests.double.job import Rank, job
from tests.shim import host as shim

pytestmark = pytest.mark.skipif(bool(shim.MISSING), reason=shim.MISSING)

CODED, PLAIN = 5000, 70  # elements that are coded, and that go with the last of them
MATRICES = (Matrix(0, (50, 60)), Matrix(3000, (40, 50)))
SETTINGS = Settings(ratio=0.05, threshold=0.4, rank=2, momentum=0.9, verify=True)
CODECS = [*(name for name in codecs.BUILTINS if name != "none")]
STEPS = 3


class Layout(NamedTuple):
    """Ranks, and how they stand to each other."""

    ranks: int
    per_node: int
    where: str
    aware: bool = False


STAGED = Layout(2, 1, "rail")
LAYOUTS = [Layout(4, 2, "rail", aware=True), Layout(3, 3, "all")]
CASES = [
    *((codec, layout) for codec in CODECS for layout in LAYOUTS),
    *((codec, STAGED) for codec in ("int8", "topk", "powersgd")),
]


class Found(NamedTuple):
    """What an exchange left on a rank."""

    sums: NDArray[Any]
    held: list[tuple[str, str, NDArray[np.float32]]]
    kept: list[tuple[object, list[bytes]]]


def values_of(step: int, rank: int, dtype: str) -> NDArray[Any]:
    values = np.random.default_rng([step, rank]).standard_normal(CODED + PLAIN)
    values[::100] *= 30
    made = values.astype(np.float32)
    return made if dtype == "float32" else narrow(made, dtype_of(dtype))


def exchange(rank: Rank, codec: str, layout: Layout, dtype: str, *, queued: bool) -> list[Found]:
    """A few steps on one rank."""
    facts = Facts(mpi_device="" if layout.aware else "it is not aware of devices")
    collectives = rank.collectives(facts=facts, device=queued)
    device, kind, clock = collectives.device, dtype_of(dtype), Clock()
    count = CODED + PLAIN
    arena = collectives.arena(count * kind.itemsize)
    coding = Coding(
        codec=codecs.build(codec, SETTINGS, device=device),
        where=layout.where,
        count=CODED,
        matrices=MATRICES,
        seed=5,
        clock=clock,
    )
    collective = collectives.allreduce(arena, kind, average=True, count=count, coding=coding)
    region, found = Region(arena, 0, count, kind), []
    keepers = collective.keepers()
    for step in range(STEPS):
        values = values_of(step, rank.rank, dtype)
        if queued:
            rank.device.write(region.array, values)
        else:
            region.array[:] = values
        collective.start(0, [device.current().record()])
        collective.wait()
        collective.join(device.current())
        clock.step += 1
        sums = rank.device.read(region.array) if queued else region.array.copy()
        held = [
            (each.role, field, np.array(each.store.read(field)))
            for each in collective.held
            for field in each.store.fields
        ]
        kept = [(each.kept, [a.tobytes() for a in each.left().arrays]) for each in keepers]
        found.append(Found(sums, held, kept))
    collective.close()
    return found


def run(codec: str, layout: Layout, dtype: str, *, queued: bool) -> list[list[Found]]:
    name = f"{codec} {layout} {dtype}"
    options = {"per_node": layout.per_node, "aware": layout.aware}
    with little_is_much(), job(layout.ranks, name, comm={"segment_mb": 0.01}, **options) as made:
        return made.run(lambda rank: exchange(rank, codec, layout, dtype, queued=queued))


@pytest.mark.parametrize(("codec", "layout"), CASES, ids=str)
def test_the_same_as_on_the_host(codec: str, layout: Layout) -> None:
    dtype = "bfloat16" if layout.where == "all" else "float32"
    wanted = run(codec, layout, dtype, queued=False)
    found = run(codec, layout, dtype, queued=True)
    for rank, (there, here) in enumerate(zip(found, wanted, strict=True)):
        for step, (one, other) in enumerate(zip(there, here, strict=True)):
            where = f"rank {rank}, step {step}"
            assert np.array_equal(one.sums, other.sums), where
            assert len(one.held) == len(other.held), where
            for left, right in zip(one.held, other.held, strict=True):
                assert left[:2] == right[:2], where
                assert np.array_equal(left[2], right[2]), (where, left[:2])
            assert one.kept == other.kept, where


@pytest.mark.parametrize("name", ["int8", "topk", "powersgd"])
def test_a_codec_is_measured_where_it_codes(name: str) -> None:
    source = np.ones(512 * codec_costs.PIECES, np.float32)
    codec, shapes = codecs.build(name, SETTINGS), [(20, 30)]
    small = mock.patch.multiple(codec_costs, PIECE=512, _TOGETHER=1, _MOST_CALLS=2)
    with small, machine() as double:
        stream = double.device().stream()
        assert codec_costs.adding_s(source, stream) > 0
        cost = codec_costs.codec_cost(codec, CommConfig(), source, 2, shapes, stream)
    assert cost.encode_s > 0
    assert cost.decode_s > 0


def test_what_cannot_be_widened_is_refused() -> None:
    with pytest.raises(UserError) as caught, job(2, per_node=1) as made:
        made.run(lambda rank: exchange(rank, "int8", STAGED, "float64", queued=True))
    text = str(caught.value)
    assert "\n" not in text
    for word in ("float64", "double", "compress.codec=none"):
        assert word in text
