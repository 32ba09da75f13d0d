"""What is measured at start: the same numbers on all ranks, whatever they are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from mpi4py import MPI

from hpcsync.codecs import Moment, PieceCodec, Settings, Store, SumCodec
from hpcsync.codecs.base import Bytes, Floats, Form, Matrix
from hpcsync.collectives import Collectives
from hpcsync.collectives.costs import Choice, Layout, Load, Measured
from hpcsync.collectives.probe import probe
from hpcsync.collectives.tuner import Tuner
from hpcsync.config import CommConfig
from hpcsync.launch import Runtime
from hpcsync.topology import Topology

pytestmark = pytest.mark.mpi


class Half(PieceCodec):
    """float16, for the sake of having a codec."""

    name = "half"

    def capacity(self, count: int) -> int:
        return 2 * count

    def encode(self, values: Floats, out: Bytes, store: Store | None, moment: Moment) -> int:
        coded = values.astype(np.float16).view(np.uint8)
        out[: coded.size] = coded
        return int(coded.size)

    def decode(self, data: Bytes, out: Floats) -> None:
        out[:] = data[: 2 * out.size].view(np.float16)

    def decode_add(self, data: Bytes, out: Floats) -> None:
        out += data[: 2 * out.size].view(np.float16)


class Whole(SumCodec):
    """Sums of rows, then of columns."""

    name = "whole"
    whole = True

    def forms(self, count: int, matrices: Sequence[Matrix], ranks: int) -> tuple[Form, ...]:
        rows = sum(each.shape[0] for each in matrices)
        columns = sum(math.prod(each.shape[1:]) for each in matrices)
        return Form("float32", rows), Form("float32", columns)

    def rounds(
        self,
        values: Floats,
        arrays: Sequence[np.ndarray],
        matrices: Sequence[Matrix],
        ranks: int,
        divisor: int,
        store: Store | None,
        moment: Moment,
    ) -> Iterator[int]:
        for index, array in enumerate(arrays):
            array[:] = values.sum()
            yield index


CODECS = {"none": Half(Settings()), "half": Half(Settings()), "whole": Whole(Settings())}
SHAPES = [(300, 20), (7, 3, 3)]


@pytest.fixture(params=[0, 1, 2, 3], ids="width {}".format)
def measured(request: pytest.FixtureRequest) -> Iterator[tuple[Runtime, Layout, Measured]]:
    """Nodes of so many ranks; 0: all on one. Three leave uneven nodes, a rank without a rail."""
    topology = Topology.group(["host"] * MPI.COMM_WORLD.size, request.param)
    runtime = Runtime(MPI.COMM_WORLD.Dup(), topology, 60.0)
    comm = CommConfig()
    collectives = Collectives(runtime, comm)
    layout = Layout.of(topology, comm)
    found = probe(collectives, CODECS, layout, SHAPES)
    yield runtime, layout, found
    runtime.close()


def test_all_ranks_hold_the_same_numbers(measured: tuple[Runtime, Layout, Measured]) -> None:
    runtime, _, found = measured
    told = runtime.allgather_object(dataclasses.asdict(found))
    assert all(each == told[0] for each in told)


def test_the_numbers_are_costs(measured: tuple[Runtime, Layout, Measured]) -> None:
    runtime, layout, found = measured
    assert set(found.codecs) == {"half", "whole"}
    assert found.add_s > 0
    assert found.delay >= 0
    assert found.stretch >= 1
    if runtime.size > 1 and (layout.nodes == 1 or layout.rails * layout.nodes == runtime.size):
        assert found.link.latency_s > 0
        assert found.link.wire_s > 0
        assert found.link.cpu_s > 0
    half, whole = found.codecs["half"], found.codecs["whole"]
    assert half.nbytes == 2.0
    assert half.rounds == 0
    assert min(half.encode_s, half.decode_s, half.decode_add_s, half.combine_s) > 0
    assert whole.rounds == 2
    assert whole.nbytes == pytest.approx(4 * (300 + 20 + 7 + 9) / (6000 + 63))
    assert whole.encode_s > 0


def test_a_choice_is_made_from_them(measured: tuple[Runtime, Layout, Measured]) -> None:
    runtime, layout, found = measured

    @dataclasses.dataclass
    class Comm:
        exposed_comm_ms: float = 5.0

    tuner = Tuner(runtime, CommConfig(), ("half",), found, layout, lambda size: [Load(1 << 18)] * 4)
    seen: list[tuple[Choice, bool]] = []
    for step in range(200):
        changed = tuner.observe(0.02 + 1e-4 * (step % 3) + 1e-3 * runtime.rank, Comm())
        seen.append((tuner.choice, changed))
    told = runtime.allgather_object(seen)
    assert all(each == told[0] for each in told)
    assert tuner.settled
    assert tuner.choice.codec == "none", "steps that take as long leave the simplest"
    lines = runtime.allgather_object(tuner.line())
    assert len(set(lines)) == 1
