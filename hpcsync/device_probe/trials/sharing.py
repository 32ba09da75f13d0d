"""Memory and events between two processes: the second adds to what the first has made."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...children import end_with_parent, tell
from ...device.base import Device, dtype_of
from . import FailedError, down, same, say, up

_COUNT = 1 << 20
_FLOAT32 = dtype_of("float32")


def run(device: Device, spec: str, index: int, env: Mapping[str, str]) -> None:
    """Make, share, have another process add, and look; on a second GPU too, if there is one."""
    say("making memory and an event for other processes")
    given = np.arange(_COUNT, dtype=np.float32)
    memory = device.empty(4 * _COUNT, shared=True)
    event = device.shared_event()
    offer = {"memory": device.offer(memory).hex(), "event": event.handle.hex()}
    for other in places(index):
        stream, source = device.stream(), up(device, given)
        stream.copy(memory.view(np.float32), source)
        stream.record(event)
        where = "on the same GPU" if other == index else f"on GPU {other}"
        say(f"opening it in another process {where}")
        child = subprocess.Popen(
            [sys.executable, "-m", __name__, spec, str(other)],
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            told = _asked(child, offer)
            say(f"waiting for what another process added {where}")
            added = device.open_event(bytes.fromhex(told["event"]))
            stream.wait(added)
            stream.synchronize()
            same(down(device, memory.view(np.float32)), 2 * given, f"another process's sum {where}")
        finally:
            _end(child)


def places(index: int) -> list[int]:
    """The devices of the second process: the same, and another one that must reach its memory."""
    try:
        import torch

        count = torch.cuda.device_count()
    except (ImportError, RuntimeError):
        count = 1
    return [index] if count < 2 else [index, (index + 1) % count]


def _asked(child: subprocess.Popen[str], offer: Mapping[str, str]) -> dict[str, Any]:
    """What the other process answers to an offer.

    Raises:
        FailedError: it could not do its part.
    """
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(json.dumps(offer) + "\n")
        child.stdin.flush()
    except BrokenPipeError:
        pass  # its end tells more
    for line in child.stdout:
        try:
            told = json.loads(line)
        except ValueError:  # a library has printed something
            continue
        if not isinstance(told, dict):
            continue
        if "failed" in told:
            raise FailedError(f"another process: {told['failed']}")
        if "event" in told:
            return told
    status = child.wait()
    if status < 0:
        raise FailedError(f"another process was killed by {signal.Signals(-status).name}")
    raise FailedError(f"another process ended with status {status}")


def _end(child: subprocess.Popen[str]) -> None:
    if child.stdin is not None:
        child.stdin.close()  # what it opened is not used any more
    child.wait()


def other(spec: str, index: int) -> None:
    """The second process: add own numbers to what the first one made, in the order of its event."""
    module, _, kind = spec.partition(":")
    device: Device = getattr(importlib.import_module(module), kind)(index)
    offer = json.loads(sys.stdin.readline())
    theirs = device.open(bytes.fromhex(offer["memory"])).view(np.float32)
    own = up(device, np.arange(_COUNT, dtype=np.float32))
    stream, done = device.stream(), device.shared_event()
    stream.wait(device.open_event(bytes.fromhex(offer["event"])))
    stream.reduce([theirs], [theirs, own], _FLOAT32)
    stream.record(done)
    tell(event=done.handle.hex())
    stream.synchronize()
    sys.stdin.read()  # until the first one has looked


if __name__ == "__main__":
    end_with_parent()
    try:
        other(sys.argv[1], int(sys.argv[2]))
    except Exception as error:
        tell(failed=f"{type(error).__name__}: {' '.join(str(error).split())}")
    sys.stdout.flush()
    os._exit(0)
