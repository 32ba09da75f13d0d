"""Where a module is, and the collectives that reach it there."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from torch import Tensor

from .. import device as devices
from ..collectives import Collectives, routes
from ..collectives.routes import Facts
from ..config import CommConfig
from ..device import Device
from ..device_probe.survey import survey
from ..launch import Runtime
from ..trace.recorder import Recorder


def device_of(tensors: Iterable[Tensor]) -> Device:
    """The device of the first tensor that can be exchanged; the host if there is none.

    Raises:
        DeviceError: it cannot be used; the text says why.
    """
    known = ("cpu", *devices.DEVICES)
    where = next((each.device for each in tensors if each.device.type in known), None)
    return get("cpu" if where is None else where.type, (where and where.index) or 0)


def get(name: str, index: int = 0) -> Device:
    """``device.get``, once: a device has streams and memory that all who use it share.

    Raises:
        DeviceError: as it does.
    """
    return _made(name, index)


@functools.cache
def _made(name: str, index: int) -> Device:
    return devices.get(name, index)


def collectives_on(
    runtime: Runtime, comm: CommConfig, device: Device, recorder: Recorder | None = None
) -> Collectives:
    """Collectives for gradients on this device; collective.

    Raises:
        UserError: the transports of the deck cannot work there.
    """
    facts, words = Facts(), ""
    if device.probe is not None and runtime.size > 1:
        asked = routes.asked(comm.node_transport, comm.rail_transport)
        found = survey(runtime, device, asked)
        facts, words = routes.facts_of(found.problems), found.words
    made = Collectives(runtime, comm, recorder, device, facts)
    made.tried = words
    return made
