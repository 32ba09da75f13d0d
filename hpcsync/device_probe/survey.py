"""What each host's device can do, known to all ranks: from a kept file, or by trying it now."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import __version__, launch
from ..device.base import Device, Probe
from ..errors import CollectiveTimeout, DeviceError
from ..runtime import Runtime
from . import kept
from .attempt import LIMIT_S, NAMES, Outcome, attempt

BASIC = ("memory", "sums")  # without these a device is of no use
# What a transport between ranks needs besides.
NEEDS: Mapping[str, Sequence[str]] = {
    "cuda_ipc": ("sharing",),
    "mpi_device": ("mpi", "mpi_pair"),
    "nccl": ("nccl",),
    "mpi_staged": (),
}
_LOOK_S = 0.01
Try = Callable[..., dict[str, Outcome]]


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found.

    Attributes:
        problems: of each transport that was asked about: why it cannot be used; empty if it can.
        words: when it was tried, and where that is kept; empty if nothing had to be tried.
    """

    problems: Mapping[str, str]
    words: str = ""


def survey(
    runtime: Runtime,
    device: Device,
    asked: Sequence[str],
    *,
    trying: Try = attempt,
    folder: Path | None = None,
    limit_s: float = LIMIT_S,
) -> Survey:
    """Find out which transports work on this device, on all hosts; collective.

    Args:
        asked: transports that may be used.
        trying: makes trials.
        folder: of kept outcomes; that of the user if not given.
        limit_s: seconds that a child may take.

    Raises:
        AgreedError: a device cannot even copy and add; a DeviceError, too.
    """
    if runtime.size == 1:
        return Survey(dict.fromkeys(asked, ""))
    names = [*BASIC, *dict.fromkeys(itertools.chain(*(NEEDS[name] for name in asked)))]
    told: tuple[dict[str, str], str] | None = None
    every = runtime.allgather_object(runtime.host)
    first = every.index(runtime.host) == runtime.rank
    if first and device.probe is not None:
        told = _find(runtime.host, device.probe, names, trying, folder, limit_s)
    _meet(runtime, limit_s * (len(names) + 1))
    found = [each for each in runtime.allgather_object(told) if each is not None]
    broken = next((text for each, _ in found for name in BASIC if (text := each[name])), "")
    runtime.agree(DeviceError(f"the device does not work: {broken}") if broken else None)
    problems = {
        transport: next(
            (text for each, _ in found for name in NEEDS[transport] if (text := each[name])), ""
        )
        for transport in asked
    }
    return Survey(problems, next((words for _, words in found), ""))


def identify(
    probe: Probe, library: tuple[str, str], env: Mapping[str, str] | None = None
) -> dict[str, str]:
    """What outcomes depend on.

    Args:
        library: name and path of MPI's.
    """
    name, path = library
    return {
        **probe.identity,
        "device": f"{probe.device} {probe.index}",
        "mpi": f"{name}, {path}",
        "settings": kept.settings(env),
        "hpcsync": __version__,
    }


def _find(
    host: str,
    probe: Probe,
    names: Sequence[str],
    trying: Try,
    folder: Path | None,
    limit_s: float,
) -> tuple[dict[str, str], str]:
    """The problem of each trial on this host, and where that is from."""
    if probe.refusal:
        return {name: "" if name in BASIC else _on(host, probe.refusal) for name in names}, ""
    identity, path = identify(probe, launch.mpi_library()), kept.path_of(host, folder)
    if (old := kept.read(path, identity, names)) is not None:
        words = f"as tried on {old.made:%Y-%m-%d %H:%M} UTC, kept in {path}"
        return {name: _on(host, each.problem) for name, each in old.outcomes.items()}, words
    began = time.perf_counter()
    outcomes = trying(names, index=probe.index, device=probe.device, limit_s=limit_s)
    words = f"tried now, in {time.perf_counter() - began:.0f} s"
    before = kept.read(path, identity, [name for name in NAMES if name not in names])
    if kept.write(path, identity, {**(before.outcomes if before else {}), **outcomes}):
        words += f", kept in {path}"
    return {name: _on(host, outcomes[name].problem) for name in names}, words


def _on(host: str, problem: str) -> str:
    return f"{problem} [{host}]" if problem else ""


def _meet(runtime: Runtime, patience_s: float) -> None:
    """Wait for the ranks that try, longer than for a message."""
    began, request = time.perf_counter(), runtime.comm.Ibarrier()
    while not request.Test():
        if time.perf_counter() - began > patience_s + max(runtime.timeout_s, LIMIT_S):
            raise CollectiveTimeout("a rank that tries what its GPU can do does not end")
        time.sleep(_LOOK_S)
