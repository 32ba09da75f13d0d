"""What a job finds out about its devices while it runs: children try them, and the job goes on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from hpcsync.config import TopologyConfig
from hpcsync.device.base import Probe
from hpcsync.device_probe.survey import survey
from hpcsync.errors import DeviceError
from hpcsync.launch import start
from tests import probed

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.timeout(300)]
ASKED = ["cuda_ipc", "mpi_device", "mpi_staged"]


class Thing:
    """A device, as far as a survey looks at it."""

    probe = Probe(probed.SPEC, 0, {"driver": "13.0"})


def found(runtime: Any, folder: Path) -> Any:
    device: Any = Thing()
    before = dict(os.environ)
    result = survey(runtime, device, ASKED, folder=folder)
    assert dict(os.environ) == before
    assert runtime.allreduce_scalar([1.0]) == [runtime.size], "the job goes on"
    every = runtime.allgather_object(result)
    assert all(each == result for each in every), "all ranks know the same"
    return result


def test_ranks_try_once_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start(TopologyConfig()) as runtime:
        folder = runtime.bcast(tmp_path)
        first = found(runtime, folder)
        assert first.problems == dict.fromkeys(ASKED, "")
        assert first.words.startswith("tried now, in ")
        again = found(runtime, folder)
        assert again.words.startswith("as tried on ")
        monkeypatch.setenv("FAULT", "mpi_pair crash")
        monkeypatch.setenv("UCX_TLS", "other settings are tried anew")
        other = found(runtime, folder)
        assert (other.problems["cuda_ipc"], other.problems["mpi_staged"]) == ("", "")
        assert "one of two processes" in other.problems["mpi_device"]
        assert f"[{runtime.host}]" in other.problems["mpi_device"]


def test_a_device_that_dies_ends_no_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", "start crash")
    with start(TopologyConfig()) as runtime:
        folder = runtime.bcast(tmp_path)
        with pytest.raises(DeviceError, match="does not work: opening the device"):
            found(runtime, folder)
