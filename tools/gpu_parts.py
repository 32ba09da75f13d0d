"""What ranks do for bench_gpu: sums in a node, the staged pipeline, training steps.

Each part runs on the ranks of one job and returns the rows of its table. Work is given to streams
and the host's clock is read when they are done, over several calls: on the host's own device the
same code runs, so that it can be tried without a GPU.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hpcsync.collectives import Collectives
from hpcsync.config import Config
from hpcsync.device import Device, dtype_of
from hpcsync.parallel.placement import collectives_on
from hpcsync.runtime import Runtime
from tools.benchmark import MIB, median

SAMPLE_S = 0.02  # calls of one sample take at least about this long together
FLOAT = dtype_of("float32")
SYNCHRONISES = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")
Row = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a part runs.

    Attributes:
        rounds: of interleaved samples.
        quick: small sizes, to see that it works.
    """

    runtime: Runtime
    device: Device
    config: Config
    rounds: int
    quick: bool


# -- sums in a node ----------------------------------------------------------------------


class Sum:
    """An allreduce of device memory, as training does it."""

    def __init__(self, place: Place, nbytes: int) -> None:
        self.device, count = place.device, nbytes // 4
        self.collectives = collectives_on(place.runtime, place.config.comm, place.device)
        self.buffer = self.collectives.arena(nbytes)
        self.bound = self.collectives.allreduce(self.buffer, FLOAT, count=count)
        self.array = self.buffer.own.view(np.float32)

    def run(self) -> None:
        current = self.device.current()
        self.bound.start(after=[current.record()])
        self.bound.wait()
        self.bound.join(current)

    def wrong(self, runtime: Runtime) -> bool:
        """Whether a sum of whole numbers is not exact."""
        tensor = torch.from_dlpack(self.buffer.own).view(torch.float32)
        self.device.current().apply(lambda: tensor.fill_(float(runtime.rank + 1)))
        self.run()
        wanted = runtime.size * (runtime.size + 1) / 2
        self.device.current().synchronize()
        return bool((tensor != wanted).any())


def torch_sum(ranks: int, nbytes: int, device: Device) -> Callable[[], None]:
    """torch's own sum of as many buffers, copied to each of them: on one GPU the same work."""
    where = _torch_name(device)
    buffers = [torch.ones(nbytes // 4, device=where) for _ in range(ranks)]
    total = torch.empty_like(buffers[0])

    def run() -> None:
        torch.add(buffers[0], buffers[1], out=total)
        for each in buffers[2:]:
            total.add_(each)
        for each in buffers:
            each.copy_(total)

    return run


def node(place: Place) -> list[Row]:
    """The node's sum, and torch's add and copy on one rank alone."""
    rows = []
    for nbytes in (64 << 10, MIB) if place.quick else (64 << 10, MIB, 25 * MIB, 100 * MIB):
        ours = Sum(place, nbytes)
        theirs = torch_sum(place.runtime.size, nbytes, place.device)
        wrong = ours.wrong(place.runtime)
        own, other = turns(place, ours.run, theirs, alone=True)
        rows.append(
            {
                "ranks": place.runtime.size,
                "transport": named(ours.collectives),
                "bytes": nbytes,
                "seconds": median(own),
                "torch": median(other),
                "ratio": median(b / a for a, b in zip(own, other, strict=True)),
                "right": not place.runtime.allreduce_scalar([wrong], "max")[0],
            }
        )
        ours.bound.close()
    return rows


# -- the staged pipeline ------------------------------------------------------------------


class Plain:
    """A sum of two ranks by copy, send, copy: each waits for the one before.

    Each rank adds one half and sends it back, as the pipeline does.
    """

    def __init__(self, place: Place, nbytes: int) -> None:
        self.runtime, self.stream = place.runtime, place.device.stream()
        count = nbytes // 8
        self.array = place.device.empty(nbytes).view(np.float32)
        self.came = place.device.empty(nbytes // 2).view(np.float32)
        self.out, self.into = (place.device.pinned(nbytes // 2) for _ in range(2))
        halves = [self.array[:count], self.array[count:]]
        self.mine, self.other = halves[place.runtime.rank], halves[1 - place.runtime.rank]

    def run(self) -> None:
        self._exchange(self.other, self.came)
        self.stream.reduce([self.mine], [self.mine, self.came], FLOAT)
        self._exchange(self.mine, self.other)

    def _exchange(self, source: Any, target: Any) -> None:
        self.stream.copy(self.out, source.view(np.uint8))
        self.stream.synchronize()
        peer = 1 - self.runtime.rank
        self.runtime.comm.Sendrecv(self.out, peer, recvbuf=self.into, source=peer)
        self.stream.copy(target.view(np.uint8), self.into)
        self.stream.synchronize()


def staged(place: Place) -> list[Row]:
    """Chunks that are copied, sent and added all at once, against one step after the other."""
    rows = []
    for nbytes in (MIB,) if place.quick else (4 * MIB, 25 * MIB, 100 * MIB):
        ours, theirs = Sum(place, nbytes), Plain(place, nbytes)
        wrong = ours.wrong(place.runtime)
        own, other = turns(place, ours.run, theirs.run)
        rows.append(
            {
                "transport": named(ours.collectives),
                "bytes": nbytes,
                "seconds": median(own),
                "plain": median(other),
                "ratio": median(b / a for a, b in zip(own, other, strict=True)),
                "right": not place.runtime.allreduce_scalar([wrong], "max")[0],
            }
        )
        ours.bound.close()
    return rows


# -- training steps -----------------------------------------------------------------------


class Steps:
    """Steps of a GPT under an unchanged torch loop, with the exchange and without."""

    def __init__(self, place: Place) -> None:
        from hpcsync.models.gpt import GPT
        from hpcsync.parallel import DataParallel

        shape = {"vocab": 50257, "context": 1024, "layers": 12, "width": 768, "heads": 12}
        batch = 8
        if place.quick:
            shape = {"vocab": 512, "context": 64, "layers": 2, "width": 64, "heads": 2}
            batch = 2
        torch.manual_seed(1)
        where = _torch_name(place.device)
        self.place, self.module = place, GPT(**shape, hidden=4 * shape["width"]).to(where)
        given = torch.randint(0, shape["vocab"], (batch * place.runtime.size, shape["context"] + 1))
        self.tokens = given.to(where)
        self.wanted, self.cast = self._alone(), True
        comm = place.config.comm
        self.model = DataParallel(self.module, runtime=place.runtime, comm=comm)
        # Without a step the weights stay equal on all ranks, whatever is exchanged.
        fused = place.device.queued
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=0.0, weight_decay=0.0, fused=fused
        )
        self.samples = self.tokens[place.runtime.rank :: place.runtime.size]

    @property
    def parameters(self) -> int:
        return sum(each.numel() for each in self.module.parameters())

    def _loss(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(tokens[:, :-1], tokens[:, 1:])
        return loss

    def _alone(self) -> list[torch.Tensor]:
        """The gradients of one rank with every rank's first sample, in float32, on the host."""
        loss = self._loss(self.module, self.tokens[: self.place.runtime.size])
        found = torch.autograd.grad(loss, list(self.module.parameters()))
        return [each.to("cpu") for each in found]

    def error(self) -> float:
        """Of the ranks' mean gradients, the 2-norm relative to that of one rank's."""
        self.optimizer.zero_grad()
        self._loss(self.model, self.samples[:1]).backward()
        wrong = total = 0.0
        for param, wanted in zip(self.module.parameters(), self.wanted, strict=True):
            assert param.grad is not None
            wrong += float((param.grad.to("cpu") - wanted).double().square().sum())
            total += float(wanted.double().square().sum())
        return (wrong / total) ** 0.5

    def step(self, *, exchange: bool = True) -> None:
        self.optimizer.zero_grad()
        kind = self.samples.device.type
        with nullcontext() if exchange else self.model.no_sync():
            with torch.autocast(kind, torch.bfloat16):
                loss = self._loss(self.model, self.samples)
            loss.backward()
        self.optimizer.step()


def step(place: Place) -> list[Row]:
    """A step with and without the exchange; where its host waited; whether gradients are right."""
    steps = Steps(place)
    error = steps.error()
    steps.wanted = []
    gc.collect()
    own, other = turns(place, steps.step, lambda: steps.step(exchange=False), calls=4)
    shares = [1 - b / a for a, b in zip(own, other, strict=True)]
    return [
        {
            "parameters": steps.parameters,
            "transport": named(steps.model.collectives),
            "with": median(own),
            "without": median(other),
            "exposed": median(shares),
            "waits": waits(steps.step) if place.device.name == "cuda" else None,
            "error": error,
        }
    ]


def waits(run: Callable[[], None], steps: int = 3) -> int:
    """How often the host waited for the GPU in some steps, as torch's profiler sees it."""
    from torch.profiler import ProfilerActivity, profile

    def seen_in(steps: int) -> int:
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            for _ in range(steps):
                run()
        found = {each.key: each.count for each in seen.key_averages()}
        return sum(found.get(name, 0) for name in SYNCHRONISES)

    own = seen_in(0)  # the profiler's own waits
    return max(0, seen_in(steps) - own)


# -- timing ------------------------------------------------------------------------------


def turns(
    place: Place,
    ours: Callable[[], None],
    theirs: Callable[[], None],
    *,
    alone: bool = False,
    calls: int = 0,
) -> tuple[list[float], list[float]]:
    """Seconds of a call, a sample a round of each, in turns; the slowest rank's.

    Args:
        alone: rank 0 does the second, the others wait without work.
        calls: a sample; as many as take SAMPLE_S if not given.
    """
    works: Sequence[tuple[Callable[[], None], bool]] = ((ours, False), (theirs, alone))
    repeats = []
    for run, by_one in works:
        _sample(place, run, 1, by_one)
        repeats.append(calls or max(1, round(SAMPLE_S / _sample(place, run, 1, by_one))))
    samples: tuple[list[float], list[float]] = ([], [])
    for turn in range(place.rounds):
        for which in (0, 1) if turn % 2 else (1, 0):
            run, by_one = works[which]
            samples[which].append(_sample(place, run, min(repeats[which], 1000), by_one))
    return samples


def _sample(place: Place, run: Callable[[], None], calls: int, by_one: bool) -> float:
    """Seconds of a call, the same number on all ranks."""
    current, seconds = place.device.current(), 0.0
    current.synchronize()
    place.runtime.comm.Barrier()  # which spins: ranks start as close together as they can
    if not by_one or place.runtime.rank == 0:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        current.synchronize()
        seconds = (time.perf_counter() - start) / calls
    return max(1e-9, float(place.runtime.allreduce_scalar([seconds], "max")[0]))


def named(collectives: Collectives) -> str:
    """The node's transport, without the reason why it is that one."""
    return collectives.describe_transports().get("node", "-").partition(" ")[0]


def _torch_name(device: Device) -> str:
    index = getattr(device, "index", None)
    return device.name if index is None else f"{device.name}:{index}"


PARTS: dict[str, Callable[[Place], list[Row]]] = {"node": node, "staged": staged, "step": step}
