"""Running out of memory, of the host or of a device, told in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import HpcsyncError


class ExhaustedError(HpcsyncError):
    """A rank has no more memory, of the host or of its device."""


@contextmanager
def memory_errors(where: str) -> Iterator[None]:
    """Turn running out of memory into one line that says what to change.

    Raises:
        ExhaustedError: out of memory; ``where`` names the stage, e.g. ``step 3``.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        # Without the place in torch's source that stands in front.
        reason = (str(error).strip() or "MemoryError").splitlines()[0].rpartition("] err == 0. ")[2]
        raise ExhaustedError(
            f"{where}: out of memory ({reason}); use more ranks or a larger train.accumulate, "
            "train.activation_checkpointing=true, or a smaller model or train.global_batch"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Host and device allocators of torch raise RuntimeErrors of several texts."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    words = ("can't allocate memory", "cannot allocate memory", "out of memory")
    return isinstance(error, RuntimeError) and any(word in text for word in words)
