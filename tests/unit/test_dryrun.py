"""The dry run: any size on any machine, without MPI."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hpcsync import config as configs
from hpcsync import data, dryrun, exchange, forecast, models, peak
from hpcsync.collectives import choice
from hpcsync.config import CommConfig
from hpcsync.device import dtype_of
from hpcsync.errors import LaunchError, ModelError, UserError
from hpcsync.topology import Topology

ROOT = Path(__file__).resolve().parents[2]


def report(*words: str, ranks: int = 1, nodes: int = 0) -> str:
    return dryrun.report(configs.load(None, ["data.options={max_mb=0.5}", *words]), ranks, nodes)


def test_it_needs_no_mpi() -> None:
    code = (
        "import sys; sys.modules['mpi4py'] = None\n"
        "from hpcsync.train import main\n"
        "main(['--dry-run', '--ranks', '512', '--nodes', '64', 'train.global_batch=512'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "512 ranks on 64 nodes (64 x 8)" in done.stdout
    assert not done.stderr


def test_a_model_that_no_machine_holds() -> None:
    text = report("model.layers=96", "model.width=12288", "model.heads=96", "model.context=2048")
    assert "174 billion parameters" in text
    assert "optimizer" in text


def test_memory_is_that_of_the_real_model() -> None:
    config = configs.load(None, ["data.options={max_mb=0.5}"])
    source = data.build(config)
    sizes = dryrun.measure(config, source, 2)
    model = models.build(config.model, source)
    assert sizes.counts == models.parameter_counts(model)
    assert sum(p.numel for p in sizes.parameters) == sizes.counts.trainable
    assert sizes.activations is not None
    more = dryrun.measure(config, source, 4).activations
    assert more is not None
    assert 1.8 < more / sizes.activations <= 2.0


def test_what_saves_memory_is_seen() -> None:
    def activations(*words: str) -> int:
        config = configs.load(None, ["data.options={max_mb=0.5}", *words])
        found = dryrun.measure(config, data.build(config), 4).activations
        assert found is not None
        return found

    full = activations()
    assert activations("train.precision=bf16") < full
    assert activations("train.activation_checkpointing=true") < full / 2


def test_data_that_is_not_here_is_assumed() -> None:
    config = configs.load(None, ["data.name=tokens", "data.path=/nowhere/tokens.h5"])
    text = dryrun.report(config, 2)
    assert "NOT FOUND HERE" in text
    assert "/nowhere/tokens.h5" in text


def test_a_model_of_the_users_own_that_looks_at_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "curious_model.py").write_text(
        "import torch\n"
        "class Model(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.table = torch.nn.Embedding(256, 8)\n"
        "    def forward(self, inputs, targets):\n"
        "        return self.table(inputs).sum() * (1 if inputs.sum().item() else 2)\n"
        "def build(config, source):\n"
        "    return Model()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "does not run without values" in report("model.name=curious_model:build")


def test_blocks_that_take_more_than_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blocky_model.py").write_text(
        "import torch\n"
        "class Block(torch.nn.Linear):\n"
        "    def forward(self, mask, *, values):\n"
        "        return super().forward(values).tanh()\n"
        "class Model(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.table, self.block = torch.nn.Embedding(256, 8), Block(8, 8)\n"
        "    def blocks(self):\n"
        "        return [self.block]\n"
        "    def forward(self, inputs, targets):\n"
        "        return self.block(None, values=self.table(inputs)).mean()\n"
        "def build(config, source):\n"
        "    return Model()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    text = report("model.name=blocky_model:build", "train.activation_checkpointing=true")
    assert re.search(r"activations +[\d.]+ KiB", text), text


def test_faults() -> None:
    with pytest.raises(UserError, match=r"train\.global_batch"):
        report(ranks=7)
    with pytest.raises(LaunchError, match="8 nodes for 4 ranks"):
        report(ranks=4, nodes=8)
    with pytest.raises(ModelError, match="no_such_model"):
        report("model.name=no_such_model")


def test_weights_to_begin_with_are_looked_at(tmp_path: Path) -> None:
    """They must be the model's, which has no memory here."""
    words = ("model.name=mlp", "model.layers=1", "data.name=digits")
    config = configs.load(None, [*words, "model.hidden=8"])
    there = tmp_path / "w.pt"
    torch.save(models.build(config.model, data.build(config)).state_dict(), there)
    given = f"model.init_from={there}"
    assert "model" in report(*words, "model.hidden=8", given)
    with pytest.raises(ModelError, match="does not fit the model"):
        report(*words, "model.hidden=9", given)
    with pytest.raises(ModelError, match="no such file"):
        report(*words, f"model.init_from={there}x.pt")


def test_ranks_are_placed_block_by_block() -> None:
    config = configs.load(None, ["topology.ranks_per_node=4"])
    assert dryrun.assume_topology(config, 8, 0).nodes == ((0, 1, 2, 3), (4, 5, 6, 7))
    config = configs.load(None)
    assert dryrun.assume_topology(config, 6, 0).node_count == 1
    sizes = [len(ranks) for ranks in dryrun.assume_topology(config, 512, 100).nodes]
    assert sum(sizes) == 512
    assert set(sizes) == {5, 6}


@pytest.mark.parametrize("per_node", [1, 2, 8])
def test_hierarchical_bytes_follow_the_formula(per_node: int) -> None:
    """Each node's link carries 2 (N - 1)/N of the buffer each way, whatever its ranks."""
    nodes, nbytes = 4, 1e6
    topology = Topology.group([f"n{rank // per_node}" for rank in range(nodes * per_node)])
    for rail in ("direct", "ring", "halving", "native"):
        moved = exchange.traffic(topology, {exchange.Way("hierarchical", rail): nbytes})
        assert moved.node_far == pytest.approx(2 * (nodes - 1) / nodes * nbytes)
        assert moved.rank_far == pytest.approx(moved.node_far / per_node)
        assert moved.rank_near == pytest.approx(2 * (per_node - 1) / per_node * nbytes)


@pytest.mark.parametrize("algorithm", ["direct", "ring", "halving", "doubling", "native"])
def test_flat_bytes(algorithm: str) -> None:
    one_node = exchange.traffic(Topology.group(["a"] * 4), {exchange.Way(algorithm): 1e6})
    assert one_node.rank_far == one_node.node_far == 0
    assert one_node.rank_near == pytest.approx(2e6 if algorithm == "doubling" else 1.5e6)
    two_nodes = exchange.traffic(
        Topology.group(["a", "a", "b", "b"]), {exchange.Way(algorithm): 1e6}
    )
    assert two_nodes.node_far > 0


def test_uneven_nodes() -> None:
    uneven = Topology.group(["a", "a", "a", "b", "b"])
    moved = exchange.traffic(uneven, {exchange.Way("hierarchical", "direct"): 1e6})
    assert moved.node_far == pytest.approx(1e6)


def test_the_rails_algorithm_is_chosen_by_the_segment() -> None:
    """As the run does: what a segment's shard weighs decides, not the number of nodes."""
    config = configs.load(None, ["data.options={max_mb=0.5}", "comm.segment_mb=0.25"])
    topology = Topology.group([f"n{rank // 2}" for rank in range(64)])
    plans = dryrun.plan(config, dryrun.measure(config, data.build(config), 1))
    parts = exchange.exchanges(config.comm, topology, plans)
    assert sum(parts.values()) == sum(plan.nbytes for plan in plans)
    small = choice.rail_algorithm(config.comm, 32, 1 << 17, dtype_of("float32"))
    assert parts.most_common()[0][0] == exchange.Way("hierarchical", small)
    assert exchange.exchanges(CommConfig(reproducible=True), topology, plans).keys() == {
        exchange.Way("direct")
    }


def test_what_receives_messages_is_counted() -> None:
    two = Topology.group(["a", "a", "b", "b"])
    parts = {exchange.Way("hierarchical", "direct"): 1e6}
    assert exchange.scratch(CommConfig(), two, parts) == pytest.approx(1e6 / 4)
    assert exchange.scratch(CommConfig(), two, {exchange.Way("direct"): 1e6}) == pytest.approx(
        3e6 / 4
    )
    one = Topology.group(["a"] * 4)
    assert exchange.scratch(CommConfig(), one, {exchange.Way("direct"): 1e6}) == 0
    over_mpi = CommConfig(node_transport="mpi_host")
    assert exchange.scratch(over_mpi, one, {exchange.Way("direct"): 1e6}) == pytest.approx(3e6 / 4)


def test_a_device_holds_only_the_messages_on_the_way() -> None:
    two = Topology.group(["a", "a", "b", "b"])
    parts = {exchange.Way("hierarchical", "direct"): float(1 << 30)}
    comm = CommConfig(credit_mb=16)
    assert exchange.scratch(comm, two, parts, device=True) == 2 * (16 << 20) / 4
    few = {exchange.Way("hierarchical", "direct"): 1e6}
    assert exchange.scratch(comm, two, few, device=True) == pytest.approx(1e6 / 4)
    staged = CommConfig(credit_mb=16, node_transport="mpi_staged")
    more = 2 * (16 << 20) * (1 / 4 + 1 / 2)
    assert exchange.scratch(staged, two, parts, device=True) == pytest.approx(more)


def test_many_ranks_are_not_taken_to_be_on_one_node() -> None:
    text = report("train.global_batch=512", ranks=512)
    assert "512 ranks assumed on 64 nodes of 8; give --nodes to say otherwise" in text
    assert "between nodes" in text
    assert "cpu; or GPUs where every rank has one" in text
    assert "assumed" not in report("train.global_batch=512", ranks=512, nodes=32)
    assert "assumed" not in report("train.global_batch=512", "topology.ranks_per_node=4", ranks=512)
    assert "assumed" not in report(ranks=8)


@pytest.mark.parametrize(
    ("codec", "least", "most"),
    [("bf16", 0.5, 0.51), ("int8", 0.25, 0.27), ("int8_shared", 0.25, 0.3), ("powersgd", 0.0, 0.2)],
)
def test_coded_bytes_are_told(codec: str, least: float, most: float) -> None:
    topology = Topology.group([f"n{rank // 2}" for rank in range(4)])

    def far(*overrides: str) -> float:
        config = configs.load(None, ["data.options={max_mb=0.5}", *overrides])
        sizes = dryrun.measure(config, data.build(config), 1)
        plans = dryrun.plan(config, sizes)
        ratios = forecast.ratios(config, sizes, topology, plans)
        where = config.compress.where
        parts = exchange.exchanges(config.comm, topology, plans, ratios, where)
        return exchange.traffic(topology, parts).node_far

    plain = far()
    for where in ("rail", "all"):
        ratio = far(f"compress.codec={codec}", f"compress.where={where}") / plain
        assert least <= ratio / (1 if where == "rail" else 2) <= most


def test_memory_of_a_gpu() -> None:
    host, text = report(ranks=4), report("train.device=cuda", ranks=4)
    assert "cuda: a GPU for each rank" in text
    assert "/dev/shm" in host
    assert "/dev/shm" not in text
    assert re.search(r"a GPU +\d.* and CUDA's own", text)
    for name in ("copies", "workspace"):
        assert re.search(rf"\b{name} +[\d.]+ [KM]iB", text), text
        assert name not in host
    assert "copies" not in report("train.device=cuda", "comm.transport.node=mpi_staged", ranks=4)
    assert re.search(r"devices +cpu\n", report("train.device=cpu", ranks=4))


@pytest.mark.parametrize("where", ["rail", "all"])
@pytest.mark.parametrize("feedback", [True, False])
def test_memory_of_codecs_is_counted(where: str, feedback: bool) -> None:
    topology = Topology.group([f"n{rank // 2}" for rank in range(4)])
    share = 2 if where == "rail" else 1

    def parts(*overrides: str) -> tuple[int, dict[str, float]]:
        config = configs.load(None, ["data.options={max_mb=0.5}", *overrides])
        sizes = dryrun.measure(config, data.build(config), 1)
        plans = dryrun.plan(config, sizes)
        ways = dryrun.ways(config, sizes, topology, plans)
        found = dryrun.memory_parts(config, sizes, topology, 1, ways, device=True)
        return sum(plan.coded_numel for plan in plans), {name: n for name, n, _ in found}

    _, plain = parts()
    assert (plain["errors"], plain["coded"]) == (0, 0)
    keep = f"compress.error_feedback={str(feedback).lower()}"
    for codec, nbytes in (("int8", 1), ("bf16", 2), ("powersgd", None)):
        if codec == "powersgd" and not feedback:
            continue
        count, found = parts(f"compress.codec={codec}", f"compress.where={where}", keep)
        assert count > 0
        assert found["errors"] == (4 * count / share if feedback else 0)
        if nbytes:
            assert found["coded"] == pytest.approx(3 * nbytes * count / share, rel=0.05)


def test_a_coded_run_is_predicted() -> None:
    deck = ["model.layers=2", "model.width=64", "model.heads=2", "compress.codec=int8"]
    config = configs.load(None, deck)
    source, _ = dryrun.find_data(config)
    topology = Topology.group(["a", "a", "b", "b"])
    plain = peak.predicted(configs.load(None, deck[:-1]), topology, source)
    coded = peak.predicted(config, topology, source)
    assert plain is not None
    assert coded is not None
    assert coded > plain


def test_a_prediction_is_compared() -> None:
    config = configs.load(None, ["model.layers=2", "model.width=32", "model.heads=2"])
    source, _ = dryrun.find_data(config)
    expected = peak.predicted(config, Topology.group(["a"] * 2), source)
    assert expected is not None
    assert expected > 32 << 20
    assert not peak.told(expected, expected, "rank 1 on b")
    assert not peak.told(expected * 1.2, expected, "rank 1 on b")
    for found in (expected / 2, expected * 2):
        assert "warning: rank 1 on b took up to" in peak.told(found, expected, "rank 1 on b")


def test_a_prediction_that_fails_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configs.load(None, ["model.layers=1", "model.width=32", "model.heads=2"])
    source, _ = dryrun.find_data(config)
    monkeypatch.setattr(forecast, "memory_parts", lambda *given, **named: 1 // 0)
    assert peak.predicted(config, Topology.group(["a"] * 2), source) is None
