"""Commands whose reader ends, whose output is closed, or whose disk is full."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from tests import launcher

TRAIN = "-m hpcsync.train --explain"
DOCTOR = "-m hpcsync.doctor --only python,limits"
TAKEN_UP = """
import sys
from hpcsync import launch
def main():
    for turn in range(3):
        print("a line", flush=True)
        print("a warning", file=sys.stderr)
        sys.stdin.read(1)
    with open(sys.argv[1], "w") as file:
        file.write("went on")
    return 0
launch.guard(main)
"""


def shell(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", text],
        env=launcher.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("words", [TRAIN, DOCTOR, f"-u {TRAIN}"])
def test_a_reader_that_ends_is_no_fault(words: str) -> None:
    python = shlex.quote(sys.executable)
    # Standard output of the first is closed before it says a word.
    done = shell(f"{{ read -r; {python} {words}; echo $? >&2; }} < <(sleep 0.3; echo) | true")
    assert done.stderr == "0\n"
    assert shell(f"{python} {words} | {{ read -r; }}; echo ${{PIPESTATUS[0]}}").stdout == "0\n"


@pytest.mark.parametrize("words", [TRAIN, DOCTOR])
def test_output_that_is_closed_or_cannot_be_written(words: str) -> None:
    python = shlex.quote(sys.executable)
    done = shell(f"{python} {words} >&-")
    assert (done.returncode, done.stderr) == (0, "")
    done = shell(f"{python} {words} >/dev/full")
    assert done.returncode == 1
    assert done.stderr.startswith("hpcsync: error: standard output: No space left on device")
    assert done.stderr.count("\n") == 1
    # An error has nowhere to go, but its status.
    assert shell(f"{python} -m hpcsync.train --explain nothing 2>&-").returncode == 2


def test_a_run_goes_on_without_its_reader(tmp_path: object) -> None:
    """As after Ctrl-C, which ends `2>&1 | tee` at once, while the run is to save yet."""
    python, path = shlex.quote(sys.executable), f"{tmp_path}/done"
    shell(
        f"{{ sleep 0.3; echo; }} | {python} -c {shlex.quote(TAKEN_UP)} {path} 2>&1 | "
        "{ read -r line; }"
    )
    assert shell(f"cat {path}").stdout == "went on"
