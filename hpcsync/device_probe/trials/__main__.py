"""``python -m hpcsync.device_probe.trials MODULE:CLASS INDEX TRIAL...``: try, and tell in JSON.

Ends with the first trial that fails: what it left behind would be blamed on the next.
"""

from __future__ import annotations

import importlib
import os
import sys

from ... import launch
from ...children import end_with_parent, tell
from ...device.base import Device
from ...errors import HpcsyncError
from . import FailedError, say


def main(words: list[str]) -> int:
    """Make the trials; the exit status is 0 if all came out right."""
    end_with_parent()
    surroundings = dict(os.environ)  # before MPI adds to it
    spec, index, *names = words
    if names[0] == "mpi":  # before the device is opened, as a job does
        tell(trial="mpi", step="starting MPI")
        try:
            launch.world()
        except HpcsyncError as error:
            tell(**{"done mpi": " ".join(str(error).split())})
            return 1
    say("loading torch and CuPy")
    module, _, kind = spec.partition(":")
    made = getattr(importlib.import_module(module), kind)
    say("opening the device")
    device: Device = made(int(index))
    for name in names:
        tell(trial=name, step="starting")
        trial = importlib.import_module(f"{__package__}.{name}")
        try:
            trial.run(device, spec, int(index), surroundings)
        except Exception as error:
            text = " ".join(str(error).split())
            told = text if isinstance(error, FailedError) else f"{type(error).__name__}: {text}"
            tell(**{f"done {name}": told or type(error).__name__})
            return 1
        tell(**{f"done {name}": ""})
    return 0


if __name__ == "__main__":
    sys.stdout.flush()
    status = main(sys.argv[1:])
    # Without the end of libraries that may wait for what a trial left undone.
    sys.stdout.flush()
    os._exit(status)
