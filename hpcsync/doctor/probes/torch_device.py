"""Imports torch and asks for its devices."""

from __future__ import annotations

import importlib.util
import warnings

from ... import cuda_state
from . import tell


def main() -> None:
    """Tell version, the accelerator that torch was built for, and the devices that it sees."""
    import torch

    tell(version=torch.__version__, cuda=torch.version.cuda, hip=getattr(torch.version, "hip", ""))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
        count = torch.cuda.device_count() if available else 0
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    complaint = str(said[0].message).partition("\n")[0] if said else ""
    cupy = importlib.util.find_spec("cupy") is not None
    tell(available=available, names=names, complaint=complaint, cupy=cupy)
    tell(driver=cuda_state.driver_version())
    if cuda_state.driver_version():
        state = cuda_state.look()
        tell(modes=[gpu.mode for gpu in state.gpus], problem_of_cupy=cuda_state.of_cupy(state))


if __name__ == "__main__":
    main()
