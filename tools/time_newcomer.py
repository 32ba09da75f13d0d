"""How long a newcomer waits for the first training step: README's first command in a fresh clone.

    python tools/time_newcomer.py --report newcomer

Three starts: with an empty cache of pip; in another fresh clone with what pip has cached; and once
more in that clone. The environment of the checkout is not used. What pip is told by its own
configuration and environment counts: without any it downloads from the public indexes, and
``--note`` says in the report what it took instead.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import benchmark

ROOT = benchmark.ROOT
HEADS = ("start", "ready(s)", "first step(s)", "environment(MiB)")
_STEP = re.compile(r"^step 1/")
_LIMIT_S = 1800.0


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds from the command to the ready environment and to the first step."""

    ready_s: float
    first_step_s: float


def readme_command(text: str) -> str:
    """The first command of README's first block of shell.

    Raises:
        ValueError: there is none.
    """
    found = re.search(r"^```sh\n(.*?)^```", text, re.S | re.M)
    if found is None:
        raise ValueError("README.md: no block of sh")
    return found[1].splitlines()[0].partition(" #")[0].strip()


def clone(where: Path) -> Path:
    """A fresh clone of what is committed."""
    command = ["git", "clone", "--quiet", "--no-local", str(ROOT), str(where)]
    subprocess.run(command, check=True)
    return where


def environment(cache: Path, home: Path) -> dict[str, str]:
    """A newcomer's: no virtual environment, no Python path, a cache of pip of its own."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OMPI_", "PMIX_", "PRTE_", "PYTHON", "VIRTUAL_ENV", "HPCSYNC_"))
    }
    own = str(Path(sys.prefix) / "bin")
    path = [part for part in env.get("PATH", os.defpath).split(os.pathsep) if part != own]
    env.update(PATH=os.pathsep.join(path), PIP_CACHE_DIR=str(cache), PYTHONUNBUFFERED="1")
    env["XDG_CACHE_HOME"] = str(home)
    return env


def start(folder: Path, command: str, env: dict[str, str], limit_s: float = _LIMIT_S) -> Start:
    """Run ``command`` until the first step has been told, then stop it.

    Raises:
        RuntimeError: it ended before, or did not get there in ``limit_s`` seconds.
    """
    began = time.monotonic()
    job = subprocess.Popen(
        ["sh", "-c", f"exec {command}"],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert job.stdout is not None
    said: list[str] = []
    ready = 0.0
    # It may say nothing for ever: at the limit it is ended, and with it what it says.
    limit = threading.Timer(limit_s, _end, [job])
    limit.start()
    try:
        for line in job.stdout:
            now = time.monotonic() - began
            said.append(line)
            # The banner's first line: the environment is there, and all ranks have started.
            if line.startswith("hpcsync ") and not ready:
                ready = now
            if _STEP.match(line):
                return Start(ready, now)
    finally:
        limit.cancel()
        _end(job)
    raise RuntimeError(f"no step of training:\n{''.join(said[-30:])}")


def _end(job: subprocess.Popen[str]) -> None:
    """End its whole session, and what is left after a while the hard way."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(30)


def mebibytes(folder: Path) -> float:
    """What a folder takes on disk."""
    sizes = (path.lstat().st_blocks * 512 for path in folder.rglob("*"))
    return sum(sizes) / benchmark.MIB


def measure(python: str) -> list[list[str]]:
    """A row for each start."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        cache, home = place / "pip", place / "home"
        command = ""
        for label, folder in (
            ("nothing there", place / "first"),
            ("another clone, pip's cache", place / "second"),
            ("the same clone again", place / "second"),
        ):
            if not folder.exists():
                clone(folder)
            command = readme_command((folder / "README.md").read_text(encoding="utf-8"))
            command = re.sub(r"^python3\b", python, command)
            found = start(folder, command, environment(cache, home))
            size = mebibytes(folder / ".venv")
            rows.append([label, f"{found.ready_s:.1f}", f"{found.first_step_s:.1f}", f"{size:.0f}"])
            print(*benchmark.table(HEADS, rows)[-1:], flush=True)
            if folder.name == "first":
                shutil.rmtree(folder)
    return rows


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="time_newcomer.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--python", default="python3", help="that the newcomer has (python3)")
    parser.add_argument("--note", default="", help="where pip took packages from, for the report")
    parser.add_argument("--report", metavar="NAME", help="write tools/reports/...-NAME.md")
    options = parser.parse_args()
    head = {"command": "python tools/time_newcomer.py --report newcomer"}
    head |= benchmark.facts("README's first command in a fresh clone", mpi=False)
    head |= {"packages": options.note} if options.note else {}
    rows = measure(options.python)
    if options.report:
        body = [
            "From the command to the first line of the banner (ready) and to the first training "
            "step; one start each.",
            "",
            *benchmark.markdown(HEADS, rows),
        ]
        path = benchmark.write_report(options.report, "A newcomer's path", head, body)
        print(f"# report: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
