"""Whole jobs that must fail well: one clear message, a status, and nothing left behind.

Every case runs ``python -m hpcsync.train`` on two ranks. That a job ends "within seconds" is held
by the launcher, which kills what takes longer and reports it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import launcher

pytestmark = [pytest.mark.usefixtures("mpi"), pytest.mark.timeout(200)]

TINY = {
    "model.layers": "1",
    "model.width": "32",
    "model.heads": "2",
    "model.context": "16",
    "train.steps": "4",
    "train.warmup": "1",
    "train.global_batch": "4",
    "train.eval_batches": "1",
}
# A model of the user's own, with a way to go wrong on rank 1; `{build}` and `{forward}` are code.
MODEL = """
import os
import signal

import torch

RANK = int(os.environ["OMPI_COMM_WORLD_RANK"])


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(256, 256)

    def forward(self, inputs, targets):
        logits = self.table(inputs)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        {forward}
        return loss


def build(config, source):
    {build}
    return Model()
"""

Train = Callable[..., launcher.Outcome]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Run a tiny training on two ranks; its run folder is ``tmp_path / "run"``."""

    def run(*arguments: str, prefix: tuple[str, ...] = (), ranks: int = 2) -> launcher.Outcome:
        return start(tmp_path, *arguments, prefix=prefix, ranks=ranks).wait(90)

    return run


def start(
    folder: Path,
    *arguments: str,
    launch: tuple[str, ...] = (),
    flags: tuple[str, ...] = (),
    prefix: tuple[str, ...] = (),
    program: tuple[str, ...] = ("-m", "hpcsync.train"),
    ranks: int = 2,
) -> launcher.Job:
    """Start a tiny training.

    ``launch`` comes before mpirun, ``flags`` are mpirun's, ``prefix`` comes before each rank.
    """
    python = [sys.executable, *program]
    command = [*launch, *launcher.mpirun(ranks, *flags), *prefix, *python]
    given = {argument.partition("=")[0] for argument in arguments}
    tiny = [f"{key}={value}" for key, value in TINY.items() if key not in given]
    out = ["--out", str(folder / "run")]
    return launcher.Job([*command, *arguments, *tiny, *out], cwd=folder)


def write_model(folder: Path, *, build: str = "pass", forward: str = "pass") -> str:
    """Write a module of the user's own into ``folder``; its name as a deck gives it."""
    (folder / "own_model.py").write_text(MODEL.format(build=build, forward=forward))
    return "model.name=own_model:build"


def assert_told(outcome: launcher.Outcome, *parts: str, status: int = 2) -> None:
    """The job failed with ``status``, with one message that holds ``parts``, and left nothing."""
    outcome.assert_clean()
    assert outcome.status == status, outcome.describe()
    assert outcome.stderr.count("hpcsync: error: ") == 1, outcome.describe()
    assert "Traceback" not in outcome.text, outcome.describe()
    message = outcome.stderr.partition("hpcsync: error: ")[2].partition("\n-----")[0]
    for part in parts:
        assert part in message, f"{part!r} is not in the message\n{outcome.describe()}"


# --- the deck ---------------------------------------------------------------------------------


def test_missing_deck(train: Train) -> None:
    assert_told(train("nowhere.toml"), "nowhere.toml")


def test_every_fault_of_a_deck_at_once(train: Train, tmp_path: Path) -> None:
    deck = tmp_path / "mine.toml"
    deck.write_text('[train]\nstep = 3\nlr = "fast"\n\n[modle]\nlayers = 2\n')
    outcome = train("mine.toml")
    assert_told(outcome, "mine.toml:2", "mine.toml:3", "mine.toml:5", "did you mean", "steps")


def test_wrong_type_on_the_command_line(train: Train) -> None:
    assert_told(train("train.lr=fast"), "train.lr")


def test_deck_that_is_not_toml(train: Train, tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("[train\nsteps = 3\n")
    assert_told(train("broken.toml"), "broken.toml")


def test_unknown_option(train: Train) -> None:
    assert_told(train("--ou"), "command line", "--ou", "--help")


def test_ranks_that_do_not_divide_the_batch(train: Train) -> None:
    outcome = train("train.global_batch=5")
    assert_told(outcome, "train.global_batch", "2 ranks")


# --- data -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text", "tokens"])
def test_data_path_that_is_missing(train: Train, name: str) -> None:
    assert_told(train(f"data.name={name}", "data.path=nowhere.dat"), "nowhere.dat")


def test_data_path_that_is_not_given(train: Train) -> None:
    assert_told(train("data.name=text"), "data.path")


@pytest.mark.parametrize("name", ["text", "tokens"])
def test_data_that_is_empty(train: Train, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty.dat").touch()
    assert_told(train(f"data.name={name}", "data.path=empty.dat"), "empty.dat")


def test_data_shorter_than_one_sample(train: Train, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    assert_told(train("data.name=text", "data.path=short.txt"), "short.txt")


@pytest.mark.parametrize("name", ["text", "tokens"])
def test_data_that_may_not_be_read(train: Train, tmp_path: Path, name: str) -> None:
    prefix: tuple[str, ...] = ()
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root reads everything, and setpriv is missing: apt-get install util-linux")
        # Root without the capability to read what its mode forbids.
        prefix = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
    path = tmp_path / "secret.dat"
    path.write_text("some text " * 1000)
    path.chmod(0)
    outcome = train(f"data.name={name}", "data.path=secret.dat", prefix=prefix)
    assert_told(outcome, "secret.dat")


def test_data_of_an_unknown_name(train: Train) -> None:
    assert_told(train("data.name=stdlip"), "stdlip", "did you mean")


# --- the model --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_package.models:build", "no_such_package"),
        ("math:no_such_factory", "no_such_factory"),
        ("gtp", "gtp"),
    ],
)
def test_model_factory_that_cannot_be_found(train: Train, name: str, said: str) -> None:
    assert_told(train(f"model.name={name}"), said)


def test_model_module_that_raises_when_imported(train: Train, tmp_path: Path) -> None:
    (tmp_path / "own_model.py").write_text("import no_such_dependency\n")
    assert_told(train("model.name=own_model:build"), "no_such_dependency")


def test_model_factory_that_raises_on_one_rank(train: Train, tmp_path: Path) -> None:
    name = write_model(tmp_path, build='if RANK == 1: raise RuntimeError("no luck here")')
    assert_told(train(name), "rank 1", "own_model:build", "no luck here")


def test_models_of_different_shapes(train: Train, tmp_path: Path) -> None:
    name = write_model(
        tmp_path,
        build="model = Model(); model.table = torch.nn.Embedding(256, 256 + RANK); return model",
    )
    assert_told(train(name), "rank 1", "the models differ between ranks", "table.weight")


def test_parameter_without_memory_on_one_rank(train: Train, tmp_path: Path) -> None:
    name = write_model(tmp_path, build='if RANK == 1: return Model().to("meta")')
    assert_told(train(name), "rank 1", "table.weight is on meta")


def test_buckets_that_one_rank_has_no_memory_for(train: Train, tmp_path: Path) -> None:
    """The error comes between two agreements of the other rank's."""
    build = (
        "import hpcsync.parallel.data_parallel as parallel\n"
        "    def fail(*_, **__): raise MemoryError\n"
        "    if RANK == 1: parallel.Reducer = fail"
    )
    outcome = train(write_model(tmp_path, build=build))
    assert_told(outcome, "rank 1 on", "buckets: out of memory", status=1)


def test_model_whose_forward_raises_on_one_rank(train: Train, tmp_path: Path) -> None:
    name = write_model(tmp_path, forward='if RANK == 1: raise KeyError("lost in step")')
    outcome = train(name)
    outcome.assert_clean()
    assert outcome.status == 1, outcome.describe()
    assert outcome.text.count("Traceback (most recent call last)") == 1, outcome.describe()
    assert re.search(r"hpcsync: rank 1 on \S+: KeyError", outcome.stderr), outcome.describe()
    assert outcome.stderr.count("KeyError: 'lost in step'") == 1
    assert "own_model.py" in outcome.stderr


def test_out_of_memory_on_one_rank(train: Train, tmp_path: Path) -> None:
    name = write_model(tmp_path, forward="if RANK == 1: torch.empty(1 << 50)")
    assert_told(train(name), "rank 1 on", "out of memory", "train.accumulate", status=1)


def test_a_rank_killed_by_the_kernel(train: Train, tmp_path: Path) -> None:
    """What the out-of-memory killer does."""
    name = write_model(tmp_path, forward="if RANK == 1: os.kill(os.getpid(), signal.SIGKILL)")
    outcome = train(name)
    outcome.assert_clean()
    assert outcome.status != 0, outcome.describe()


@pytest.mark.parametrize(
    ("guard", "ranks"), [("", "ranks 0-1"), ("if RANK == 1: ", "rank 1")], ids=["all", "one"]
)
def test_loss_of_nan(train: Train, tmp_path: Path, guard: str, ranks: str) -> None:
    name = write_model(tmp_path, forward=f'{guard}loss = loss * float("nan")')
    assert_told(train(name, "train.steps=50"), "step 1", f"nan on {ranks};", status=1)


def test_gradients_that_stay_nan(train: Train, tmp_path: Path) -> None:
    """The loss is a number, its gradient is not: such steps are skipped, but not for ever."""
    forward = "loss = loss + torch.sqrt(0 * self.table.weight[0, 0]) * (RANK == 1)"
    outcome = train(write_model(tmp_path, forward=forward), "train.max_skipped=2", "train.steps=50")
    assert_told(outcome, "train.max_skipped", status=1)


# --- the machine ------------------------------------------------------------------------------


def with_small_shared_memory(folder: Path, *arguments: str) -> launcher.Outcome:
    """A tiny training where /dev/shm holds 64 KiB."""
    small = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    aside = ("unshare", "--mount", "sh", "-c", small, "sh")
    # Open MPI's own shared memory would live there too.
    elsewhere = ("--mca", "btl_sm_backing_directory", str(folder))
    return start(folder, *arguments, launch=aside, flags=elsewhere).wait(90)


@pytest.mark.cluster
def test_shared_memory_full_where_nothing_else_is_wanted(tmp_path: Path) -> None:
    outcome = with_small_shared_memory(tmp_path, "comm.node_transport=shared_memory")
    assert_told(outcome, "comm.node_transport", "/dev/shm", "comm.node_transport=auto")


@pytest.mark.cluster
def test_shared_memory_full(tmp_path: Path) -> None:
    """A container's small /dev/shm: the job goes on over MPI and says so once."""
    outcome = with_small_shared_memory(tmp_path)
    outcome.assert_clean()
    assert outcome.status == 0, outcome.describe()
    assert outcome.stderr.count("hpcsync: warning: /dev/shm: ") == 1, outcome.describe()
    assert "mpi_host" in outcome.text


# --- signals ----------------------------------------------------------------------------------


def until_stepping(job: launcher.Job, folder: Path) -> None:
    """Wait until the job has made a few steps."""
    metrics = folder / "run" / "metrics.csv"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        if job.process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(job.wait(0.1).describe())
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_in_mid_step(tmp_path: Path, number: signal.Signals) -> None:
    """Steps that sleep: the signal comes while a rank is inside one."""
    forward = "import time; time.sleep(0.3)"
    name = write_model(tmp_path, forward=forward)
    job = start(tmp_path, name, "train.steps=10000", "train.eval_every=0")
    until_stepping(job, tmp_path)
    job.signal(number)
    outcome = job.wait(60)
    outcome.assert_clean()
    assert outcome.status not in (0, -signal.SIGKILL), outcome.describe()
    assert "Traceback" not in outcome.text, outcome.describe()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "interrupted", summary
    assert summary["steps"] > 0


def test_signal_to_one_rank(tmp_path: Path) -> None:
    """A scheduler may signal a single process: all ranks agree to stop."""
    job = start(tmp_path, write_model(tmp_path), "train.steps=1000000", "train.eval_every=0")
    until_stepping(job, tmp_path)
    ranks = [
        pid
        for pid, line in job.processes().items()
        if "-m hpcsync.train" in line and " -n 2 " not in line
    ]
    assert len(ranks) == 2
    os.kill(ranks[-1], signal.SIGTERM)
    outcome = job.wait(60)
    outcome.assert_clean()
    assert outcome.status != 0, outcome.describe()
    assert "Traceback" not in outcome.text, outcome.describe()
