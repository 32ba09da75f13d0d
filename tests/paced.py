"""A model for jobs that are to be signalled: gpt, PACE_S seconds a step slower."""

from __future__ import annotations

import os
import time
from typing import Any

from torch import nn

from hpcsync.models import gpt


def build(config: Any, source: Any) -> nn.Module:
    """gpt as ``config`` has it."""
    model = gpt.build(config, source)
    pause = float(os.environ.get("PACE_S", "0"))
    model.register_forward_pre_hook(lambda module, inputs: time.sleep(pause))
    return model
