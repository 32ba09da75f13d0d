"""What ranks do in tests of several processes on a GPU: ``python -m tests.gpu.ranks NAME ...``.

Several ranks may share one GPU. A check that fails ends the job with its traceback.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hpcsync import binding, launch
from hpcsync import config as configs
from hpcsync.config import Config
from hpcsync.device import Device, dtype_of
from hpcsync.parallel.placement import collectives_on, get
from hpcsync.runtime import Runtime

LENGTHS = (1, 17, 1000, 4099, 300_001, 3_000_017)
DTYPES = ("float32", "bfloat16", "float16", "float64", "int32", "int64", "uint8")
SYNCHRONISES = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")


def read(device: Device, array: Any) -> NDArray[Any]:
    """What a device's array holds."""
    host = device.pinned(array.nbytes)
    stream = device.current()
    stream.copy(host, array.view(np.uint8))
    stream.synchronize()
    return host.view(array.dtype).copy()


def write(device: Device, array: Any, values: NDArray[Any]) -> None:
    """Set what a device's array holds."""
    host = device.pinned(array.nbytes)
    host[:] = np.ascontiguousarray(values).view(np.uint8)
    stream = device.current()
    stream.copy(array.view(np.uint8), host)
    stream.synchronize()


def busy() -> None:
    """Give the current stream work for some milliseconds."""
    matrix = torch.ones(2048, 2048, device="cuda")
    for _ in range(20):
        matrix = matrix @ matrix / 2048


def share(runtime: Runtime, device: Device, config: Config, words: Sequence[str]) -> None:
    """Memory and events of every rank are opened by all; what is read was written before."""
    n = 1_000_003
    stream = device.stream()
    memory = device.empty(4 * n, shared=True).view(np.float32)
    events = [device.shared_event() for _ in range(2)]
    own = (device.offer(memory.view(np.uint8)), [each.handle for each in events])
    every = runtime.allgather_object(own)
    peers = [device.open(offer).view(np.float32) for offer, _ in every]
    foreign = [[device.open_event(handle) for handle in handles] for _, handles in every]
    total = device.empty(4 * n).view(np.float32)
    for run in range(6):
        with stream:
            busy()
            torch.from_dlpack(memory).fill_(float(run * runtime.size + runtime.rank))
        stream.record(events[run % 2])
        runtime.barrier()  # every host has recorded, hardly a device has come there
        for theirs in foreign:
            stream.wait(theirs[run % 2])
        stream.reduce([total], peers, dtype_of("float32"))
        stream.synchronize()
        wanted = sum(run * runtime.size + rank for rank in range(runtime.size))
        assert (read(device, total) == wanted).all(), f"run {run}"
        runtime.barrier()  # nobody writes what others still read


def sums(runtime: Runtime, device: Device, config: Config, words: Sequence[str]) -> None:
    """Allreduces of device memory, again and again, with results that are exact."""
    collectives = collectives_on(runtime, config.comm, device)
    told = collectives.describe_transports()
    if words:
        assert any(text.startswith(words[0]) for text in told.values()), told
    for name in DTYPES:
        dtype = dtype_of(name)
        for count in LENGTHS:
            buffer = collectives.arena(count * dtype.itemsize)
            bound = collectives.allreduce(buffer, dtype, count=count)
            array = buffer.own.view(dtype.storage)
            for run in range(2):
                values = [_values(name, count, rank, run) for rank in range(runtime.size)]
                write(device, array, _stored(values[runtime.rank], name))
                bound.start(after=[device.current().record()])
                bound.wait()
                bound.join(device.current())
                wanted = _stored(sum(values[1:], values[0]), name)
                np.testing.assert_array_equal(read(device, array), wanted, f"{name} {count}")
            bound.close()
    if runtime.rank == 0:
        print(f"transports: {told}", flush=True)


def _values(name: str, count: int, rank: int, run: int) -> NDArray[Any]:
    """Small whole numbers: their sums are exact in every type."""
    kind = np.float64 if dtype_of(name).floating else np.int64
    return np.random.default_rng([count, rank, run]).integers(0, 16, count).astype(kind)


def _stored(values: NDArray[Any], name: str) -> NDArray[Any]:
    if name == "bfloat16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype_of(name).storage)


def quiet(runtime: Runtime, device: Device, config: Config, words: Sequence[str]) -> None:
    """A step that is profiled asks for no synchronisation, but what MPI needs."""
    from torch.profiler import ProfilerActivity, profile

    step = stepper(runtime, config)
    for _ in range(4):
        step()

    def seen_in(steps: int) -> Counter[str]:
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            for _ in range(steps):
                step()
        return Counter({each.key: each.count for each in seen.key_averages()})

    own = seen_in(0)  # the profiler's own waits
    found = seen_in(3)
    waits = {name: found[name] - own[name] for name in SYNCHRONISES if found[name] > own[name]}
    assert not waits
    assert not any("Memcpy" in name and "DtoH" in name for name in found)


def stepper(runtime: Runtime, config: Config) -> Callable[[], torch.Tensor]:
    """One training step of a small model with buffers, by an unchanged loop."""
    from hpcsync.parallel import DataParallel

    torch.manual_seed(0)
    layers = [torch.nn.Linear(1024, 1024) for _ in range(6)]
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(1024), *layers).cuda()
    model = DataParallel(module, runtime=runtime, comm=config.comm)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    inputs = torch.randn(64, 1024, device="cuda")

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return step


def gradients(runtime: Runtime, device: Device, config: Config, words: Sequence[str]) -> None:
    """The mean over ranks is the gradient of one rank with the whole batch, within rounding."""
    from hpcsync.parallel import DataParallel

    torch.manual_seed(1)
    module = torch.nn.Sequential(
        torch.nn.Linear(300, 500), torch.nn.GELU(), torch.nn.Linear(500, 7)
    ).cuda()
    batch = torch.randn(16 * runtime.size, 300, device="cuda")
    wanted = torch.autograd.grad(module(batch).square().mean(), list(module.parameters()))
    model = DataParallel(module, runtime=runtime, comm=config.comm)
    mine = batch[runtime.rank :: runtime.size]
    for _ in range(3):
        model.zero_grad()
        model(mine).square().mean().backward()
        for param, each in zip(module.parameters(), wanted, strict=True):
            torch.testing.assert_close(param.grad, each, rtol=1e-4, atol=1e-6)


PROGRAMS = {each.__name__: each for each in (share, sums, quiet, gradients)}  # name -> program


def main() -> int:
    """``NAME [transport that must be in use] [key=value ...]``"""
    name, *words = sys.argv[1:]
    keys = [word for word in words if "=" in word]
    config = configs.load(None, ["topology.share_devices=true", *keys])
    with launch.start(config.topology, config.comm.timeout_s) as runtime:
        kind, index = binding.choose(runtime, "cuda", share=True)
        PROGRAMS[name](runtime, get(kind, index), config, [w for w in words if "=" not in w])
    return 0


if __name__ == "__main__":
    launch.guard(main)
