"""Start jobs under mpirun from tests, and see that they leave nothing behind.

Every job is started with a mark of its own in its environment. Whatever process still carries the
mark when the job is over was left behind; so was any new file of ours in /dev/shm.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tools.bootstrap import is_open_mpi, mpirun_command, mpirun_environment

ROOT = Path(__file__).resolve().parent.parent
SHM = Path("/dev/shm")
SHM_PREFIX = "hpcsync-"
MARK = "HPCSYNC_TEST_JOB"
# How long what is on its way out may take before it counts as left behind.
GRACE_S = 10.0
# How long a job that did not end has to print its stacks.
STACKS_S = 3.0
# Where Open MPI's launcher fails now and then by itself, before anything of ours has begun: it
# starts no process, or a rank waits within MPI_Init for ever: its stack ends where Python
# initialises a module written in C.
_LAUNCHERS = ("mpirun", "prterun")
_NEVER_BEGAN = re.compile(
    r"\(most recent call first\):\n"
    r'  File "<frozen importlib._bootstrap>", line \d+ in _call_with_frames_removed\n'
)
# Where Open MPI's launcher keeps the folder of its session, which is called by its process id. One
# that is killed leaves it there, and a later one of that id would not start.
SESSIONS = "PRTE_MCA_prte_tmpdir_base"


def find_mpirun() -> str | None:
    """The mpirun beside this Python, else the first on PATH, else None."""
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun")


def missing() -> str | None:
    """What a test that starts MPI jobs lacks here, in words; None if nothing."""
    if find_mpirun() is None:
        return "mpirun is missing: pip install 'hpcsync[mpi]', or load the site's MPI"
    return None


def needed(mark: str) -> bool:
    """Whether tests of this mark must not be skipped here."""
    return mark in os.environ.get("HPCSYNC_NEED", "").split(",")


def mpirun(ranks: int, *flags: str) -> list[str]:
    """The start of a command line that runs ``ranks`` ranks on this machine."""
    found = find_mpirun()
    assert found is not None, missing()
    # One node: shared memory only, so that no firewall or odd interface has a say.
    node = ["--mca", "pml", "ob1", "--mca", "btl", "self,sm"] if is_open_mpi(found) else []
    return [*mpirun_command(found, ranks), *node, *flags]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, less any MPI job it belongs to, with the checkout importable."""
    strangers = ("OMPI_", "PMIX_", "PRTE_", "PMI_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(strangers)}
    env = mpirun_environment(env)
    paths = [str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
    env.update(PYTHONPATH=os.pathsep.join(paths), OMP_NUM_THREADS="1", PYTHONFAULTHANDLER="1")
    env.update(extra or {})
    return env


def shared_memory() -> set[str]:
    """Names of hpcsync's segments in /dev/shm."""
    if not SHM.is_dir():
        return set()
    return {entry.name for entry in SHM.iterdir() if entry.name.startswith(SHM_PREFIX)}


def _strangers(names: set[str], ours: Collection[int]) -> set[str]:
    """Those segments that a living process outside the job has made: hpcsync-PID-..."""
    found = set()
    for name in names:
        maker = re.match(rf"{SHM_PREFIX}(\d+)-", name)
        if maker and int(maker[1]) not in ours and Path("/proc", maker[1]).exists():
            found.add(name)
    return found


def _state(pid: int) -> tuple[str, str, str]:
    """State of a process, its parent, and where in the kernel its first thread sleeps."""
    with suppress(OSError):
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
        return state, parent, Path(f"/proc/{pid}/wchan").read_text()
    return "gone", "", ""


def processes(mark: str) -> dict[int, str]:
    """Living processes that carry ``mark``: their id and command line."""
    wanted = f"{MARK}={mark}".encode()
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found[int(entry.name)] = line
    return found


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended, and what it left."""

    command: tuple[str, ...]
    status: int
    stdout: str
    stderr: str
    seconds: float
    timed_out: bool
    processes_left: tuple[str, ...]
    segments_left: tuple[str, ...]
    stuck: tuple[str, ...] = ()  # what ran when the time was over
    never_began: bool = False  # for reasons of MPI's launcher

    @property
    def text(self) -> str:
        """All that the job printed."""
        return self.stdout + self.stderr

    def describe(self, tail: int = 12000) -> str:
        """For the message of a failed test: the command, the status, the end of the output."""
        how = "did not end in time and was killed" if self.timed_out else f"status {self.status}"
        return (
            f"{' '.join(self.command)}\n{how}, {self.seconds:.1f} s\n"
            + "".join(f"{line}\n" for line in self.stuck)
            + f"--- stdout ---\n{self.stdout[-tail:]}\n--- stderr ---\n{self.stderr[-tail:]}"
        )

    def assert_clean(self) -> None:
        """The job ended by itself, and left neither a process nor a segment behind."""
        assert not self.timed_out, self.describe()
        assert not self.processes_left, f"left running: {self.processes_left}\n{self.describe()}"
        assert not self.segments_left, f"left in {SHM}: {self.segments_left}\n{self.describe()}"


class Job:
    """A job that runs: signal it, then wait for its end.

    Args:
        gpus: it sees this machine's GPUs; otherwise it computes on the CPU, whatever is here.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | str = ROOT,
        gpus: bool = False,
    ) -> None:
        self.command = tuple(command)
        self.mark = uuid.uuid4().hex
        self._segments = shared_memory()
        self._began = time.monotonic()
        hidden = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
        self._sessions = Path(tempfile.gettempdir(), f"hpcsync-job-{self.mark[:8]}")
        own = {MARK: self.mark, SESSIONS: str(self._sessions)}
        self.environment, self._cwd = environment({**hidden, **(env or {}), **own}), cwd
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        self._sessions.mkdir()
        return subprocess.Popen(
            self.command,
            env=self.environment,
            cwd=self._cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # signals meant for the job must not reach pytest
        )

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to mpirun, as a terminal or a batch system does."""
        self.process.send_signal(number)

    def processes(self) -> dict[int, str]:
        """The job's processes that live now, by id, with their command lines."""
        return processes(self.mark)

    def wait(self, timeout: float, grace: float = GRACE_S) -> Outcome:
        """Wait for the end; past ``timeout`` seconds kill every process of the job.

        What still lives ``grace`` seconds after the end counts as left behind.
        """
        outcome = self._wait(timeout, grace)
        if outcome.never_began:
            self._start_again(outcome)
            outcome = self._wait(timeout, grace)
        return outcome

    def wait_until(self, ready: Callable[[], bool], timeout: float = 120.0) -> None:
        """Wait for something that the job does; it is an error if it ends or does not do so."""
        for last in (False, True):
            until = time.monotonic() + timeout
            while self.process.poll() is None and time.monotonic() < until:
                if ready():
                    return
                time.sleep(0.005)
            if ready():
                return
            outcome = self._wait(0.1, 0)
            assert outcome.never_began, outcome.describe()
            assert not last, f"twice: {outcome.describe()}"
            self._start_again(outcome)

    def _start_again(self, outcome: Outcome) -> None:
        warnings.warn(f"not started by its launcher: {outcome.describe(500)}", stacklevel=3)
        self.process = self._start()

    def _wait(self, timeout: float, grace: float) -> Outcome:
        stuck: tuple[str, ...] = ()
        timed_out = no_ranks = False
        try:
            stdout, stderr = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
            no_ranks, stuck = self._ask_for_stacks()
            self.kill()
            stdout, stderr = self.process.communicate()
        seconds = time.monotonic() - self._began
        left, segments = self._leftovers(grace)
        self.kill()
        shutil.rmtree(self._sessions, ignore_errors=True)
        return Outcome(
            command=self.command,
            status=self.process.returncode,
            stdout=stdout,
            stderr=stderr,
            seconds=seconds,
            timed_out=timed_out,
            processes_left=left,
            segments_left=segments,
            stuck=stuck,
            never_began=no_ranks or bool(_NEVER_BEGAN.search(stderr)),
        )

    def _ask_for_stacks(self) -> tuple[bool, tuple[str, ...]]:
        """Whether a launcher runs that has started no process, and what runs, with what it waits
        for in the kernel. Each Python prints its stacks and ends.
        """
        running = self.processes()
        lines = tuple(f"{pid} {' '.join(_state(pid)[::2])}: {running[pid]}" for pid in running)
        parents = {_state(pid)[1] for pid in running}
        names = {pid: Path(line.partition(" ")[0]).name for pid, line in running.items()}
        idle = any(names[pid] in _LAUNCHERS and str(pid) not in parents for pid in running)
        for pid in running:
            if names[pid].startswith("python"):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGABRT)  # PYTHONFAULTHANDLER is set
        until = time.monotonic() + STACKS_S
        while time.monotonic() < until and self.processes().keys() & running.keys():
            time.sleep(0.05)
        return idle, lines

    def _leftovers(self, grace: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
        deadline = time.monotonic() + grace
        while True:
            left = processes(self.mark)
            segments = shared_memory() - self._segments
            segments -= _strangers(segments, left)
            if not (left or segments) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        lines = tuple(f"{pid}: {line}" for pid, line in sorted(left.items()))
        return lines, tuple(sorted(segments))

    def kill(self) -> None:
        """End every process of the job, and wait until they are gone."""
        deadline = time.monotonic() + GRACE_S
        while (left := self.processes()) and time.monotonic() < deadline:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)


def run(
    ranks: int,
    *arguments: str,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
    cwd: Path | str = ROOT,
    gpus: bool = False,
) -> Outcome:
    """Run ``python ARGUMENTS`` on ``ranks`` ranks and wait for its end.

    A rank count of 0 runs it alone, without mpirun. ``gpus`` as in ``Job``.
    """
    start = mpirun(ranks) if ranks else []
    return Job([*start, sys.executable, *arguments], env=env, cwd=cwd, gpus=gpus).wait(timeout)
