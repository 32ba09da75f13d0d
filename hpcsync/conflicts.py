"""Settings that cannot work on the device that a deck names, in words; pure."""

from __future__ import annotations

from collections.abc import Iterator

from .sections import NODE_OF_GPUS, RAIL_OF_GPUS, CheckpointConfig, CommConfig

NCCL_AND_MPI = (
    "mpi_device and nccl would wait for each other on one GPU; use "
    "comm.transport.rail=mpi_staged, or comm.transport.node=cuda_ipc"
)
NATIVE = "native is MPI's own, which adds host memory only; on a device use {key}=auto"
REPLAY_LOG = "set checkpoint.replay_log=false and save more often, or train.device=cpu"


def of_gpus(level: str, name: str) -> str:
    """Why this transport of a level, node or rail, does nothing for gradients on the host."""
    return (
        f"{name} joins the memory of GPUs, and gradients are on the host; use "
        f"comm.transport.{level}=auto"
    )


def of_the_host(level: str, name: str) -> str:
    """Why this transport of a level does nothing for gradients on GPUs."""
    known = ", ".join(NODE_OF_GPUS if level == "node" else RAIL_OF_GPUS)
    return f"{name} does not join device memory; use auto or one of {known}"


def found(
    device: str, comm: CommConfig, checkpoint: CheckpointConfig
) -> Iterator[tuple[tuple[str, ...], str]]:
    """(keys, what is wrong) as of ``config.contradictions``.

    Args:
        device: ``train.device``; what depends on where a run comes to compute is left to the run.
    """
    levels = (("node", comm.node_transport), ("rail", comm.rail_transport))
    for level, name in levels:
        if name == "auto":
            continue
        keys = (f"comm.transport.{level}", "train.device")
        joins_gpus = name in NODE_OF_GPUS
        if device == "cpu" and joins_gpus:
            yield keys, of_gpus(level, name)
        elif device == "cuda" and not joins_gpus:
            yield keys, of_the_host(level, name)
    if comm.node_transport == "nccl" and comm.rail_transport == "mpi_device":
        yield ("comm.transport.rail", "comm.transport.node"), NCCL_AND_MPI
    if device != "cuda":
        return
    if checkpoint.replay_log:
        yield (
            ("checkpoint.replay_log", "train.device"),
            "it logs gradients in host memory, where each step on a GPU would wait for it; "
            f"{REPLAY_LOG}",
        )
    for key in ("algorithm", "rail_algorithm"):
        if getattr(comm, key) == "native":
            yield (f"comm.{key}", "train.device"), NATIVE.format(key=f"comm.{key}")
