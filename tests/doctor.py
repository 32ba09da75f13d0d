"""Faults for the doctor to find: run it, follow the command that it gives, run it again."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from hpcsync import config as configs
from hpcsync.doctor.base import Finding, Status, System
from tests import launcher

ROOT = launcher.ROOT
SITE = Path(sysconfig.get_paths()["purelib"])
LIMIT_S = 240
needs_mpi = pytest.mark.usefixtures("mpi")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may do that")
needs_gxx = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++ is missing: apt-get install g++"
)
Test = TypeVar("Test", bound=Callable[..., Any])
Findings = Callable[[System], Sequence[Finding]]


def provokes(*codes: str) -> Callable[[Test], Test]:
    """Says which codes a test provokes: test_doctor.py holds that each has a test."""
    assert codes
    return lambda test: test


def shell(script: str, env: Mapping[str, str] | None = None, **options: Any) -> str:
    """Standard output of a script, and its errors if it is no report, however it ended."""
    done = subprocess.run(
        [shutil.which("bash") or "sh", "-c", script],
        env=launcher.environment(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        **options,
    )
    return (
        done.stdout + f"\n--- stderr ---\n{done.stderr}" if "{" not in done.stdout else done.stdout
    )


def doctor(*words: str, python: str | Path = sys.executable) -> str:
    """The command, for a shell."""
    return shlex.join([str(python), "-m", "hpcsync.doctor", *words])


def findings(output: str) -> dict[str, dict[str, Any]]:
    """The findings of a report in JSON, by code."""
    start = output.find("{")
    assert start >= 0, output
    report = json.JSONDecoder().raw_decode(output[start:])[0]
    return {each["code"]: each for each in report["findings"]}


def mended(
    code: str,
    setup: str = "",
    command: str = "",
    *,
    check: str = "",
    fix: str = "",
    env: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """After ``setup`` the doctor finds ``code``; with its fix besides, the check passes.

    Args:
        command: starts the doctor; that of its check alone if not given.
        fix: how the fix begins.
    """
    check = check or code.partition(".")[0]
    command = command or doctor("--json", "--only", check)
    before = findings(shell(f"{setup}\n{command}", env))
    assert code in before, before
    found = before[code]
    assert found["fix"].startswith(fix), found
    # A fix may be the command itself, started in another way.
    then = "" if "hpcsync.doctor" in found["fix"] else command
    after = findings(shell(f"{setup}\n{found['fix']}\n{then}", env))
    assert check in after, (found, after)
    assert after[check]["status"] == "PASS"
    return found


def follow(system: System, fix: str) -> System:
    """The system after a fix: its environment, or the deck's keys that the fix gives."""
    if fix.startswith(shlex.join(system.command)):
        words = shlex.split(fix)[len(system.command) :]
        return dataclasses.replace(system, config=configs.load(None, words))
    done = subprocess.run(
        ["sh", "-c", f"{fix}\nenv -0"],
        env=dict(system.env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, (fix, done.stderr)
    pairs = [pair.partition("=") for pair in done.stdout.split("\0") if "=" in pair]
    env = {name: value for name, _, value in pairs if name.isidentifier()}
    return dataclasses.replace(system, env=env)


def mended_here(
    check: Findings, code: str, system: System, *, fix: str = "", then: Any = None
) -> Finding:
    """As ``mended``, in this process: ``then`` makes of the mended system what it says of it."""
    before = {each.code: each for each in check(system)}
    assert code in before, before
    found = before[code]
    assert found.status != Status.PASS
    assert found.fix.startswith(fix), found
    mend = follow(system, found.fix)
    after = list(check(then(mend) if then else mend))
    assert [each.status for each in after] == [Status.PASS] * len(after), after
    assert after
    return found


def wheel(folder: Path, name: str, version: str, files: Mapping[str, str]) -> None:
    """Lay a wheel into ``folder``: for pip without a network."""
    folder.mkdir(parents=True, exist_ok=True)
    about = f"{name}-{version}.dist-info"
    every = {
        **files,
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = [f"{path},," for path in (*every, f"{about}/RECORD")]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        for path, text in {**every, f"{about}/RECORD": "\n".join(lines) + "\n"}.items():
            file.writestr(path, text)


def offline(wheels: Path) -> dict[str, str]:
    """Environment in which pip installs from ``wheels`` only."""
    return {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # as pip reads it: none
        "PIP_ROOT_USER_ACTION": "ignore",
    }


class Sandbox:
    """A virtual environment that sees this one's packages, or none but pip."""

    def __init__(self, folder: Path, *, bare: bool = False) -> None:
        self.folder = folder
        make = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
        subprocess.run(make, check=True, capture_output=True)
        self.python = folder / "bin" / "python"
        self.site = next(folder.glob("lib/python*/site-packages"))
        seen = SITE
        if bare:
            seen = folder / "pip-only"
            seen.mkdir()
            (seen / "pip").symlink_to(SITE / "pip")
        (self.site / "seen.pth").write_text(f"{seen}\n")

    def add(self, name: str, version: str, text: str) -> None:
        """Install a package of one module, before all that it sees."""
        (self.site / name).mkdir()
        (self.site / name / "__init__.py").write_text(text)
        about = self.site / f"{name}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        (about / "INSTALLER").write_text("pip\n")
        (about / "RECORD").write_text(f"{name}/__init__.py,,\n{about.name}/RECORD,,\n")


def script(folder: Path, name: str, text: str) -> Path:
    """An executable shell script in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def module(folder: Path, name: str, text: str) -> Path:
    """A Python module in ``folder``, for PYTHONPATH; dots make packages."""
    path = folder.joinpath(*name.split("."))
    path.parent.mkdir(parents=True, exist_ok=True)
    for parent in path.relative_to(folder).parents:
        if parent != Path("."):
            (folder / parent / "__init__.py").touch()
    path.with_suffix(".py").write_text(text)
    return folder


@functools.cache
def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


needs_cores = pytest.mark.skipif(cores() < 2, reason="one core: ranks cannot be bound apart")


def mpirun(ranks: int, *flags: str) -> str:
    """The start of a command line, for a shell."""
    return shlex.join(launcher.mpirun(ranks, *flags))


def has_own_mpi() -> bool:
    """Whether MPI is a wheel of this environment."""
    return (Path(sys.prefix) / "lib" / "libmpi.so.40").exists()
