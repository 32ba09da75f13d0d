"""Whole training runs on the ranks of this job, against a plain torch loop."""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch import Tensor, nn

from hpcsync import assembly, data, dryrun, exchange, forecast, launch, loop, models, train
from hpcsync import config as configs
from hpcsync.config import Config
from hpcsync.launch import AgreedError
from hpcsync.observers import Observers
from hpcsync.rules import learning_rate
from hpcsync.stopping import StopSignals
from tests.tiny_runs import replaced, rows

pytestmark = pytest.mark.mpi

TINY = (
    "train.steps=6",
    "train.warmup=2",
    "train.global_batch=8",
    "train.eval_batches=2",
    "train.eval_every=3",
    "model.layers=2",
    "model.width=32",
    "model.heads=2",
    "model.context=16",
    "data.options={max_mb=0.5}",
)


def tiny(*words: str) -> list[str]:
    """``words`` and those of TINY that they do not replace."""
    return replaced(TINY, words)


def losses(run: Path) -> list[float]:
    return [float(row["loss"]) for row in rows(run)]


def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def run(folder: Path, *words: str, name: str = "run") -> Path:
    """Train a tiny model on all ranks; its run folder, once it is complete."""
    assert train.run([*tiny(*words), "--out", str(folder / name)]) == 0
    return folder / name


def plain(config: Config) -> list[float]:
    """The losses of a single process with nothing of hpcsync's but data and model."""
    source = data.build(config)
    sampler = data.Sampler(source.train_size, config.train.global_batch, config.run.seed)
    torch.manual_seed(config.run.seed)
    model = models.build(config.model, source)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        betas=(config.train.beta1, config.train.beta2),
        weight_decay=config.train.weight_decay,
    )
    found = []
    for step in range(config.train.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.train, step)
        optimizer.zero_grad()
        loss = model(*source.train_batch(sampler.indices(step)))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_norm)
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_are_those_of_one_process(
    folder: Path, comm: MPI.Intracomm, accumulate: int
) -> None:
    words = (f"train.accumulate={accumulate}", "train.steps=50")
    made = run(folder, *words)
    if comm.rank == 0:
        expected = plain(configs.load(None, tiny(*words)))
        assert losses(made) == pytest.approx(expected, rel=1e-4)
        assert expected[-1] < expected[0] - 0.5


def test_two_levels_change_no_loss(folder: Path, comm: MPI.Intracomm) -> None:
    flat = run(folder, name="flat")
    deep = run(folder, f"topology.ranks_per_node={max(1, comm.size // 2)}", name="deep")
    if comm.rank == 0:
        assert losses(deep) == pytest.approx(losses(flat), rel=1e-5)
        assert summary(deep)["nodes"] == min(2, comm.size)


def test_overlap_and_repetition_change_no_bit(folder: Path, comm: MPI.Intracomm) -> None:
    runs = [
        run(folder, *words, "comm.bucket_mb=0.05", "comm.first_bucket_mb=0.01", name=str(index))
        for index, words in enumerate([(), (), ("comm.overlap=false",)])
    ]
    if comm.rank == 0:
        first, *others = [[(row["loss"], row["grad_norm"]) for row in rows(each)] for each in runs]
        assert all(other == first for other in others)


def test_run_folder(folder: Path, comm: MPI.Intracomm) -> None:
    made = run(folder)
    if comm.rank != 0:
        return
    names = {path.name for path in made.iterdir()}
    files = {"config.toml", "summary.json", "metrics.csv", "log.jsonl"}
    assert names == {*files, "trace", "checkpoints"}
    found = summary(made)
    assert (found["status"], found["steps"], found["ranks"]) == ("done", 6, comm.size)
    assert found["val_loss"] < found["val_loss_first"]
    assert found["loss_first"] == pytest.approx(losses(made)[0])
    assert 0 <= found["overlap"] <= 1
    assert [row["val_loss"] != "" for row in rows(made)] == [False, False, True] * 2
    assert configs.load(made / "config.toml") == configs.load(None, TINY)
    events = [json.loads(line)["event"] for line in (made / "log.jsonl").read_text().splitlines()]
    assert events == ["started", "evaluated", "evaluated", "evaluated", "checkpoint", "ended"]


def test_the_largest_seed(folder: Path) -> None:
    run(folder, f"run.seed={2**63 - 1}", "train.steps=2", "model.dropout=0.1")


def test_a_run_taken_up_makes_the_same_bits(comm: MPI.Intracomm) -> None:
    config = configs.load(None, tiny("model.dropout=0.1", "train.steps=10"))

    def ten(first: assembly.State | None, steps: int) -> tuple[list[Any], assembly.State]:
        """Losses of ``steps`` steps of fresh parts that begin from ``first``, and their state."""
        with (
            launch.start(config.topology) as runtime,
            StopSignals(lambda name: None, lambda status: None) as signals,
        ):
            parts = assembly.assemble(runtime, config, signals)
            if first is not None:
                assert parts.load(first)
            made = loop.Loop(
                runtime=runtime,
                config=config,
                parts=parts,
                info=train._info(runtime, config, parts, Path(), "run"),
                observers=Observers([]),
                signals=signals,
            )
            records = [record for _ in range(steps) for record in made.step()[0]]
            state = copy.deepcopy(parts.state())
        return [(each.step, each.loss, each.grad_norm, each.lr) for each in records], state

    whole, end = ten(None, 10)
    _, middle = ten(None, 5)
    rest, again = ten(middle, 5)
    assert rest == whole[5:]
    assert again.common["sampler"] == end.common["sampler"]
    assert again.common["sampler"]["step"] == 10
    for name, value in end.common["model"].items():
        assert torch.equal(value, again.common["model"][name]), name
    for field, values in end.common["optimizer"].items():
        for name, value in values.items():
            assert torch.equal(value, again.common["optimizer"][field][name]), (field, name)


def test_held_out_loss_does_not_depend_on_the_ranks(folder: Path, comm: MPI.Intracomm) -> None:
    """All of the held-out samples, an odd number of them: shares are uneven."""
    pytest.importorskip("sklearn")
    words = ("data.name=digits", "data.options={}", "model.name=convnet", "train.eval_batches=60")
    made = run(folder, *words)
    if comm.rank == 0:
        assert summary(made)["val_unit"] == "nats"
        config = configs.load(None, tiny(*words))
        source = data.build(config)
        torch.manual_seed(config.run.seed)
        model = models.build(config.model, source).eval()
        indices = data.spread(source.val_size, source.val_size)
        with torch.no_grad():
            expected = model(*source.val_batch(indices)).item()
        assert summary(made)["val_loss_first"] == pytest.approx(expected, rel=1e-5)


class Watched(nn.Module):
    """A model that counts how often its block runs, and notes what its forward passes see."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 16)
        self.block = Counted()
        self.scales: list[float] = []

    def blocks(self) -> list[nn.Module]:
        return [self.block]

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        scores = self.block(self.table(inputs)).flatten(0, 1).float()
        loss = nn.functional.cross_entropy(scores, targets.flatten())
        if loss.requires_grad:
            loss.register_hook(lambda grad: self.scales.append(float(grad)))
        return loss


class Counted(nn.Linear):
    """Linear, with the number of its passes in training and their dtypes."""

    def __init__(self) -> None:
        super().__init__(16, 256)
        self.calls = 0
        self.dtypes: set[torch.dtype] = set()

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += self.training  # first: computed again, it stops when all is there
        made = super().forward(inputs)
        self.dtypes.add(made.dtype)
        return made


def test_bf16_checkpointing_and_a_loss_scale(
    folder: Path, comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Watched] = []

    def build(config: object, source: object) -> nn.Module:
        made.append(Watched())
        return made[-1]

    module = ModuleType("own_models")
    module.build = build  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_models", module)
    saving = ("train.activation_checkpointing=true", "train.precision=bf16")
    scaled = ("train.loss_scale=1024", "train.steps=12", "train.lr=1e-2")
    first = run(folder, "model.name=own_models:build", *scaled, name="plain")
    second = run(folder, "model.name=own_models:build", *scaled, *saving, name="saving")
    assert [model.block.dtypes for model in made] == [{torch.float32}, {torch.bfloat16}]
    assert [model.block.calls for model in made] == [12, 24]  # each computed again once
    assert [model.scales for model in made] == [[1024.0] * 12] * 2
    unscaled = run(folder, "model.name=own_models:build", "train.steps=1", name="unscaled")
    if comm.rank == 0:
        assert losses(second) == pytest.approx(losses(first), rel=0.02)
        assert losses(second)[-1] < losses(second)[0]
        assert [float(row["loss_scale"]) for row in rows(second)] == [1024.0] * 12
        norms = [float(rows(each)[0]["grad_norm"]) for each in (first, unscaled)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)  # taken out of the gradients again


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("comm.priority=true",), ("comm.priority=false",)),
        (
            ("comm.reproducible=true", "comm.bucket_mb=0.05"),
            ("comm.reproducible=true", "comm.bucket_mb=0.02"),
        ),
    ],
    ids=["priority", "bucket size"],
)
def test_what_changes_no_bit(
    folder: Path, comm: MPI.Intracomm, one: tuple[str, ...], other: tuple[str, ...]
) -> None:
    same = ("comm.first_bucket_mb=0.01", f"topology.ranks_per_node={max(1, comm.size // 2)}")
    made = [run(folder, *same, *words, name=words[-1]) for words in (one, other)]
    if comm.rank == 0:
        first, second = ([(row["loss"], row["grad_norm"]) for row in rows(each)] for each in made)
        assert first == second


@pytest.mark.parametrize("codec", ["none", "int8"])
def test_the_dry_run_tells_the_bytes_that_are_sent(
    folder: Path, comm: MPI.Intracomm, codec: str
) -> None:
    coding = (f"compress.codec={codec}", "compress.warmup=0")
    words = (f"topology.ranks_per_node={max(1, comm.size // 2)}", "model.width=64", *coding)
    made = run(folder, *words)
    if comm.rank != 0:
        return
    config = configs.load(None, tiny(*words))
    topology = dryrun.assume_topology(config, comm.size, 0)
    sizes = dryrun.measure(config, data.build(config), 1)
    plans = dryrun.plan(config, sizes)
    ratios = forecast.ratios(config, sizes, topology, plans)
    parts = exchange.exchanges(config.comm, topology, plans, ratios)
    told = exchange.traffic(topology, parts)
    assert summary(made)["internode_bytes_per_step"] == pytest.approx(
        told.node_far * topology.node_count, rel=0.02
    )
    assert {way.algorithm for way in parts} == {summary(made)["algorithm"]}
    assert summary(made)["codec"] == (codec if topology.node_count > 1 else "none")


# --- what goes wrong --------------------------------------------------------------------------


class Own(nn.Module):
    """A model of the user's own; ``act`` is called in each forward pass with its number."""

    def __init__(self, act: Callable[[int, Tensor], Tensor]) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 256)
        self.act = act
        self.calls = 0

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        scores = self.table(inputs).flatten(0, 1)
        loss = nn.functional.cross_entropy(scores, targets.flatten())
        self.calls += self.training
        return self.act(self.calls, loss) if self.training else loss


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Name a factory as a user would; ``act`` is what its forward pass does."""

    def name(act: Callable[[int, Tensor], Tensor]) -> str:
        module = ModuleType("own_models")
        module.build = lambda config, source: Own(act)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "own_models", module)
        return "model.name=own_models:build"

    return name


def test_faults_of_the_command_line_end_all_ranks(folder: Path) -> None:
    with pytest.raises(AgreedError, match=r"train\.step.*did you mean") as caught:
        train.run(["train.step=3", "comm.overlap=7", "--out", str(folder / "run")])
    assert "comm.overlap" in str(caught.value)
    with pytest.raises(AgreedError, match="command line: two decks"):
        train.run(["laptop", "digits"])
    assert not (folder / "run").exists()


def test_a_folder_that_holds_something_is_left_alone(folder: Path, comm: MPI.Intracomm) -> None:
    if comm.rank == 0:
        (folder / "mine.txt").write_text("precious")
    comm.Barrier()
    with pytest.raises(AgreedError, match="not empty"):
        train.run([*TINY, "--out", str(folder)])
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_a_factory_that_raises_on_one_rank(
    folder: Path, comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(config: object, source: object) -> nn.Module:
        if comm.rank == comm.size - 1:
            raise RuntimeError("no luck here")
        return nn.Linear(1, 1)

    module = ModuleType("own_models")
    module.build = build  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_models", module)
    with pytest.raises(AgreedError, match="no luck here") as caught:
        train.run([*TINY, "model.name=own_models:build", "--out", str(folder / "run")])
    if comm.size > 1:
        assert f"rank {comm.size - 1}" in str(caught.value)
    assert not (folder / "run").exists()


def test_a_loss_of_nan_on_one_rank(
    folder: Path,
    comm: MPI.Intracomm,
    own: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def act(call: int, loss: Tensor) -> Tensor:
        return loss * float("nan") if call == 3 and comm.rank == comm.size - 1 else loss

    made = folder / "run"
    assert train.run([*TINY, own(act), "--out", str(made)]) == 1
    told = capsys.readouterr().err
    if comm.rank == 0:
        assert told.count("\n") == 1
        assert f"step 3: the loss is nan on rank {comm.size - 1}" in told
        assert summary(made)["status"] == "failed"
        assert "nan" in summary(made)["detail"]
    else:
        assert told == ""


def test_gradients_of_inf_on_one_rank_skip_the_step_on_all(
    folder: Path, comm: MPI.Intracomm, own: Callable[..., str]
) -> None:
    def act(call: int, loss: Tensor) -> Tensor:
        if call == 2 and comm.rank == comm.size - 1:
            loss.register_hook(lambda grad: grad * float("inf"))
        return loss

    assert train.run([*TINY, own(act), "--out", str(folder / "run")]) == 0
    if comm.rank == 0:
        assert [row["skipped"] for row in rows(folder / "run")] == list("010000")
        assert summary(folder / "run")["skipped"] == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    folder: Path, comm: MPI.Intracomm, own: Callable[..., str], number: signal.Signals
) -> None:
    def act(call: int, loss: Tensor) -> Tensor:
        if call == 3 and comm.rank == comm.size - 1:
            os.kill(os.getpid(), number)
        return loss

    made = folder / "run"
    before = signal.getsignal(number)
    assert train.run([*TINY, own(act), "--out", str(made)]) == 128 + number
    assert signal.getsignal(number) is before
    if comm.rank == 0:
        found = summary(made)
        assert found["status"] == "interrupted"
        assert number.name in found["detail"]
        assert found["steps"] in (3, 4)
        assert len(rows(made)) == found["steps"]
