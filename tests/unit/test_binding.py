"""The places of ranks: in words, and devices that two of them would share."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

from hpcsync import binding, cuda_state
from hpcsync.binding import Place, Seen
from hpcsync.cuda_state import CudaState, Gpu
from hpcsync.errors import DeviceError, LaunchError, UserError
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


# ---- the device of each rank ---------------------------------------------------------------------


def assigned(*seen: str, share: bool = False, host: str = "h") -> list[int]:
    return binding.assign([Seen(host, tuple(gpus)) for gpus in seen], share=share)


def test_each_rank_takes_a_gpu_of_its_own() -> None:
    assert assigned("abcd", "abcd", "abcd") == [0, 1, 2]
    assert assigned("a", "b", "c") == [0, 0, 0], "the launcher has bound them"
    assert assigned("ab", "cd", "ef") == [0, 0, 0]
    assert assigned("ab", "a") == [1, 0], "who has no choice comes first"
    assert assigned("abc", "ab", "a") == [2, 1, 0]
    two = [Seen("x", ("a",)), Seen("y", ("a",))]
    assert binding.assign(two, share=False) == [0, 0], "each host counts its own"


def test_fewer_gpus_than_ranks() -> None:
    with pytest.raises(LaunchError, match=r"h has 3 ranks but 2 GPUs .*share_devices=true"):
        assigned("ab", "ab", "ab")
    with pytest.raises(LaunchError, match=r"2 ranks but 1 GPU for them"):
        assigned("a", "a")
    assert assigned("ab", "ab", "ab", "ab", share=True) == [0, 1, 0, 1]
    assert assigned("a", "a", "a", share=True) == [0, 0, 0]


class Job:
    """Of ranks that see what they are told to see."""

    host = "h"

    def __init__(self, rank: int, *states: CudaState) -> None:
        self.rank, self.states, self.told = rank, states, None

    def allgather_object(self, own: Seen) -> list[Seen]:
        return [
            dataclasses.replace(
                own,
                gpus=tuple(gpu.uuid for gpu in state.gpus),
                problem=cuda_state.problem(state),
                note=cuda_state.resolve("auto", state)[1],
            )
            for state in self.states
        ]

    def agree(self, problem: UserError | None) -> None:
        if problem:
            raise problem


GPU = CudaState(
    driver=13000,
    gpus=(Gpu("H100", "a"),),
    torch_cuda="13.0",
    cupy="13.6",
    cupy_cuda=13000,
    packages=("cupy-cuda13x",),
)


def chosen(wanted: str, *states: CudaState, rank: int = 0, share: bool = False) -> tuple[str, int]:
    job = Job(rank, *states)
    return binding.choose(job, wanted, share=share, look=lambda: states[rank])  # type: ignore[arg-type]


def test_all_ranks_compute_on_the_same_kind(capsys: pytest.CaptureFixture[str]) -> None:
    two = dataclasses.replace(GPU, gpus=(Gpu("H100", "a"), Gpu("H100", "b")))
    old = dataclasses.replace(GPU, driver=12040)
    assert chosen("cpu", CudaState()) == ("cpu", 0)
    assert chosen("auto", CudaState(), CudaState()) == ("cpu", 0)
    assert chosen("auto", GPU) == ("cuda", 0)
    assert chosen("cuda", two, two, rank=1) == ("cuda", 1)
    assert capsys.readouterr().err == ""
    assert chosen("auto", two, old) == ("cpu", 0)
    assert "the GPU is not used: the NVIDIA driver runs CUDA 12.4" in capsys.readouterr().err
    assert chosen("auto", two, old, rank=1) == ("cpu", 0)
    assert capsys.readouterr().err == "", "rank 0 tells it"


def test_a_gpu_that_cannot_be_had_ends_the_job() -> None:
    with pytest.raises(DeviceError, match=r"^train.device: cuda: h: no NVIDIA driver is here"):
        chosen("cuda", GPU, CudaState())
    with pytest.raises(LaunchError, match="2 ranks but 1 GPU for them"):
        chosen("cuda", GPU, GPU)
    for wanted in ("auto", "cuda"):
        assert chosen(wanted, GPU, GPU, share=True, rank=1) == ("cuda", 0)


def test_more_ranks_than_gpus_compute_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert chosen("auto", GPU, GPU, rank=1) == ("cpu", 0)
    assert capsys.readouterr().err == "", "rank 0 tells it"
    assert chosen("auto", GPU, GPU) == ("cpu", 0)
    told = capsys.readouterr().err
    assert told.startswith("hpcsync: warning: the GPU is not used: h has 2 ranks but 1 GPU for")
    assert told.count("\n") == 1


def test_a_gpu_in_prohibited_mode_is_no_ranks() -> None:
    closed = Gpu("H100", "a", cuda_state.PROHIBITED)
    some = dataclasses.replace(GPU, gpus=(closed, Gpu("H100", "b"), closed, Gpu("H100", "c")))
    assert binding._seen("h", "auto", some) == Seen("h", ("", "b", "", "c"))
    seen = [binding._seen("h", "auto", some)] * 3
    assert binding.assign(seen[:2], share=False) == [1, 3], "as torch counts them"
    assert binding.assign(seen, share=True) == [1, 3, 1]
    with pytest.raises(LaunchError, match="3 ranks but 2 GPUs"):
        binding.assign(seen, share=False)


def test_this_process() -> None:
    place = binding.here(torch.device("cpu"))
    assert place == Place(frozenset(os.sched_getaffinity(0)))


def test_parts_of_a_gpu_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the names that the driver gives them, where torch may have that of the whole."""
    gpus = Gpu("A100 MIG 1g", "aa"), Gpu("A100 MIG 1g", "bb")
    monkeypatch.setattr(cuda_state, "visible_gpus", lambda: gpus)
    places = [binding.here(torch.device("cuda", index)) for index in range(2)]
    assert [each.device for each in places] == ["GPU aa", "GPU bb"]
    binding.check_devices(places)


@pytest.mark.gpu
def test_a_gpu_is_known_by_its_own_name() -> None:
    place = binding.here(torch.device("cuda", 0))
    assert place.device.startswith("GPU ")
    with pytest.raises(LaunchError, match="ranks 0-1 share GPU"):
        binding.check_devices([place, binding.here(torch.device("cuda"))])
