"""Schedules run over transports: collectives that start, go on in the background, and end."""

from __future__ import annotations

from .collective import Collective
from .context import Collectives

__all__ = ["Collective", "Collectives"]
