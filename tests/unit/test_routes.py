"""Which transports gradients on a device go by, and what is told where one cannot."""

from __future__ import annotations

import pytest

from hpcsync.collectives.routes import Facts, agreed, asked, check_host, choose
from hpcsync.errors import UserError

ALL = Facts(cuda_ipc="", mpi_device="", nccl="")
NONE = Facts(cuda_ipc="no peer access", mpi_device="it crashed", nccl="CuPy lacks it")


def names(node: str, rail: str, facts: Facts) -> tuple[str, str]:
    routes = choose(node, rail, facts)
    return routes.node.transport, routes.rail.transport


@pytest.mark.parametrize(
    ("node", "rail", "facts", "expected"),
    [
        ("auto", "auto", ALL, ("cuda_ipc", "mpi_device")),
        ("auto", "auto", NONE, ("mpi_staged", "mpi_staged")),
        ("auto", "auto", Facts(), ("cuda_ipc", "mpi_staged")),
        ("auto", "auto", Facts(cuda_ipc="no", mpi_device=""), ("mpi_device", "mpi_device")),
        ("mpi_staged", "auto", ALL, ("mpi_staged", "mpi_device")),
        ("auto", "mpi_staged", ALL, ("cuda_ipc", "mpi_staged")),
        ("nccl", "auto", ALL, ("nccl", "mpi_staged")),
        ("nccl", "mpi_staged", ALL, ("nccl", "mpi_staged")),
        ("mpi_device", "mpi_device", ALL, ("mpi_device", "mpi_device")),
    ],
)
def test_choice(node: str, rail: str, facts: Facts, expected: tuple[str, str]) -> None:
    assert names(node, rail, facts) == expected


def test_what_is_not_used_is_told() -> None:
    routes = choose("auto", "auto", NONE)
    assert routes.node.described == (
        "mpi_staged (no cuda_ipc: no peer access; no mpi_device: it crashed)"
    )
    assert routes.rail.described == "mpi_staged (no mpi_device: it crashed)"
    assert choose("auto", "auto", ALL).node.described == "cuda_ipc"


@pytest.mark.parametrize(
    ("node", "rail", "facts", "text"),
    [
        (
            "cuda_ipc",
            "auto",
            NONE,
            "comm.transport.node: cuda_ipc cannot be used: no peer access; use "
            "comm.transport.node=auto",
        ),
        (
            "auto",
            "mpi_device",
            NONE,
            "comm.transport.rail: mpi_device cannot be used: it crashed; use "
            "comm.transport.rail=auto",
        ),
        (
            "nccl",
            "auto",
            NONE,
            "comm.transport.node: nccl cannot be used: CuPy lacks it; use comm.transport.node=auto",
        ),
        (
            "shared_memory",
            "auto",
            ALL,
            "comm.transport.node: shared_memory does not join device memory; use auto or one of "
            "cuda_ipc, mpi_device, mpi_staged, nccl",
        ),
        (
            "auto",
            "mpi_host",
            ALL,
            "comm.transport.rail: mpi_host does not join device memory; use auto or one of "
            "mpi_device, mpi_staged",
        ),
        (
            "nccl",
            "mpi_device",
            ALL,
            "comm.transport.rail: mpi_device and nccl would wait for each other on one GPU; use "
            "comm.transport.rail=mpi_staged, or comm.transport.node=cuda_ipc",
        ),
    ],
)
def test_what_cannot_work_is_an_error(node: str, rail: str, facts: Facts, text: str) -> None:
    with pytest.raises(UserError) as raised:
        choose(node, rail, facts)
    assert str(raised.value) == text


@pytest.mark.parametrize(
    ("node", "rail"), [("cuda_ipc", "auto"), ("nccl", "auto"), ("auto", "mpi_staged")]
)
def test_devices_transports_do_not_join_host_memory(node: str, rail: str) -> None:
    with pytest.raises(UserError, match=r"^comm\.transport\.\w+: .* on the host; use .*=auto$"):
        check_host(node, rail)


def test_the_host_takes_its_own() -> None:
    for node in ("auto", "shared_memory", "mpi_host"):
        check_host(node, "auto")
        check_host(node, "mpi_host")


def test_what_one_rank_cannot_use_none_does() -> None:
    both = agreed([ALL, NONE, Facts(cuda_ipc="another reason", mpi_device="", nccl="")])
    assert both == NONE
    assert agreed([ALL, ALL]) == ALL


def test_only_what_may_be_used_is_tried() -> None:
    assert asked("auto", "auto") == ["cuda_ipc", "mpi_device", "mpi_staged"]
    assert asked("nccl", "mpi_staged") == ["mpi_staged", "nccl"]
    assert asked("cuda_ipc", "auto") == ["cuda_ipc", "mpi_device", "mpi_staged"]
