"""Whole jobs that must fail well: one clear message, a status, and nothing left behind.

Every case runs ``python -m hpcsync.train`` on two ranks, those that all ranks refuse alike in one
job. That a job ends "within seconds" is held
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
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests import launcher, refused

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

# Root without the capability to read what its mode forbids, before a rank's command.
UNPRIVILEGED = (
    ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
    if os.geteuid() == 0 and shutil.which("setpriv")
    else ()
)

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
    out = ["--out", str(folder / "run")]
    return launcher.Job([*command, *arguments, *tiny(arguments), *out], cwd=folder)


def tiny(arguments: Sequence[str]) -> list[str]:
    """What makes a training tiny, but for the keys that the arguments give."""
    given = {argument.partition("=")[0] for argument in arguments}
    return [f"{key}={value}" for key, value in TINY.items() if key not in given]


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


# --- what all ranks refuse alike ----------------------------------------------------------------

# Words, and parts of what is said of them.
REFUSED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "deck missing": (("nowhere.toml",), ("nowhere.toml",)),
    "deck that is not TOML": (("broken.toml",), ("broken.toml",)),
    "wrong type on the command line": (("train.lr=fast",), ("train.lr",)),
    "unknown option": (("--ou",), ("command line", "--ou", "--help")),
    "ranks that do not divide the batch": (
        ("train.global_batch=5",),
        ("train.global_batch", "2 ranks"),
    ),
    # Where there is a driver the variable hides all that it has.
    "GPUs that no rank can use": (
        ("train.device=cuda",),
        ("train.device: cuda: ", "or set train.device=cpu"),
    ),
    "text missing": (("data.name=text", "data.path=nowhere.dat"), ("nowhere.dat",)),
    "tokens missing": (("data.name=tokens", "data.path=nowhere.dat"), ("nowhere.dat",)),
    "data path not given": (("data.name=text",), ("data.path",)),
    "text empty": (("data.name=text", "data.path=empty.dat"), ("empty.dat",)),
    "tokens empty": (("data.name=tokens", "data.path=empty.dat"), ("empty.dat",)),
    "text that may not be read": (("data.name=text", "data.path=secret.dat"), ("secret.dat",)),
    "tokens that may not be read": (("data.name=tokens", "data.path=secret.dat"), ("secret.dat",)),
    "data shorter than one sample": (("data.name=text", "data.path=short.txt"), ("short.txt",)),
    "data of an unknown name": (("data.name=stdlip",), ("stdlip", "did you mean")),
    "no such package": (("model.name=no_such_package.models:build",), ("no_such_package",)),
    "no such factory": (("model.name=math:no_such_factory",), ("no_such_factory",)),
    "no such model": (("model.name=gtp",), ("gtp",)),
    "a module that raises when imported": (
        ("model.name=needs_more:build",),
        ("no_such_dependency",),
    ),
    "models of different shapes": (
        ("model.name=own_model:build",),
        ("rank 1", "the models differ between ranks", "table.weight"),
    ),
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What two ranks tell of each, in one job."""
    if reason := launcher.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("refused")
    (folder / "broken.toml").write_text("[train\nsteps = 3\n")
    (folder / "empty.dat").touch()
    (folder / "short.txt").write_text("too short")
    (folder / "secret.dat").write_text("some text " * 1000)
    (folder / "secret.dat").chmod(0)
    (folder / "needs_more.py").write_text("import no_such_dependency\n")
    write_model(
        folder,
        build="model = Model(); model.table = torch.nn.Embedding(256, 256 + RANK); return model",
    )
    cases = {name: (*words, *tiny(words)) for name, (words, _) in REFUSED.items()}
    return refused.told(folder, cases, prefix=UNPRIVILEGED)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_told(refusals: dict[str, str], name: str) -> None:
    if "may not be read" in name and os.geteuid() == 0 and not UNPRIVILEGED:
        pytest.skip("root reads everything, and setpriv is missing: apt-get install util-linux")
    for part in REFUSED[name][1]:
        assert part in refusals[name], f"{part!r} is not in the message\n{refusals[name]}"


def test_every_fault_of_a_deck_at_once(train: Train, tmp_path: Path) -> None:
    deck = tmp_path / "mine.toml"
    deck.write_text('[train]\nstep = 3\nlr = "fast"\n\n[modle]\nlayers = 2\n')
    outcome = train("mine.toml")
    assert_told(outcome, "mine.toml:2", "mine.toml:3", "mine.toml:5", "did you mean", "steps")


def test_transports_of_gpus_where_ranks_compute_on_the_host(train: Train) -> None:
    outcome = train("comm.transport.node=nccl")
    assert_told(outcome, "comm.transport.node: nccl joins the memory of GPUs", "node=auto")
    assert "MPI_ABORT" not in outcome.text, outcome.describe()


# --- the model --------------------------------------------------------------------------------


def test_model_factory_that_raises_on_one_rank(train: Train, tmp_path: Path) -> None:
    name = write_model(tmp_path, build='if RANK == 1: raise RuntimeError("no luck here")')
    assert_told(train(name), "rank 1", "own_model:build", "no luck here")


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
    outcome = with_small_shared_memory(tmp_path, "comm.transport.node=shared_memory")
    assert_told(outcome, "comm.transport.node", "/dev/shm", "comm.transport.node=auto")


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
