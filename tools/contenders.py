"""Ways to average gradients, made alike for a comparison: what the training benchmarks time.

    none            exchanges nothing
    lockstep        exchanges one number a step: ranks wait for each other, and nothing else
    ddp             torch DDP over Gloo
    ddp-fp16        and its hook fp16_compress_hook
    ddp-powersgd    and its hook powerSGD_hook, rank 4, from the third step
    hpcsync         as the deck says
    hpcsync-CODEC   the deck with compress.codec=CODEC and no warm-up: int8, topk, auto, ...

Each has its own copy of one model, and trains it by the same engine on the same data.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from tools import benchmark
from tools.benchmark import BenchmarkError

PLAIN = ("none", "lockstep", "ddp", "ddp-fp16", "ddp-powersgd", "hpcsync")
CODED = "hpcsync-"


def check(name: str) -> None:
    """Raises BenchmarkError: nothing is called that."""
    from hpcsync import codecs

    codec = name.removeprefix(CODED)
    known = codec == "auto" or codec in codecs.BUILTINS or ":" in codec
    if name not in PLAIN and not (name.startswith(CODED) and known):
        codecs_known = ", ".join([*codecs.BUILTINS, "auto"])
        raise BenchmarkError(
            f"--only: no contender {name!r}; there are {', '.join(PLAIN)}, and {CODED}CODEC with "
            f"one of {codecs_known} or package.module:name"
        )


class Plain:
    """A module that exchanges nothing, or that DDP wraps, as the engine wants it."""

    def __init__(self, module: Any, wrapped: Any = None) -> None:
        self.module, self.wrapped = module, wrapped or module

    def __call__(self, inputs: Any, targets: Any) -> Any:
        return self.wrapped(inputs, targets)

    def no_sync(self) -> AbstractContextManager[Any]:
        """DDP's own; nothing where nothing is exchanged."""
        if self.wrapped is self.module:
            return nullcontext()
        context: AbstractContextManager[Any] = self.wrapped.no_sync()
        return context

    def rescale(self, factor: float) -> None:
        """Nothing is held back here."""

    def norm(self) -> Any:
        """2-norm of all gradients, as hpcsync.DataParallel.norm."""
        import torch

        grads = [param.grad for param in self.module.parameters() if param.grad is not None]
        return torch.nn.utils.get_total_norm(grads)


class Lockstep(Plain):
    """What any exchange costs at least: the ranks of a step wait for the slowest."""

    def __init__(self, module: Any, runtime: Any) -> None:
        super().__init__(module)
        self._runtime = runtime

    def norm(self) -> Any:
        self._runtime.allreduce_scalar([0.0])
        return super().norm()


class Contender:
    """A model in training."""

    def __init__(self, name: str, engine: Any) -> None:
        self.name, self.engine = name, engine
        self.loss = float("nan")
        self.samples: dict[str, list[float]] = {"seconds": [], "cpu": [], "sent": [], "waited": []}

    @property
    def parallel(self) -> Any:
        """What averages its gradients."""
        return self.engine.data_parallel

    def steps(self, batches: list[Any]) -> None:
        """Train on a list of steps' micro-batches."""
        for micro_batches in batches:
            self.loss = self.engine.step(micro_batches).loss

    def auto(self) -> dict[str, Any]:
        """Under auto: whether it has settled, its choice and why; else nothing."""
        reducer = getattr(self.parallel, "reducer", None)
        found: dict[str, Any] = reducer.state_dict()["auto"] if reducer else {}
        return found

    def choice(self) -> str:
        """Under auto, what it uses now: codec, algorithm of the rails, size of buckets."""
        state = self.auto()
        if not state:
            return "none, nothing to choose"
        codec, algorithm, bucket_mb = state["choice"]
        return f"{codec}, {algorithm}, {bucket_mb:.3g} MiB"

    def close(self) -> None:
        """Free what the exchange holds; collective."""
        if hasattr(self.parallel, "collectives"):
            self.parallel.close()
            self.parallel.collectives.close()


class Workload:
    """A model and its data; one a job and model."""

    def __init__(self, runtime: Any, config: Any, source: Any = None) -> None:
        import torch

        from hpcsync import data, models

        torch.set_num_threads(config.train.threads or torch.get_num_threads())
        self.runtime, self.config = runtime, config
        self.source = source or data.build(config)
        self.sampler = data.Sampler(
            self.source.train_size, config.train.global_batch, config.run.seed
        )
        torch.manual_seed(config.run.seed)
        self.model = models.build(config.model, self.source)
        self.parameters = sum(param.numel() for param in self.model.parameters())

    def contender(self, name: str, *, find_unused: bool = False) -> Contender:
        """A contender with a fresh copy of the model; collective."""
        from hpcsync.engine import Engine
        from hpcsync.optimizers import make_optimizer

        model = copy.deepcopy(self.model)
        if name == "none":
            parallel: Any = Plain(model)
        elif name == "lockstep":
            parallel = Lockstep(model, self.runtime)
        elif name.startswith("ddp"):
            parallel = Plain(model, self._ddp(model, name, find_unused))
        else:
            parallel = self._hpcsync(model, name)
        optimizer = make_optimizer(model, self.config.train)
        return Contender(name, Engine(model, optimizer, parallel, self.config.train))

    def _ddp(self, model: Any, name: str, find_unused: bool) -> Any:
        import torch
        import torch.distributed as dist
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

        if not dist.is_initialized():
            benchmark.start_gloo(self.runtime)
        wrapped = torch.nn.parallel.DistributedDataParallel(
            model,
            bucket_cap_mb=self.config.comm.bucket_mb,
            gradient_as_bucket_view=True,
            find_unused_parameters=find_unused,
        )
        if name == "ddp-fp16":
            wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif name == "ddp-powersgd":
            # The first step it allows: the buckets are laid out anew after the first.
            state = powerSGD_hook.PowerSGDState(
                None, matrix_approximation_rank=4, start_powerSGD_iter=2
            )
            wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        return wrapped

    def _hpcsync(self, model: Any, name: str) -> Any:
        from hpcsync.parallel import DataParallel

        compress = self.config.compress
        if name.startswith(CODED):
            codec = name.removeprefix(CODED)
            compress = dataclasses.replace(compress, codec=codec, warmup=0)
        return DataParallel(
            model,
            runtime=self.runtime,
            comm=self.config.comm,
            compress=compress,
            seed=self.config.run.seed,
        )

    def batches(self, contender: Contender, count: int) -> list[Any]:
        """The data of the contender's next steps on this rank."""
        micros = self.config.train.accumulate
        first = contender.engine.step_count
        rank, size = self.runtime.rank, self.runtime.size
        return [
            [
                self.source.train_batch(self.sampler.shard(step, rank, size, micro, micros))
                for micro in range(micros)
            ]
            for step in range(first, first + count)
        ]

    def settle(self, contender: Contender, most: int) -> int:
        """Train step by step until auto has chosen; the steps that this took."""
        for done in range(most):
            if contender.auto().get("settled", True):
                return done
            contender.steps(self.batches(contender, 1))
        return most

    def block(self, contender: Contender, count: int) -> None:
        """Time some steps of a contender, and keep a mean step of them as a sample."""
        batches = self.batches(contender, count)
        before = benchmark.wire_bytes()
        self.runtime.comm.Barrier()
        cpu, start = time.process_time(), time.perf_counter()
        contender.steps(batches)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        self.runtime.barrier()
        stats = getattr(getattr(contender.parallel, "reducer", None), "stats", None)
        found = {
            "seconds": seconds / count,
            "cpu": cpu / count,
            "sent": (benchmark.wire_bytes() - before) / count,
            "waited": stats.exposed_comm_ms / 1e3 if stats else 0.0,
        }
        for key, value in found.items():
            contender.samples[key].append(value)

    def agree(self, contender: Contender) -> None:
        """The slowest rank's times, and means over ranks of the rest; collective, once."""
        samples = contender.samples
        samples["seconds"] = self.runtime.allreduce_scalar(samples["seconds"], "max")
        for key in ("cpu", "sent", "waited"):
            total = self.runtime.allreduce_scalar(samples[key])
            samples[key] = [value / self.runtime.size for value in total]
        contender.loss = self.runtime.allreduce_scalar([contender.loss])[0] / self.runtime.size


def close_gloo(runtime: Any) -> None:
    """End torch.distributed where a contender started it; collective."""
    import torch.distributed as dist

    if dist.is_initialized():
        runtime.barrier()
        dist.destroy_process_group()
