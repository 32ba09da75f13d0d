"""sbatch slurm/train.sh on a real Slurm: to the end, stopped, requeued, failed, refused."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hpcsync import checkpoint
from tests import launcher
from tests.slurm.cluster import FINAL, SlurmCluster, SlurmError, Submitted

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.usefixtures("mpi"),
    pytest.mark.timeout(600),
]

SCRIPTS = launcher.ROOT / "slurm"
STEPS = 60
DECK = f"""
[train]
steps = {STEPS}
global_batch = 8
warmup = 2
eval_every = 20
eval_batches = 1
[model]
name = "paced:build"
layers = 1
width = 32
heads = 2
context = 16
[data]
options = {{ max_mb = 0.5 }}
[checkpoint]
every = 5
[trace]
enabled = false
"""
# The same model whatever it is told: slow until the job has been started again, or raising.
PACED = '''
"""gpt, as slow as PACE_S says until the file PACE_UNTIL is there; PACE_RAISES on rank 1."""
import os
import time
from pathlib import Path
from hpcsync.models import gpt

PACE_S = float(os.environ.get("PACE_S", "0"))
STEPS = 0

def pace(module, inputs):
    global STEPS
    STEPS += 1
    if "PACE_RAISES" in os.environ and STEPS > 5 and os.environ["SLURM_PROCID"] == "1":
        raise RuntimeError("planted on purpose")
    if PACE_S and not Path(os.environ["PACE_UNTIL"]).exists():
        time.sleep(PACE_S)

def build(config, source):
    model = gpt.build(config, source)
    model.register_forward_pre_hook(pace)
    return model
'''
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2")
TWO_BY_ONE = ("--nodes=2", "--ntasks-per-node=1")
# Named, no plug-in has to be tried by a step of its own.
PMIX = {"HPCSYNC_MPI": "pmix"}


class Site:
    """A user's folder on the cluster."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self._jobs: list[Submitted] = []
        (folder / "deck.toml").write_text(DECK)
        (folder / "paced.py").write_text(PACED)

    def submit(
        self, *words: str, script: str = "train.sh", deck: bool = True, **env: str
    ) -> Submitted:
        paths = os.pathsep.join([str(self.folder), str(launcher.ROOT)])
        given = {"PYTHONPATH": paths, "PACE_UNTIL": str(self.folder / "go"), **env}
        options = [word for word in words if word.startswith("--")]
        more = [word for word in words if not word.startswith("--")]
        words = (*options, str(SCRIPTS / script), *(["deck.toml"] if deck else []), *more)
        self._jobs.append(self.cluster.submit(*words, cwd=self.folder, env=given))
        return self._jobs[-1]

    def close(self) -> None:
        """End what a failed test has left: a paced job is requeued for ever."""
        for job in self._jobs:
            job.cancel()

    def run(self, job: Submitted) -> Path:
        return self.folder / "runs" / f"hpcsync-{job.number}"


def rows(run: Path) -> list[dict[str, str]]:
    try:
        with (run / "metrics.csv").open(newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


def curve(run: Path) -> list[tuple[str, ...]]:
    return [tuple(row[name] for name in ("step", "loss", "val_loss")) for row in rows(run)]


def steps(run: Path, least: int) -> Callable[[], bool]:
    return lambda: len(rows(run)) >= least


def same_bits(one: Path, other: Path) -> None:
    """Both ended with the same weights, optimizer and generators, after the same losses."""
    assert curve(one) == curve(other)
    name = f"checkpoints/step-{STEPS:08d}"
    with checkpoint.open(one / name) as a, checkpoint.open(other / name) as b:
        assert list(a.manifest.tensors) == list(b.manifest.tensors)
        for tensor in a.manifest.tensors:
            assert torch.equal(a.tensor(tensor), b.tensor(tensor)), tensor
        assert a.manifest.own == b.manifest.own


@pytest.fixture
def site(slurm: SlurmCluster, tmp_path: Path) -> Iterator[Site]:
    made = Site(slurm, tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def unbroken(running: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a job that nothing happened to."""
    site = Site(running, tmp_path_factory.mktemp("unbroken"))
    job = site.submit(*TWO_BY_TWO)
    facts = job.wait()
    assert facts["JobState"] == "COMPLETED", job.describe()
    (site.folder / "log").write_text(job.log())
    return site.run(job)


def test_to_the_end(unbroken: Path) -> None:
    assert len(rows(unbroken)) == STEPS
    summary = json.loads((unbroken / "summary.json").read_text())
    assert (summary["status"], summary["ranks"], summary["nodes"]) == ("done", 4, 2)
    site = unbroken.parents[1]
    log = (site / f"{unbroken.name}.log").read_text()
    assert "4 ranks on 2 nodes, CPUs each: 1, by srun --mpi=pmix" in log
    assert "ranks       4 ranks on 2 nodes (2 x 2)" in log
    if len(os.sched_getaffinity(0)) >= 2:
        assert "binding     cores 0 | 1 on each of 2 nodes" in log


def test_by_mpirun(site: Site, unbroken: Path) -> None:
    job = site.submit(*TWO_BY_TWO, HPCSYNC_LAUNCHER="mpirun")
    assert job.wait()["JobState"] == "COMPLETED", job.describe()
    log = job.log()
    assert "by mpirun" in log
    assert "ranks       4 ranks on 2 nodes (2 x 2)" in log
    same_bits(site.run(job), unbroken)


def test_a_time_limit_saves_requeues_and_resumes_to_the_same_bits(
    site: Site, unbroken: Path
) -> None:
    # Slurm looks at limits twice a minute, so that it comes in the first half minute of three.
    limit = ("--time=5", "--signal=B:USR1@285")
    job = site.submit(*TWO_BY_TWO, *limit, PACE_S="1", **PMIX)
    job.wait_for(lambda: job.facts()["Restarts"] != "0")
    (site.folder / "go").touch()
    # With that limit each start would be short of time, and on a slow machine there would be many.
    site.cluster.command("scontrol", "update", f"jobid={job.number}", "timelimit=60")
    facts = job.wait()
    assert facts["JobState"] == "COMPLETED", job.describe()
    assert facts["ExitCode"] == "0:0"
    log = job.log()
    assert "the time limit is near: the ranks save and leave" in log
    assert "stopped by SIGUSR2, to be resumed" in log
    assert f"saved; job {job.number} is in the queue again" in log
    assert "goes on after step " in log
    same_bits(site.run(job), unbroken)


def test_a_site_that_does_not_requeue(site: Site) -> None:
    job = site.submit("--no-requeue", *TWO_BY_ONE, PACE_S="0.3", **PMIX)
    job.wait_for(steps(site.run(job), 2))
    site.cluster.command("scancel", "--batch", "--signal=USR1", str(job.number))
    facts = job.wait()
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "75:0"), job.describe()
    assert f"submit the same again with run.name=hpcsync-{job.number}" in job.log()
    again = site.submit(*TWO_BY_ONE, f"run.name=hpcsync-{job.number}", **PMIX)
    assert again.wait()["JobState"] == "COMPLETED", again.describe()
    assert "goes on after step " in again.log()
    assert len(rows(site.run(job))) == STEPS


@pytest.mark.parametrize("how", ["srun", "mpirun"])
def test_scancel(site: Site, how: str) -> None:
    plugin = PMIX if how == "srun" else {}
    job = site.submit(*TWO_BY_ONE, PACE_S="0.3", HPCSYNC_LAUNCHER=how, **plugin)
    job.wait_for(steps(site.run(job), 2))
    site.cluster.command("scancel", str(job.number))
    assert job.wait()["JobState"] == "CANCELLED", job.describe()
    # Written when the signal comes, since mpirun does not wait for its ranks.
    summary = json.loads((site.run(job) / "summary.json").read_text())
    assert summary["status"] == "interrupted", job.describe()
    if how == "srun":
        assert "stopped by SIGTERM" in job.log(), job.describe()
    made = sorted((site.run(job) / "checkpoints").glob("step-*"))
    assert made or how == "mpirun"
    for each in made:
        with checkpoint.open(each) as found:
            assert found.verify() == []


def test_a_node_that_goes_down(site: Site, unbroken: Path) -> None:
    job = site.submit(*TWO_BY_TWO, PACE_S="0.3", **PMIX)
    job.wait_for(steps(site.run(job), 7))
    (lost,) = site.cluster.command(
        "scontrol", "show", "hostnames", job.facts()["NodeList"]
    ).split()[1:]
    node = f"nodename={lost}"
    site.cluster.command("scontrol", "update", node, "state=down", "reason=test")
    try:
        job.wait_for(lambda: job.facts()["Restarts"] != "0")
        (site.folder / "go").touch()
        facts = job.wait()
    finally:
        with contextlib.suppress(SlurmError):  # unless its slurmd has told that it is there
            site.cluster.command("scontrol", "update", node, "state=resume")
    assert facts["JobState"] == "COMPLETED", job.describe()
    assert "goes on after step " in job.log()
    same_bits(site.run(job), unbroken)


def test_a_rank_that_raises(site: Site) -> None:
    job = site.submit(*TWO_BY_ONE, PACE_RAISES="1", **PMIX)
    facts = job.wait()
    assert facts["JobState"] == "FAILED", job.describe()
    assert facts["Restarts"] == "0"
    log = job.log()
    assert log.count("RuntimeError: planted on purpose") == 1, log
    assert "rank 1 on node2" in log
    assert json.loads((site.run(job) / "summary.json").read_text())["status"] != "done"


def test_a_deck_with_an_error(site: Site) -> None:
    job = site.submit(*TWO_BY_ONE, "train.lr=fast", **PMIX)
    facts = job.wait()
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "2:0"), job.describe()
    log = job.log()
    assert log.count("hpcsync: error: ") == 1, log
    assert "train.lr" in log
    assert "Traceback" not in log
    assert not site.run(job).exists()


def test_srun_without_an_mpi_plugin_is_told(site: Site) -> None:
    job = site.submit(*TWO_BY_ONE, HPCSYNC_MPI="none")
    facts = job.wait()
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "2:0"), job.describe()
    log = job.log()
    assert "srun started 2 processes (SLURM_STEP_NUM_TASKS), but each of them is alone" in log
    assert not site.run(job).exists()


def test_what_does_not_work_is_not_taken(site: Site) -> None:
    """A site whose plug-ins do not fit its MPI: mpirun takes over."""
    settings = site.folder / "odd.env"
    settings.write_text("mpi_plugins=none\n")
    job = site.submit(*TWO_BY_ONE, "train.steps=3", HPCSYNC_SITE=str(settings))
    assert job.wait()["JobState"] == "COMPLETED", job.describe()
    assert "ranks do not find each other by srun --mpi=none" in job.log()
    assert "by mpirun" in job.log()


def test_a_chain(site: Site, unbroken: Path) -> None:
    job = site.submit("--array=1-4%1", *TWO_BY_TWO, script="chain.sh", PACE_S="0.3", **PMIX)
    run = site.run(job)
    job.wait_for(steps(run, 2))
    link = site.cluster.facts(f"{job.number}_1")["JobId"]
    with contextlib.suppress(SlurmError):  # of array jobs it says so for signals that arrive
        site.cluster.command("scancel", "--batch", "--signal=USR1", link)
    wait_until(lambda: "link 2 of 4" in job.log(), job)
    (site.folder / "go").touch()
    wait_until(lambda: state(site, job, 2) in FINAL, job)
    assert [state(site, job, link) for link in (1, 2)] == ["COMPLETED"] * 2, job.describe()
    wait_until(lambda: not site.cluster.command("squeue", "--noheader").strip(), job)
    assert "link 3" not in job.log()
    assert job.log().count("saved; the next link goes on from there") == 1
    same_bits(run, unbroken)


def state(site: Site, job: Submitted, link: int) -> str:
    return site.cluster.facts(f"{job.number}_{link}")["JobState"]


def wait_until(ready: Callable[[], bool], job: Submitted, timeout: float = 240.0) -> None:
    until = time.monotonic() + timeout
    while not ready():
        assert time.monotonic() < until, job.describe()
        time.sleep(0.2)


def test_a_script_of_ones_own(site: Site) -> None:
    own = site.folder / "own.py"
    own.write_text("import hpcsync\nhpcsync.init()\nprint('own', hpcsync.rank(), hpcsync.size())\n")
    job = site.submit(*TWO_BY_ONE, "own.py", deck=False, **PMIX)
    assert job.wait()["JobState"] == "COMPLETED", job.describe()
    assert sorted(line for line in job.log().splitlines() if line.startswith("own")) == [
        f"own {rank} 2" for rank in range(2)
    ]


def test_the_benchmark(site: Site) -> None:
    words = ("--nodes=2", "--ntasks-per-node=1")
    job = site.cluster.submit(
        *(*words, str(SCRIPTS / "bench.sh"), "--sizes", "64K", "--only", "auto,mpi"),
        *("--rounds", "2", "--calls", "2"),
        cwd=site.folder,
    )
    assert job.wait()["JobState"] == "COMPLETED", job.describe()
    assert "busbw" in job.log()


# Python runs it at its start: on one node each copy in memory is done eight times.
SLOWED = """
import socket, sys
if socket.gethostname() == "node2" and "hpcsync.preflight" in sys.orig_argv:
    from hpcsync.preflight import compute
    once = compute.Bench._copy
    compute.Bench._copy = lambda bench: [once(bench) for _ in range(8)][0]
"""


def test_preflight_names_the_slowed_node(site: Site) -> None:
    path = site.folder / "slowed"
    path.mkdir()
    (path / "sitecustomize.py").write_text(SLOWED)
    job = site.cluster.submit(
        *("--nodes=3", "--ntasks-per-node=1", str(SCRIPTS / "preflight.sh"), "--slow", "0.4"),
        cwd=site.folder,
        env={"PYTHONPATH": os.pathsep.join([str(path), str(launcher.ROOT)])},
    )
    facts = job.wait()
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "4:0"), job.describe()
    log = job.log()
    assert "slow: node2: memory" in log, job.describe()
    (line,) = [line for line in log.splitlines() if line.startswith("--exclude=")]
    assert "node2" in line.partition("=")[2].split(","), job.describe()
    # Its words are Slurm's: the next job goes without that node.
    again = site.cluster.submit("--nodes=1", line, "--wrap=hostname", cwd=site.folder)
    again.wait()
    assert again.log().strip() != "node2"


def test_preflight(site: Site) -> None:
    job = site.cluster.submit(
        # Its nodes share a machine, whose noise is no slow node.
        *("--nodes=2", "--ntasks-per-node=1", str(SCRIPTS / "preflight.sh"), "--slow", "0.001"),
        cwd=site.folder,
    )
    facts = job.wait()
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), job.describe()
    log = job.log()
    for text in ("2 ranks on 2 nodes", "node1", "node2", ", none wrong", "no node is named"):
        assert text in log, job.describe()
    for text in ("FAILED", "wrong:", "slow:"):
        assert text not in log, job.describe()
    assert (site.folder / "hpcsync-costs.json").exists()
