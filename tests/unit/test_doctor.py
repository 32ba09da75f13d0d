"""The doctor's report, the place of a process, and that each fault it knows is provoked."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hpcsync import children, interpreter
from hpcsync.children import alone
from hpcsync.doctor import checks, report, software
from hpcsync.doctor.__main__ import main as doctor_main
from hpcsync.doctor.base import Check, Finding, Scope, Status, System, fail, good, warn
from hpcsync.doctor.command import make_parser
from hpcsync.doctor.facts import gather, numbers
from hpcsync.doctor.place import Place
from hpcsync.doctor.probes import world
from tests.doctor import ROOT, mended_here, provokes, script, shell
from tests.unit.test_import_time import HEAVY, imported

DOCTOR = ROOT / "hpcsync" / "doctor"
# `warn` and `fail`, and the name by which one of them goes in slurm.py.
MAKERS = {"warn", "fail", "make"}


def codes() -> set[str]:
    """All codes that the doctor's source names; ``*`` for a part that comes from data."""
    found = set()
    for path in DOCTOR.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in MAKERS:
                for each in _values(node.args[0], path):
                    found.add(each)
    return found


def _values(node: ast.expr, path: Path) -> list[str]:
    if isinstance(node, ast.Constant):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return ["".join(p.value if isinstance(p, ast.Constant) else "*" for p in node.values)]
    assert isinstance(node, ast.Name), ast.dump(node)
    pattern = rf"{node.id} = \"([\w.]+)\" if .* else \"([\w.]+)\""
    match = re.search(pattern, path.read_text())
    assert match, f"{path}: {node.id}"
    return list(match.groups())


def test_every_fault_is_provoked_by_a_test() -> None:
    text = "".join(path.read_text() for path in sorted((ROOT / "tests").rglob("test_doctor*.py")))
    provoked = set()
    for words in re.findall(r"@provokes\(([^)]*)\)", text):
        provoked |= set(re.findall(r'"([\w.]+)"', words))
    for code in codes():
        pattern = re.compile(re.escape(code).replace(r"\*", r"\w+"))
        assert any(pattern.fullmatch(each) for each in provoked), f"no test provokes {code}"
    known = [re.compile(re.escape(code).replace(r"\*", r"\w+")) for code in codes()]
    for each in provoked:
        assert any(pattern.fullmatch(each) for pattern in known), f"nothing finds {each}"


def test_every_fault_belongs_to_a_check() -> None:
    for code in codes() - {"*.error"}:
        assert code.partition(".")[0] in checks.ORDER
    assert {check.name for check in checks.CHECKS} <= set(checks.ORDER)
    assert len(set(checks.ORDER)) == len(checks.ORDER)


# --- the command ------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["--only", "limits,signals,clock"]])
def test_it_starts_light(words: list[str]) -> None:
    code = (
        "import runpy\n"
        f"sys.argv = ['hpcsync.doctor', *{words!r}]\n"
        "runpy.run_module('hpcsync.doctor', run_name='__main__', alter_sys=True)"
    )
    assert not imported(code) & HEAVY


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--only", "shn"], "there is no check shn; did you mean shm?"),
        (["run.dri=x"], "did you mean"),
        (["nowhere.toml"], "nowhere.toml"),
        (["--limit", "soon"], "--limit"),
        (["--limit", "0"], "--limit"),
        (["--limit", "-1"], "--limit"),
        (["--limit", "nan"], "--limit"),
        (["--limit", "inf"], "--limit"),
        (["--only", ","], "--only: names no check"),
    ],
)
def test_what_cannot_be_understood(words: list[str], told: str) -> None:
    command = [sys.executable, "-m", "hpcsync.doctor", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert told in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    ("worst", "status"), [(Status.PASS, 0), (Status.WARN, 0), (Status.FAIL, 1)]
)
def test_exit_status(worst: Status, status: int) -> None:
    entries = report.merge([(0, "a", Finding("shm.x", worst, "why", "fix"))], checks.ORDER)
    assert report.Report(where="", entries=entries, ranks=1, heard=1).exit_status == status


# --- the report -------------------------------------------------------------------------------


def three_ranks() -> report.Report:
    small = "mount -o remount,size=50% /dev/shm"
    found = [
        (0, "a", good("shm", "8.0 GiB free")),
        (1, "b", warn("shm.small", "1 MiB free", small)),
        (2, "c", warn("shm.small", "2 MiB free", small)),
        (0, "a", fail("folder.unwritable", "no", "doctor run.dir=/x")),
        (0, "a", good("python", "3.12")),
        (1, "b", good("python", "3.12")),
    ]
    entries = report.merge(found, checks.ORDER)
    return report.Report(where="here", entries=entries, ranks=3, heard=3)


def test_one_line_a_fault_with_its_ranks() -> None:
    lines = report.render(three_ranks()).splitlines()
    assert lines[0].endswith(": here")
    assert lines[1:] == [
        "  PASS  python  3.12",
        "  WARN  shm     1 MiB free [ranks 1-2 on b, c]",
        "                fix: mount -o remount,size=50% /dev/shm",
        "  FAIL  folder  no [rank 0 on a]",
        "                fix: doctor run.dir=/x",
        "  1 passed, 1 warned, 1 failed",
    ]


def test_json() -> None:
    found = json.loads(report.document(three_ranks()))
    assert found["format"] == report.FORMAT
    assert (found["status"], found["exit_status"], found["ranks"]) == ("FAIL", 1, 3)
    assert found["findings"][1] == {
        "check": "shm",
        "code": "shm.small",
        "status": "WARN",
        "why": "1 MiB free",
        "fix": "mount -o remount,size=50% /dev/shm",
        "ranks": [1, 2],
        "hosts": ["b", "c"],
    }


# --- the place --------------------------------------------------------------------------------

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
SRUN = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, Place()),
        (OPEN_MPI, Place("mpirun", 3, 4, 1)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}, Place("mpiexec", 1, 2, 1)),
        (SRUN, Place("srun", 1, 2, 0, "7")),
        # Open MPI's daemons in a batch job were started by srun, one a node.
        ({**SRUN, **OPEN_MPI}, Place("mpirun", 3, 4, 1, "7")),
        # Slurm's plug-in pmi2.
        ({**SRUN, "PMI_RANK": "1", "PMI_SIZE": "2"}, Place("srun", 1, 2, 0, "7")),
        # The batch shell itself.
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}, Place(job="7")),
    ],
)
def test_place(env: dict[str, str], place: Place) -> None:
    assert Place.find(env) == place


def test_a_child_of_no_job() -> None:
    env = {**OPEN_MPI, **SRUN, "PMIX_RANK": "1", "OMPI_MCA_pml": "ob1", "PATH": "/bin"}
    assert alone(env) == {"OMPI_MCA_pml": "ob1", "PATH": "/bin"}


def test_core_lists() -> None:
    assert numbers("0-2,5,7-8") == [0, 1, 2, 5, 7, 8]
    assert numbers("") == []


def test_facts_where_the_system_tells_no_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert gather(System()).cores == list(range(os.cpu_count() or 1))


# --- children ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("import os; os.abort()", "was killed by SIGABRT"),
        ("raise ValueError('no luck')", "ValueError: no luck"),
        ("import sys; sys.exit(3)", "ended with status 3"),
    ],
)
def test_how_a_child_ended(code: str, how: str) -> None:
    answer = System().call(sys.executable, "-c", code)
    assert not answer.ok
    assert answer.how() == how


def test_a_child_that_hangs_tells_how_far_it_came() -> None:
    code = "import time; print('{\"stage\": 1}', flush=True); time.sleep(600)"
    answer = children.call([sys.executable, "-c", code], {}, 10)
    assert answer.status is None
    assert answer.data() == {"stage": 1}
    assert answer.how() == "did not end in 10 s"


def test_a_child_keeps_the_descriptor_of_its_launcher() -> None:
    """MPICH's Hydra speaks with a rank over the descriptor that PMI_FD names."""
    read, write = os.pipe()
    code = "import os; os.write(int(os.environ['PMI_FD']), b'cmd=init')"
    try:
        answer = System(env={"PMI_FD": str(write)}).call(sys.executable, "-c", code)
        assert answer.ok, answer
        assert os.read(read, 100) == b"cmd=init"
    finally:
        os.close(read)
        os.close(write)
    # Not a descriptor of this process, or none at all: the child starts without.
    for text in (str(write), "none", "9" * 30, ""):
        assert System(env={"PMI_FD": text}).call(sys.executable, "-c", "").ok


def test_a_program_that_is_missing() -> None:
    answer = System().call("no-such-program")
    assert "no-such-program" in answer.how()


# --- Python, and a check that fails itself ------------------------------------------------------


@provokes("python.old")
def test_old_python(tmp_path: Path) -> None:
    """The fix runs the newer Python that is on PATH, here one of ours."""
    newer = script(tmp_path / "bin", "python3.13", f'exec {sys.executable} "$@"')
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "bootstrap.py").write_text(
        "import pathlib, sys\n"
        "assert sys.argv[1:] == ['setup']\n"
        "venv = pathlib.Path(__file__).parents[1] / '.venv' / 'bin'\n"
        "venv.mkdir(parents=True)\n"
        "(venv / 'python').symlink_to(sys.executable)\n"
        "(venv / 'activate').write_text(f'PATH={venv}:$PATH')\n"
    )
    why, fix = interpreter.complaint((3, 9, 2), str(newer.parent), tmp_path)
    assert why == "Python 3.9 is too old: hpcsync needs 3.11 or newer"
    told = shell(f"{fix}\npython -c 'import sys; print(sys.version_info[:2])'")
    assert told.startswith(str(sys.version_info[:2]))
    assert interpreter.complaint(tuple(sys.version_info), None, tmp_path) is None
    (found,) = software.python(System(version=(3, 9, 2), env={"PATH": str(newer.parent)}))
    assert (found.code, found.status) == ("python.old", Status.FAIL)


def test_old_python_without_a_checkout_or_a_newer_one(tmp_path: Path) -> None:
    newer = script(tmp_path, "python3.12", "")
    assert interpreter.complaint((3, 9, 2), str(tmp_path), "/nowhere")[1] == (
        f"{newer} -m venv ~/hpcsync && . ~/hpcsync/bin/activate"
        " && python -m pip install 'hpcsync[mpi]'"
    )
    assert "uv python install" in interpreter.complaint((3, 9, 2), "/nowhere", "/nowhere")[1]


def test_old_python_reports_as_json_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(interpreter, "complaint", lambda *_: ("too old", "newer"))
    for name in interpreter._RANKS:
        monkeypatch.delenv(name, raising=False)
    assert doctor_main(["--json", "--only", "shm"]) == 1
    told = json.loads(capsys.readouterr().out)
    entries = report.merge([(0, told["where"], fail("python.old", "too old", "newer"))], ())
    whole = report.Report(where=told["where"], entries=entries, ranks=1, heard=1)
    assert told == json.loads(report.document(whole))
    assert doctor_main([]) == 1
    assert capsys.readouterr().out.startswith("  FAIL  python  too old\n")
    monkeypatch.setenv("PMI_RANK", "1")
    assert doctor_main(["--json"]) == 1
    assert not capsys.readouterr().out


def test_a_python_that_takes_no_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's own says so beside its library, and pip may be missing."""
    bin_ = System(python="/usr/bin/python3", takes_packages=False).pip("rich")
    setup, activate = f"{ROOT}/tools/bootstrap.py setup", f". {ROOT}/.venv/bin/activate"
    assert bin_ == f"/usr/bin/python3 {setup} && {activate}"
    assert interpreter.environment("python3", tmp_path).startswith("python3 -m venv ")
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    for prefix, pip, takes in (
        (sys.base_prefix, "json", False),
        ("/venv", "json", True),
        ("/venv", None, False),
    ):
        monkeypatch.setattr(sys, "prefix", prefix)
        monkeypatch.setattr("importlib.util.find_spec", lambda _, pip=pip: pip)
        assert System().takes_packages == takes
    (tmp_path / "EXTERNALLY-MANAGED").unlink()
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: "pip")
    assert System().takes_packages


def test_a_look_at_a_file_system_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert world._seen(str(tmp_path), 240)
    assert not world._seen(str(tmp_path / "none"), 240)
    done = threading.Event()
    monkeypatch.setattr("os.path.exists", lambda _: done.wait(240))
    assert not world._seen(str(tmp_path), 0.1)
    done.set()


def test_the_oldest_python_is_that_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'requires-python = ">={}.{}"'.format(*interpreter.OLDEST) in text


@provokes("shm.error")
def test_a_check_that_fails_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(system: System) -> list[Finding]:
        raise RuntimeError("no luck")

    other = next(check for check in checks.CHECKS if check.name == "limits")
    monkeypatch.setattr(checks, "CHECKS", (Check("shm", Scope.NODE, broken), other))
    (found,) = checks.mine(System(command=("doctor",)), ["shm"])
    assert found.status == Status.FAIL
    assert found.why.startswith("the check itself failed: RuntimeError: no luck: a defect")
    assert found.fix == "doctor --only shm --debug"
    assert "Traceback" not in capsys.readouterr().err
    options = make_parser().parse_args(found.fix.split()[1:])
    assert list(checks.mine(System(debug=options.debug), [options.only]))
    assert "in broken\n" in capsys.readouterr().err
    # The others are made nevertheless.
    assert [each.status for each in checks.mine(System(), ["limits"])] == [Status.PASS]


def test_helper_follows_a_fix() -> None:
    def check(system: System) -> list[Finding]:
        if system.env.get("X") == "1":
            return [good("x", "")]
        return [warn("x.unset", "", "export X=1")]

    assert mended_here(check, "x.unset", System(env={"PATH": "/bin:/usr/bin"})).code == "x.unset"
