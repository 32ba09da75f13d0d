"""Trials in children that crash, hang or come out wrong, and what is kept of them."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from hpcsync import cache_files, children
from hpcsync.device.base import Probe
from hpcsync.device.cpu import CpuDevice
from hpcsync.device_probe import kept
from hpcsync.device_probe.attempt import NAMES, Outcome, attempt
from hpcsync.device_probe.survey import BASIC, identify, survey
from hpcsync.device_probe.trials import FailedError, mpi_pair, sharing
from hpcsync.device_probe.trials import __main__ as trial
from hpcsync.errors import DeviceError, LaunchError, UserError
from tests import launcher, probed

pytestmark = pytest.mark.usefixtures("mpi")


def tried(fault: str = "", names: Sequence[str] = NAMES, limit_s: float = 100) -> dict[str, Any]:
    env = launcher.environment({"FAULT": fault})
    return attempt(names, device=probed.SPEC, env=env, limit_s=limit_s)


def test_what_works() -> None:
    assert tried() == {name: Outcome() for name in NAMES}


CRASHED = "killed by SIGSEGV"
MAKING = "making memory and an event for other processes"
FAULTS = {
    "sharing crash": ("sharing", MAKING, CRASHED),
    "sharing raise": ("sharing", "DeviceError: it cannot be done"),
    "opening crash": ("sharing", "another process was", CRASHED),
    "opening raise": ("sharing", "another process: DeviceError: it cannot be done"),
    "opening wrong": ("sharing", "another process's sum on the same GPU: "),
    "mpi crash": ("mpi", "giving device memory to ", "a prepared message of 256 bytes", CRASHED),
    "mpi wrong": ("mpi", "a prepared message of 256 bytes by ", "bytes came out wrong"),
    "mpi_pair crash": ("mpi_pair", "giving device memory to ", "one of two processes"),
    "mpi_pair raise": ("mpi_pair", "DeviceError: it cannot be done"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_that_fails_does_not_spoil_the_others(fault: str) -> None:
    trial, *parts = FAULTS[fault]
    found = tried(fault, ("memory", trial, "sums"))
    assert set(found) == {"memory", trial, "sums"}
    assert found["memory"] == found["sums"] == Outcome()
    told = found[trial].problem
    for part in parts:
        assert part in told
    assert "\n" not in told
    assert found[trial].lasting


def test_one_that_hangs() -> None:
    found = tried("sharing hang", ("memory", "sharing"), limit_s=15)
    assert found["memory"] == Outcome()
    assert "did not end in 15 s" in found["sharing"].problem
    assert not found["sharing"].lasting


@pytest.mark.parametrize("how", ["crash", "raise"])
def test_a_device_that_cannot_be_opened_is_tried_once(how: str) -> None:
    found = tried(f"start {how}", ("memory", "sums", "sharing"))
    assert len({outcome.problem for outcome in found.values()}) == 1
    problem = found["memory"].problem
    assert problem.startswith("opening the device: the child ")
    assert (CRASHED in problem) == (how == "crash")


@pytest.mark.parametrize("script", ["{run} > /dev/null", "test -e met && {run}; touch met; exit 1"])
def test_a_pair_whose_output_is_lost_or_that_starts_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    run = f'{launcher.find_mpirun()} "$@"'
    mpirun = tmp_path / "mpirun"
    mpirun.write_text(f"#!/bin/sh\n{script.format(run=run)}\n")
    mpirun.chmod(0o755)
    monkeypatch.setattr(mpi_pair, "_mpirun", lambda: str(mpirun))
    monkeypatch.chdir(tmp_path)
    env = launcher.environment({"FAULT": "mpi_pair crash"})
    with pytest.raises(FailedError, match=r"giving device memory to .*: one of two processes"):
        mpi_pair.run(CpuDevice(), probed.SPEC, 0, env)


def test_a_copy_that_comes_out_wrong() -> None:
    problem = tried("memory wrong", ("memory",))["memory"].problem
    assert problem.startswith("a copy: ")
    assert problem.endswith("bytes came out wrong")


def test_a_second_gpu_is_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert sharing.places(0) == [0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert sharing.places(0) == [0, 1]
    assert sharing.places(3) == [3, 0]


def test_lines_of_others_are_passed_over() -> None:
    text = "input(); print('a library'); print(3); print('{\"event\": \"aa\"}')"
    with subprocess.Popen(
        [sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert sharing._asked(child, {"memory": ""}) == {"event": "aa"}
        sharing._end(child)


def test_mpi_is_started_before_the_device_in_a_child_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches: list[list[str]] = []

    def call(command: Sequence[str], *_: Any) -> children.Answer:
        names = list(command[5:])
        batches.append(names)
        told = json.dumps({f"done {name}": "" for name in names})
        return children.Answer(0, told, "")

    monkeypatch.setattr(children, "call", call)
    assert attempt(NAMES) == {name: Outcome() for name in NAMES}
    assert batches == [["memory", "sums", "sharing"], ["mpi", "mpi_pair"]]

    def world() -> None:
        raise LaunchError("MPI does not start")

    monkeypatch.setattr(trial.launch, "world", world)
    told: list[dict[str, object]] = []
    monkeypatch.setattr(trial, "tell", lambda **facts: told.append(facts))
    monkeypatch.setattr(trial, "end_with_parent", lambda: None)
    assert trial.main(["no_such_module:Device", "0", "mpi"]) == 1
    assert told[-1] == {"done mpi": "MPI does not start"}


# ---- kept ----------------------------------------------------------------------------------------

WHO = {"driver": "13.0", "mpi": "Open MPI v5"}
GOOD = {"memory": Outcome(), "sharing": Outcome("no")}


def test_outcomes_are_kept_for_the_same_surroundings(tmp_path: Path) -> None:
    path = kept.path_of("node/1", tmp_path / "a" / "b")
    assert path.name == "device-probe-node_1.json"
    assert kept.read(path, WHO, list(GOOD)) is None
    assert kept.write(path, WHO, GOOD)
    found = kept.read(path, WHO, list(GOOD))
    assert found is not None
    assert (found.outcomes, found.path) == (GOOD, path)
    assert [each.name for each in path.parent.iterdir()] == [path.name], "nothing is left aside"
    assert kept.read(path, {**WHO, "driver": "13.1"}, list(GOOD)) is None
    assert kept.read(path, WHO, ["mpi"]) is None


def test_what_may_change_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert not kept.write(path, WHO, {"memory": Outcome("did not end", lasting=False)})
    assert not path.exists()
    path.mkdir()
    assert not kept.write(path, WHO, GOOD), "no place for a file is no fault"
    assert [each.name for each in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"format": "other"},
        {"made": "never"},
        {"made": "2001-01-01T00:00:00+00:00"},
        {"made": "2001-01-01T00:00:00"},
        {"outcomes": {"memory": 1, "sharing": ""}},
        {"outcomes": []},
        {"identity": None},
    ],
)
def test_other_files_count_as_none(tmp_path: Path, change: Mapping[str, Any]) -> None:
    path = tmp_path / "x.json"
    kept.write(path, WHO, GOOD)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert kept.read(path, WHO, list(GOOD)) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", "\0" * 99, "[" * 100_000])
def test_broken_files_count_as_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    assert kept.read(path, WHO, list(GOOD)) is None


def test_settings_of_mpi_cuda_and_torch_count() -> None:
    assert kept.settings({"PATH": "a"}) == kept.settings({"PATH": "b"})
    plain = kept.settings({})
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "I_MPI_OFFLOAD"):
        assert kept.settings({name: "expandable_segments:True"}) != plain, name
    assert kept.settings({"UCX_TLS": "a"}) != kept.settings({"UCX_TLS": "b"})
    assert cache_files.folder({"HOME": "/h"}) == Path("/h/.cache/hpcsync")
    assert cache_files.folder({"HOME": "/h", "XDG_CACHE_HOME": "/c"}) == Path("/c/hpcsync")


# ---- the survey of a job -------------------------------------------------------------------------


class Job:
    """Of two ranks on one host, the first of which this is."""

    rank, size, host, timeout_s = 0, 2, "h", 1.0

    def __init__(self) -> None:
        self.comm = self

    def Ibarrier(self) -> Job:  # noqa: N802
        return self

    def Test(self) -> bool:  # noqa: N802
        return True

    def allgather_object(self, own: Any) -> list[Any]:
        return [own, None if isinstance(own, tuple) else own]

    def agree(self, problem: UserError | None) -> None:
        if problem:
            raise problem


class Thing:
    """A device, as far as a survey looks at it."""

    probe: Probe | None = Probe("a:B", 3, {"driver": "13.0"})


class Tries:
    """Notes what is tried, and gives outcomes."""

    def __init__(self, **problems: str) -> None:
        self.problems, self.names = problems, []

    def __call__(self, names: Sequence[str], **options: Any) -> dict[str, Outcome]:
        assert (options["index"], options["device"]) == (3, "a:B")
        self.names.append(list(names))
        return {name: Outcome(self.problems.get(name, "")) for name in names}


def surveyed(tmp_path: Path, asked: Sequence[str], tries: Tries, device: Any = Thing) -> Any:
    job: Any = Job()
    return survey(job, device(), asked, trying=tries, folder=tmp_path)


def test_only_what_may_be_used_is_tried(tmp_path: Path) -> None:
    tries = Tries(mpi="it crashed")
    found = surveyed(tmp_path, ["cuda_ipc"], tries)
    assert found.problems == {"cuda_ipc": ""}
    assert found.words.startswith("tried now, in 0 s, kept in ")
    assert tries.names == [["memory", "sums", "sharing"]]
    found = surveyed(tmp_path, ["cuda_ipc"], tries)
    assert "as tried on " in found.words
    assert str(tmp_path) in found.words
    assert len(tries.names) == 1, "it was kept"
    found = surveyed(tmp_path, ["cuda_ipc", "mpi_device", "mpi_staged"], tries)
    assert found.problems == {"cuda_ipc": "", "mpi_device": "it crashed [h]", "mpi_staged": ""}
    surveyed(tmp_path, ["mpi_device"], tries)
    assert len(tries.names) == 2
    assert tries.names[1] == ["memory", "sums", "sharing", "mpi", "mpi_pair"]


def test_a_device_that_does_not_work_ends_the_job(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"^the device does not work: no kernel \[h\]"):
        surveyed(tmp_path, ["mpi_staged"], Tries(sums="no kernel"))


def test_where_nothing_is_tried(tmp_path: Path) -> None:
    tries = Tries()

    class Busy:
        probe = Probe("a:B", 3, {}, "the GPU is in exclusive mode")

    found = surveyed(tmp_path, ["cuda_ipc", "mpi_staged"], tries, Busy)
    assert found.problems == {"cuda_ipc": "the GPU is in exclusive mode [h]", "mpi_staged": ""}

    class Certain:
        probe = None

    assert surveyed(tmp_path, ["cuda_ipc"], tries, Certain).problems == {"cuda_ipc": ""}
    alone: Any = Job()
    alone.size = 1
    assert survey(alone, Thing(), ["cuda_ipc"], trying=tries).problems == {"cuda_ipc": ""}  # type: ignore[arg-type]
    assert tries.names == []
    assert len(BASIC) == 2


def test_identity() -> None:
    probe = Thing.probe
    assert probe is not None
    one = identify(probe, ("Open MPI", "/a"), {})
    assert one["driver"] == "13.0"
    assert one != identify(probe, ("Open MPI", "/b"), {})
    assert one != identify(probe, ("Open MPI", "/a"), {"UCX_TLS": "x"})
    today = datetime.datetime.now(datetime.UTC)
    assert str(today.year) not in json.dumps(one), "the day is not part of it"
