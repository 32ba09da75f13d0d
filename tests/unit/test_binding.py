"""The places of ranks: in words, and devices that two of them would share."""

from __future__ import annotations

import os

import pytest
import torch

from hpcsync import binding
from hpcsync.binding import Place
from hpcsync.errors import LaunchError
from hpcsync.topology import Topology


def describe(nodes: int, *cores: set[int]) -> str:
    topology = Topology.group([f"n{node}" for node in range(nodes) for _ in cores])
    places = [Place(frozenset(each)) for _ in range(nodes) for each in cores]
    return binding.describe(places, topology)


def test_bound_ranks() -> None:
    assert describe(1, {0}, {1}) == "cores 0 | 1"
    assert describe(4, {*range(8)}, {*range(8, 16)}) == "cores 0-7 | 8-15 on each of 4 nodes"
    assert describe(2, {3}) == "core 3 on each of 2 nodes"
    sixteen = [{core} for core in range(16)]
    assert describe(1, *sixteen) == "cores 0 | 1 | 2 | ... 12 more ... | 15"


def test_ranks_that_are_not_bound_or_bound_over_each_other() -> None:
    assert describe(1, {0, 1}, {0, 1}) == "not bound: 2 ranks on cores 0-1"
    assert describe(1, {0, 1}) == "cores 0-1"
    assert describe(1, {0, 1}, {1, 2}) == "cores 0-1 | 1-2, which overlap"


def test_nodes_that_differ() -> None:
    topology = Topology.group(["a", "a", "b", "c", "d"])
    places = [Place(frozenset({core})) for core in (0, 1, 0, 5, 6)]
    assert binding.describe(places, topology) == "a: cores 0 | 1; b: core 0; 2 more nodes"


def test_a_device_of_two_ranks_is_refused() -> None:
    cores = frozenset({0})
    binding.check_devices([Place(cores), Place(cores)])
    binding.check_devices([Place(cores, "GPU a"), Place(cores, "GPU b")])
    with pytest.raises(LaunchError, match=r"ranks 0, 2 share GPU a: .*share_devices=true"):
        binding.check_devices([Place(cores, f"GPU {name}") for name in "aba"])
    with pytest.raises(LaunchError, match="ranks 0-1 share GPU a, and 1 more such"):
        binding.check_devices([Place(cores, f"GPU {name}") for name in "aabb"])


def test_this_process() -> None:
    place = binding.here(torch.device("cpu"))
    assert place == Place(frozenset(os.sched_getaffinity(0)))


@pytest.mark.gpu
def test_a_gpu_is_known_by_its_own_name() -> None:
    place = binding.here(torch.device("cuda", 0))
    assert place.device.startswith("GPU ")
    with pytest.raises(LaunchError, match="ranks 0-1 share GPU"):
        binding.check_devices([place, binding.here(torch.device("cuda"))])
