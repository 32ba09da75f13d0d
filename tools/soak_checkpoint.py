"""Kill runs at random instants, let them go on, and compare what they come to with a run that was
left alone: to the bit.

    python tools/soak_checkpoint.py --kills 200
    python tools/soak_checkpoint.py --kills 20 --ranks 2 --codecs int8,topk --no-log

For each number of ranks and codec a run of some steps is made once without a kill. Then chains of
runs: each is started with --resume auto, and all of its processes get SIGKILL at once, at a random
instant; the next one takes up what is there; until one reaches the last step. After each
kill every checkpoint that has its final name must verify, and with the replay log the next run must
take up the last step of which metrics.csv tells, so that only a step in flight was lost. At the end
of a chain all tensors and other values of the last checkpoint, and the losses of all steps, must be
those of the run that was left alone.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import benchmark  # noqa: E402
from tools.bootstrap import mpirun_command, mpirun_environment  # noqa: E402

STATEFUL = "none,int8,int4,onebit,onebit_adam,topk,randomk,powersgd,int8_shared"
MARK = "HPCSYNC_SOAK"
DECK = (
    *("model.layers=1", "model.width=32", "model.heads=2", "model.context=16"),
    *("model.dropout=0.1", "data.options={max_mb=0.5}"),
    *("train.global_batch=16", "train.eval_every=0", "train.warmup=4", "compress.warmup=2"),
    *("compress.min_elements=16", "checkpoint.keep=3", "trace.enabled=false"),
)

CODECS = {"onebit_adam": ["compress.codec=onebit", "train.optimizer=onebit_adam", "train.freeze=8"]}
# Of the time that all steps take: so a chain has several kills, and comes to its end.
KILLED_WITHIN = 0.4


class Shape(NamedTuple):
    """What is run."""

    ranks: int
    codec: str
    log: bool

    def __str__(self) -> str:
        return f"{self.ranks} ranks, {self.codec}{', log' if self.log else ''}"


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("settings", nargs="*", metavar="KEY=VALUE", help="of the deck, besides")
    add("--kills", type=int, default=200)
    add("--ranks", default="1,2,4")
    add("--codecs", default=STATEFUL)
    add("--steps", type=int, default=40)
    add("--every", type=int, default=7, help="steps between checkpoints (%(default)s)")
    add("--no-log", action="store_true", help="only without checkpoint.replay_log")
    add("--seed", type=int, default=0)
    add("--jobs", type=int, default=1, help="chains at a time")
    add("--limit", type=float, default=3600.0, help="seconds after which no chain begins")
    return parser


class Soak:
    """The chains and what came of them."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.found: Counter[str] = Counter()
        self.problems: list[str] = []
        # By ranks and codec: the log changes no bits.
        self._whole: dict[tuple[int, str], tuple[dict[str, Any], list[str], float]] = {}

    def chain(self, shape: Shape, source: random.Random) -> None:
        """One run with as many kills as it takes to the last step."""
        same = shape.ranks, shape.codec
        if same not in self._whole:
            self._whole[same] = self._alone(shape)
        state, losses, long_s = self._whole[same]
        run = self.folder / f"run-{uuid.uuid4().hex[:8]}"
        kills = 0
        while True:
            before = last_step(run)
            over = before == self.options.steps
            after_s = None if over else source.uniform(0.0, long_s * KILLED_WITHIN)
            killed, text = self._start(shape, run, after_s)
            self._taken_up(shape, before, text)
            if not killed:
                break
            kills += 1
            self.found["kills"] += 1
            self._look(shape, run)
            if kills > 60:
                self.problems.append(f"{shape}: no end after {kills} kills")
                return
        self.found["chains"] += 1
        if "done" not in text and last_step(run) != self.options.steps:
            self.problems.append(f"{shape}: ended with: {text.strip()[-300:]}")
            return
        if self._compare(shape, run, state, losses):
            shutil.rmtree(run, ignore_errors=True)

    def _alone(self, shape: Shape) -> tuple[dict[str, Any], list[str], float]:
        run = self.folder / f"alone-{uuid.uuid4().hex[:8]}"
        _, text = self._start(shape, run, None)
        if last_step(run) != self.options.steps:
            raise SystemExit(f"soak: {shape}: the run that was left alone failed: {text[-2000:]}")
        rows = [float(row["step_ms"]) for row in rows_of(run)]
        return values_of(run), losses_of(run), sum(rows) / 1e3 + 0.3

    def _start(self, shape: Shape, run: Path, kill_after_s: float | None) -> tuple[bool, str]:
        """Start a run; kill it so long after its first new step. (whether it was killed, output)"""
        mark = uuid.uuid4().hex
        env = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_"))}
        env = mpirun_environment(env)
        env |= {"OMP_NUM_THREADS": "1", MARK: mark, "PYTHONPATH": str(ROOT)}
        # What an mpirun that is killed leaves would stop a later one of its process id.
        sessions = self.folder / f"{mark}.mpirun"
        sessions.mkdir()
        env["PRTE_MCA_prte_tmpdir_base"] = str(sessions)
        words = [sys.executable, "-m", "hpcsync.train", *DECK]
        words += CODECS.get(shape.codec, [f"compress.codec={shape.codec}"])
        words += [f"train.steps={self.options.steps}", f"checkpoint.every={self.options.every}"]
        words += [f"checkpoint.replay_log={str(shape.log).lower()}", "topology.ranks_per_node=1"]
        words += [*self.options.settings, "--out", str(run), "--resume", "auto"]
        node = ["--mca", "pml", "ob1", "--mca", "btl", "self,sm"]
        launcher = [*mpirun_command(benchmark.find_mpirun(), shape.ranks), *node]
        command = words if shape.ranks == 1 else [*launcher, *words]
        with (self.folder / f"{mark}.log").open("w+") as log:
            job = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=self.folder)
            killed = False
            if kill_after_s is not None and self._stepped(job, run):
                with suppress(subprocess.TimeoutExpired):
                    job.wait(kill_after_s)
                killed = job.poll() is None
                if killed:
                    kill(mark)
            job.wait(timeout=300)
            log.seek(0)
            text = log.read()
        Path(log.name).unlink()
        shutil.rmtree(sessions, ignore_errors=True)
        return killed, text

    def _stepped(self, job: subprocess.Popen[bytes], run: Path) -> bool:
        """Wait for the run to come to its first step."""
        before = stamp(run)
        while job.poll() is None:
            if stamp(run) != before:
                return True
            time.sleep(0.005)
        return False

    def _taken_up(self, shape: Shape, before: int, text: str) -> None:
        """What the resumed run says of where it goes on, against the last step that was told."""
        told = [int(each) for each in re.findall(r"(?:after step|up to step|at step) (\d+)", text)]
        reached = max(told, default=0)
        if before and shape.log:
            lost = before - reached
            self.found[f"lost {max(lost, 0)}"] += 1
            if lost > 1:
                self.problems.append(f"{shape}: {lost} steps lost of {before}: {text[:600]}")

    def _look(self, shape: Shape, run: Path) -> None:
        """Every checkpoint with its final name is whole."""
        from hpcsync.checkpoint import reader

        folder = run / "checkpoints"
        if not folder.is_dir():
            return
        if any(each.name.startswith(".step") for each in folder.iterdir()):
            self.found["kills inside a write"] += 1
        for each in sorted(folder.glob("step-????????")):
            try:
                with reader.open(each) as found:
                    problems = found.verify()
            except Exception as error:
                problems = [str(error)]
            self.found["checkpoints verified"] += 1
            if problems:
                self.problems.append(f"{shape}: {each.name}: {problems[0]}")

    def _compare(self, shape: Shape, run: Path, state: dict[str, Any], losses: list[str]) -> bool:
        """Whether the run came to what the one left alone came to."""
        found = values_of(run)
        different = sorted(
            name for name in state.keys() | found.keys() if state.get(name) != found.get(name)
        )
        if losses_of(run) != losses:
            different.append("the losses")
        self.found["differences"] += len(different)
        if different:
            self.problems.append(f"{shape}: {run}: differ: {', '.join(different[:8])}")
        return not different


def stamp(run: Path) -> int:
    """When metrics.csv was written last."""
    with suppress(OSError):
        return (run / "metrics.csv").stat().st_mtime_ns
    return 0


def rows_of(run: Path) -> list[dict[str, str]]:
    """metrics.csv, without a last row that a kill cut off."""
    try:
        text = (run / "metrics.csv").read_text()
    except OSError:
        return []
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def last_step(run: Path) -> int:
    """The last step of which metrics.csv tells."""
    rows = rows_of(run)
    return int(rows[-1]["step"]) if rows else 0


def losses_of(run: Path) -> list[str]:
    """Of all steps, as they are written."""
    return [f"{row['step']} {row['loss']} {row['grad_norm']}" for row in rows_of(run)]


def values_of(run: Path) -> dict[str, Any]:
    """All of the newest checkpoint: bytes of each tensor, and the values beside them."""
    import json

    from hpcsync.checkpoint import reader

    newest = reader.find(run / "checkpoints")[0]
    with reader.open(newest) as found:
        manifest = found.manifest
        values: dict[str, Any] = {
            name: found.tensor(name).contiguous().flatten().view(dtype=uint8()).numpy().tobytes()
            for name in manifest.tensors
        }
        values |= {
            name: json.dumps(each)
            for name, each in manifest.common.items()
            if name != "run"  # names the run
        }
        values["own"] = json.dumps(manifest.own, sort_keys=True)
    return values


def uint8() -> Any:
    """torch's."""
    import torch

    return torch.uint8


def kill(mark: str) -> None:
    """SIGKILL to all processes of a job."""
    wanted = f"{MARK}={mark}".encode()
    for _ in range(3):
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    if wanted in (entry / "environ").read_bytes().split(b"\0"):
                        os.kill(int(entry.name), signal.SIGKILL)


def shapes(options: argparse.Namespace) -> list[Shape]:
    """All that are to be run in turn."""
    logs = (False,) if options.no_log else (False, True)
    return [
        Shape(int(ranks), codec, log)
        for codec in options.codecs.split(",")
        for ranks in options.ranks.split(",")
        for log in logs
        if int(ranks) > 1 or codec in ("none", options.codecs.split(",")[0])
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    options = arguments().parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    soak = Soak(options, folder)
    source = random.Random(options.seed)
    began = time.monotonic()

    def work(worker: int) -> None:
        mine = shapes(options)
        own = random.Random(source.random() + worker)
        own.shuffle(mine)
        turn = 0
        while soak.found["kills"] < options.kills and time.monotonic() - began < options.limit:
            soak.chain(mine[turn % len(mine)], own)
            turn += 1
            told = ", ".join(f"{name}: {count}" for name, count in sorted(soak.found.items()))
            print(f"# {time.monotonic() - began:.0f} s: {told}", *soak.problems[-1:], flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(work, range(options.jobs)))
    for name, count in sorted(soak.found.items()):
        print(f"{name}: {count}")
    print(*(f"PROBLEM: {each}" for each in soak.problems), sep="\n")
    print(f"{len(soak.problems)} problems; folder {folder}" if soak.problems else "0 problems")
    if not soak.problems:
        shutil.rmtree(folder)
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
