"""A real Slurm on one machine: munged, slurmctld, and one slurmd a virtual node.

Everything lives in a folder of its own and listens on free ports of 127.0.0.1, so that it disturbs
no Slurm that the machine may have. Each node has a host name of its own (a UTS namespace), so that
jobs see several hosts. Needs root; SLURM_CONF in ``environment()`` leads the commands here.

As a command it is what cleans up should pytest be killed: it reads marks of processes, one a line,
until whoever started it is gone, then ends those processes and removes the folder it was given.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tests import launcher

START_S = 120.0
_STOP_S = 20.0
# States after which nothing comes. There are many others: SIGNALING, COMPLETING, REQUEUED, ...
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")

_CONFIG = """\
ClusterName=hpcsynctest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its old credential has expired.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
TmpFS={folder}/tmp-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin={task_plugin}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
KillWait=60
MinJobAge=3600
# Open MPI names its files in /dev/shm by host, job and step: those of another cluster on this
# machine, or of a job that was killed before, must be others.
FirstJobId={first_job}
MaxJobId=60000000
SlurmdTimeout=300
MessageTimeout=60
UnkillableStepTimeout=120
SchedulerParameters=sched_min_interval=0,batch_sched_delay=1,bf_interval=1
MailProg=/bin/true
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class SlurmError(Exception):
    """The cluster did not start, or a command of it failed."""


class SlurmCluster:
    """A context that has a cluster of nodes node1, node2, ... of ``cpus`` processors each."""

    def __init__(self, nodes: int = 3, cpus: int = 2) -> None:
        self.names = [f"node{number}" for number in range(1, nodes + 1)]
        self._cpus = cpus
        self.mark = uuid.uuid4().hex
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._marks: list[str] = []
        self._cleaner: subprocess.Popen[str] | None = None

    def __enter__(self) -> SlurmCluster:
        # Short, since it holds a socket; open to all, as munged wants its folder.
        self.folder = Path(tempfile.mkdtemp(prefix="hpcsync-slurm-"))
        self.folder.chmod(0o755)
        try:
            self._cleaner = subprocess.Popen(
                [sys.executable, "-m", "tests.slurm.cluster", str(self.folder)],
                env=launcher.environment(),
                cwd=launcher.ROOT,
                stdin=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            self._note(self.mark)
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """In which Slurm's commands talk to this cluster, and ``python`` is this one."""
        env = launcher.environment(extra)
        strangers = ("SLURM_", "SBATCH_", "SRUN_", "HPCSYNC_")
        env = {k: v for k, v in env.items() if not k.startswith(strangers) or k in (extra or {})}
        env["SLURM_CONF"] = str(self.folder / "slurm.conf")
        env[launcher.SESSIONS] = str(self.folder)
        env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
        # More ranks than the machine has cores.
        env.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
        return env

    def command(
        self, *words: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> str:
        """Run one of Slurm's commands; what it printed.

        Raises:
            SlurmError: it failed.
        """
        done = subprocess.run(
            words,
            env=self.environment(env),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode:
            raise SlurmError(f"{' '.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, *words: str, cwd: Path, env: Mapping[str, str] | None = None) -> Submitted:
        """``sbatch WORDS`` in a folder."""
        mark = uuid.uuid4().hex
        self._note(mark)
        told = self.command(
            "sbatch", "--parsable", *words, env={**(env or {}), launcher.MARK: mark}, cwd=cwd
        )
        return Submitted(self, int(told.split(";")[0]), mark, cwd)

    def facts(self, job: int | str) -> dict[str, str]:
        """What ``scontrol show job`` tells: JobState, ExitCode, Restarts, ..."""
        told = self._patiently("scontrol", "--oneliner", "show", "job", str(job)).splitlines()[0]
        pairs = (word.partition("=") for word in told.split() if "=" in word)
        return {key: value for key, _, value in pairs}

    def _patiently(self, *words: str) -> str:
        """A command that changes nothing, again if a busy slurmctld did not answer in time."""
        for _ in range(5):
            with suppress(SlurmError, subprocess.TimeoutExpired):
                return self.command(*words)
            time.sleep(1.0)
        return self.command(*words)

    def _note(self, mark: str) -> None:
        """Processes that carry ``mark`` are to be ended with the cluster."""
        self._marks.append(mark)
        assert self._cleaner is not None
        assert self._cleaner.stdin is not None
        self._cleaner.stdin.write(f"{mark}\n")
        self._cleaner.stdin.flush()

    def wait_idle(self, timeout: float = START_S) -> None:
        """Until all nodes are up and free."""
        self._wait(self._idle, timeout, "the nodes are not idle")

    def _idle(self) -> bool:
        with suppress(SlurmError, subprocess.TimeoutExpired):
            states = self.command("sinfo", "--noheader", "--Node", "--format=%T").split()
            return states == ["idle"] * len(self.names)
        return False

    def _start(self) -> None:
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        # --force: as root, and in a folder below one that everybody may write to.
        self._spawn(
            "munged",
            *("munged", "--foreground", "--force", f"--key-file={key}"),
            f"--socket={self.folder}/munge.socket",
            f"--pid-file={self.folder}/munged.pid",
            f"--log-file={self.folder}/munged.log",
            f"--seed-file={self.folder}/munge.seed",
        )
        self._wait((self.folder / "munge.socket").exists, START_S, "munged does not start")
        self._configure()
        self._spawn("slurmctld", "slurmctld", "-D", "-i")
        for name in self.names:
            (self.folder / f"tmp-{name}").mkdir()
            (self.folder / f"spool-{name}").mkdir()
            script = f"hostname {name} && exec slurmd -D -N {name}"
            self._spawn(f"slurmd-{name}", "unshare", "--uts", "sh", "-c", script)
        self.wait_idle()

    def _configure(self) -> None:
        cores = len(os.sched_getaffinity(0))
        host = socket.gethostname().partition(".")[0]
        first, *ports = _free_ports(len(self.names) + 1)
        lines = [
            f"NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} "
            f"CPUs={self._cpus} RealMemory=1000"
            for name, port in zip(self.names, ports, strict=True)
        ]
        text = _CONFIG.format(
            host=host,
            port=first,
            first_job=random.randrange(10_000, 50_000_000),
            folder=self.folder,
            nodes="\n".join(lines),
            # What is not there cannot be bound to.
            task_plugin="task/affinity" if cores >= self._cpus else "task/none",
        )
        (self.folder / "slurm.conf").write_text(text)

    def _spawn(self, name: str, *words: str) -> None:
        with (self.folder / f"{name}.out").open("wb") as log:
            daemon = subprocess.Popen(
                words,
                env=self.environment({launcher.MARK: self.mark}),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._daemons.append(daemon)

    def _wait(self, ready: Callable[[], bool], timeout: float, what: str) -> None:
        until = time.monotonic() + timeout
        while not ready():
            gone = [str(daemon.args) for daemon in self._daemons if daemon.poll() is not None]
            if gone or time.monotonic() > until:
                what = "; ".join([what, *(f"has ended: {each}" for each in gone)])
                raise SlurmError(f"{what}\n{self.logs()}")
            time.sleep(0.1)

    def logs(self, tail: int = 3000) -> str:
        """The ends of the daemons' logs."""
        found = sorted([*self.folder.glob("*.out"), *self.folder.glob("*.log")])
        return "\n".join(f"--- {path.name}\n{path.read_text()[-tail:]}" for path in found)

    def _stop(self) -> None:
        """End jobs, daemons, and whatever they have started."""
        alive = all(daemon.poll() is None for daemon in self._daemons)
        if alive and (self.folder / "slurm.conf").exists():
            with suppress(SlurmError, subprocess.TimeoutExpired):
                self.command("scancel", "--user=root")
                self._wait(self._idle, _STOP_S, "jobs do not end")
        for daemon in reversed(self._daemons):
            daemon.terminate()
        until = time.monotonic() + _STOP_S
        for daemon in self._daemons:
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(max(0.1, until - time.monotonic()))
        _end(self._marks, self.folder)
        for process in (*self._daemons, self._cleaner):
            if process is not None:
                if process.stdin is not None:
                    process.stdin.close()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_STOP_S)


class Submitted:
    """A job that was submitted."""

    def __init__(self, cluster: SlurmCluster, number: int, mark: str, folder: Path) -> None:
        self.cluster, self.number, self.mark, self._folder = cluster, number, mark, folder

    def facts(self) -> dict[str, str]:
        return self.cluster.facts(self.number)

    def log(self) -> str:
        """What the job has printed, over all its starts."""
        return "".join(path.read_text() for path in self._folder.glob(f"*-{self.number}.log"))

    def describe(self) -> str:
        """For the message of a failed test."""
        return f"{self.facts()}\n{self.log()[-8000:]}\n{self.cluster.logs(1500)}"

    def cancel(self) -> None:
        """End it now, if it is there still."""
        with suppress(SlurmError, subprocess.TimeoutExpired):
            self.cluster.command("scancel", str(self.number))

    def wait_for(self, ready: Callable[[], bool], timeout: float = 240.0) -> None:
        """Until something is so, while the job lives."""
        until = time.monotonic() + timeout
        while not ready():
            waiting = time.monotonic() < until and self.facts()["JobState"] not in FINAL
            assert waiting or ready(), self.describe()
            time.sleep(0.1)

    def wait(self, timeout: float = 300.0) -> dict[str, str]:
        """Until the job has ended for good, with nothing of it left; its facts."""
        until = time.monotonic() + timeout
        while (facts := self.facts())["JobState"] not in FINAL:
            assert time.monotonic() < until, self.describe()
            time.sleep(0.2)
        while left := launcher.processes(self.mark):
            assert time.monotonic() < until, f"left running: {left}\n{self.describe()}"
            time.sleep(0.2)
        return facts


def _end(marks: Iterable[str], folder: Path) -> None:
    """End all processes that carry one of the marks, and remove the folder."""
    until = time.monotonic() + _STOP_S
    while left := {pid for mark in marks for pid in launcher.processes(mark)}:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > until:
            break
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    try:
        for each in held:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in held]
    finally:
        for each in held:
            each.close()


if __name__ == "__main__":
    _end(sys.stdin.read().split(), Path(sys.argv[1]))
