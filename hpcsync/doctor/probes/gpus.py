"""Names the GPUs that a process sees here, in the order in which torch counts them."""

from __future__ import annotations

from ... import cuda_state
from . import tell


def main() -> None:
    """Ask the driver alone, which starts no GPU."""
    free = [gpu for gpu in cuda_state.visible_gpus() if gpu.mode != cuda_state.PROHIBITED]
    tell(gpus=[gpu.uuid for gpu in free])


if __name__ == "__main__":
    main()
