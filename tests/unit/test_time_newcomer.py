"""tools/time_newcomer.py: what it starts, and when it stops."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from tools import time_newcomer


def test_the_first_command_of_readme_trains() -> None:
    text = (time_newcomer.ROOT / "README.md").read_text()
    command = time_newcomer.readme_command(text)
    assert shlex.split(command)[:3] == ["python3", "tools/bootstrap.py", "train"]
    assert "#" not in command
    with pytest.raises(ValueError, match="no block"):
        time_newcomer.readme_command("# hpcsync\n")


def test_it_is_stopped_at_its_first_step(tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(
        "echo $$ > pid; echo bootstrap: installing; echo 'hpcsync 1.0'\n"
        "echo 'step 1/200  loss 5.5'; sleep 1000\n"
    )
    found = time_newcomer.start(tmp_path, f"sh {script}", dict(os.environ))
    assert 0 < found.ready_s <= found.first_step_s
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


def test_a_command_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no step of training:\nwrong"):
        time_newcomer.start(tmp_path, "sh -c 'echo wrong; exit 2'", dict(os.environ))


@pytest.mark.parametrize(
    "says",
    ["", "while true; do echo x; sleep 0.1; done;", "(trap : TERM; while :; do sleep 1; done) &"],
)
def test_one_that_never_gets_there_is_stopped(tmp_path: Path, says: str) -> None:
    command = f"sh -c 'echo $$ > pid; {says} sleep 1000'"
    with pytest.raises(RuntimeError, match="no step of training"):
        time_newcomer.start(tmp_path, command, dict(os.environ), limit_s=1.0)
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


def test_the_newcomer_has_no_environment_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("VIRTUAL_ENV", "PYTHONPATH", "OMPI_MCA_pml"):
        monkeypatch.setenv(name, "ours")
    env = time_newcomer.environment(tmp_path / "pip", tmp_path)
    assert not {"VIRTUAL_ENV", "PYTHONPATH", "OMPI_MCA_pml"} & set(env)
    assert env["PIP_CACHE_DIR"] == str(tmp_path / "pip")
