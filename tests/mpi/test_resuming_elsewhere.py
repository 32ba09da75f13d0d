"""Runs that go on with other ranks or nodes: what codecs held back goes along."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from hpcsync import assembly, checkpoint, launch, resuming
from hpcsync import config as configs
from hpcsync.gradients import memory
from hpcsync.stopping import StopSignals
from tests.checkpoints import make as write
from tests.tiny_runs import SIZE, TINY, numbers, replaced, run, step

pytestmark = pytest.mark.mpi


def test_other_nodes_take_over_what_codecs_held_back(folder: Path, comm: MPI.Intracomm) -> None:
    if SIZE < 4:
        pytest.skip("needs 4 ranks for two placements that both code")
    words = ("compress.codec=int8", "compress.warmup=1", "compress.min_elements=64")
    made = folder / "made"
    assert run(*words, "topology.ranks_per_node=2", "--out", str(made)) == 0
    rest = folder / "rest"
    other = ("topology.ranks_per_node=1", "--out", str(rest))
    assert run(*words, *other, "--resume", step(made, 4)) == 0
    if comm.rank == 0:
        losses = [[float(row[1]) for row in numbers(each)] for each in (made, rest)]
        assert losses[1] == pytest.approx(losses[0][4:], rel=2e-3)


def test_what_nobody_can_hold_back_any_more_is_told(
    folder: Path, comm: MPI.Intracomm, capfd: pytest.CaptureFixture[str]
) -> None:
    if SIZE < 2:
        pytest.skip("one rank sends nothing")
    words = ("compress.codec=int8", "compress.warmup=1", "compress.min_elements=64")
    made, rest = folder / "made", folder / "rest"
    assert run(*words, "topology.ranks_per_node=1", "--out", str(made)) == 0
    capfd.readouterr()
    one_node = ("topology.ranks_per_node=0", "--out", str(rest))
    assert run(*words, *one_node, "--resume", step(made, 4)) == 0
    comm.Barrier()
    told = capfd.readouterr().err
    assert ("what codecs held back is dropped" in told) == (comm.rank == 0)


@pytest.mark.parametrize("codec", ["int8", "topk"])
@pytest.mark.parametrize("ranks", [1, SIZE, SIZE + 1, 2 * SIZE + 1])
def test_nothing_that_codecs_held_back_is_lost_on_other_ranks_and_nodes(
    folder: Path, comm: MPI.Intracomm, ranks: int, codec: str
) -> None:
    """What is pending of each parameter, in units of the mean, is the same before and after."""
    if SIZE < 2:
        pytest.skip("one rank sends nothing")
    words = [f"compress.codec={codec}", "compress.warmup=1", "compress.min_elements=64"]
    words += ["compress.where=all", "train.steps=4"]
    assert run(*words, "topology.ranks_per_node=1", "--out", str(folder / "made")) == 0
    path = Path(step(folder / "other", 4))
    if comm.rank == 0:  # the same state, as if more or fewer ranks had saved it
        with checkpoint.open(step(folder / "made", 4)) as found:
            owns = [found.own(rank % SIZE) for rank in range(ranks)]
            assert found.manifest.ranks == SIZE
            write(path.parent, 4, found.common(), owns, config=found.manifest.config)
    comm.Barrier()
    # What was written has all on one node.
    config = configs.load(None, replaced(TINY, [*words, "topology.ranks_per_node=1"]))
    with launch.start(config.topology, timeout_s=30.0) as runtime:
        signals = StopSignals(lambda _: None, lambda _: None)
        parts = assembly.assemble(runtime, config, signals, fresh=False)
        with checkpoint.open(path) as found:
            resuming.take_up(runtime, config, parts, resuming.Plan(candidates=(path,)))
            reducer = parts.parallel.reducer
            before, after = (memory.Sums(reducer.layout.described) for _ in range(2))
            for rank in range(runtime.rank, ranks, SIZE):
                before.add(found.own(rank)["held"])
        after.add(parts.state().own["held"])
        errors = [sums.over(runtime)[memory.ERROR] for sums in (before, after)]
        assert any(values.any() for values in errors[0].values())
        for name, values in errors[0].items():
            np.testing.assert_allclose(errors[1][name], values, rtol=1e-4, atol=1e-8)
