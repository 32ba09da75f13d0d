"""What a run is made of: data, model, buckets, engine, built alike on every rank.

Each stage that may fail on one rank alone is followed by an agreement, so that a user's error
ends all ranks with one line and nobody waits for a rank that is gone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from . import banner, binding, data, launch, models, weights
from .binding import Place
from .checkpoint import random_state
from .collectives import saved_costs
from .config import CompressConfig, Config, dump
from .conflicts import REPLAY_LOG
from .data import Sampler, Source
from .device import Device, kernels
from .engine import Engine
from .errors import DataError, UserError
from .exhausted import ExhaustedError, memory_errors
from .launch import Runtime
from .observers.trace import Traces
from .onebit_adam import OneBitAdam
from .optimizers import make_optimizer
from .parallel import DataParallel, placement
from .stopping import StoppedError, StopSignals

T = TypeVar("T")


class State(NamedTuple):
    """What a run goes on from: trees of dicts, lists, tensors, arrays and plain values.

    Attributes:
        common: the same on all ranks, but for buffers such as running means: rank 0's count.
        own: this rank's.
    """

    common: dict[str, Any]
    own: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the loop works with.

    Attributes:
        origin: where the weights began if not at random, in words; on rank 0.
        places: of all ranks.
    """

    source: Source
    sampler: Sampler
    parallel: DataParallel
    engine: Engine
    origin: str = ""
    places: Sequence[Place] = ()

    @property
    def model(self) -> nn.Module:
        return self.engine.model

    def state(self) -> State:
        """All that later steps depend on; collective. The tensors are those that are trained."""
        exchange = self.parallel.reducer.state_dict()
        held = exchange.pop("held")
        common = {
            **self.engine.state_dict(),
            "sampler": self.sampler.state_dict(),
            "tokens": self.sampler.samples * self.source.tokens_per_sample,
            "exchange": exchange,
        }
        return State(common, {"held": held, "random": random_state.capture()})

    def load(self, state: State, *, anew: bool = False) -> bool:
        """Go on from there; collective.

        Args:
            state: without ``own["held"]`` where that is of no use here, and without
                ``own["random"]`` where no rank of this number was saved.
            anew: another order of the data is allowed.

        Returns:
            Whether what codecs held back came over, to the same bits; ``reducer.deal`` takes it
            otherwise.

        Raises:
            CheckpointError: it belongs to another model or optimizer.
            DataError: it belongs to another order of the data.
        """
        common, own = state
        self.sampler.load_state_dict(common["sampler"], anew=anew)
        self.engine.load_state_dict(common)
        held = own.get("held", {})
        fits = self.parallel.reducer.restore({**common["exchange"], "held": held})
        if "random" in own:
            random_state.restore(own["random"])
        else:
            rank = self.parallel.collectives.runtime.rank
            random_state.seed(data.step_seed(self.sampler.seed, self.sampler.step, rank))
        return fits


def together(runtime: Runtime, signals: StopSignals, stage: str, work: Callable[[], T]) -> T:
    """Do what may fail on some ranks only, and go on if it failed on none; collective.

    ``work`` must not be collective itself: a rank that fails in it would agree alone.

    Raises:
        AgreedError: on all ranks, if ``work`` raised a UserError on any or ran out of memory.
        StoppedError: a rank received a signal meanwhile.
    """
    problem: Exception | None = None
    result: Any = None
    try:
        with memory_errors(stage):
            result = work()
    except (UserError, ExhaustedError) as error:
        problem = error
    runtime.agree(problem)
    (number,) = runtime.allreduce_scalar([signals.received], "max")
    if number:
        raise StoppedError(int(number))
    return result  # type: ignore[no-any-return]


def assemble(
    runtime: Runtime, config: Config, signals: StopSignals, *, fresh: bool = True
) -> Parts:
    """Build all parts; collective.

    Args:
        fresh: the weights begin here, and are not about to come from a checkpoint.

    Raises:
        AgreedError: data, model or first weights cannot be had on some rank, or differ between
            ranks; or two ranks compute on the same device.
        UserError: on this rank alone, if its model cannot be exchanged; the job has to be ended.
        ExhaustedError: no memory for the buckets, on this rank alone; likewise.
        StoppedError: a signal came meanwhile.
    """
    train = config.train
    if train.threads:
        torch.set_num_threads(train.threads)
    random_state.seed(config.run.seed)  # alike on all ranks, as their data and models must be
    source = together(runtime, signals, "data", lambda: data.build(config))
    _check_same(runtime, source)
    device = _device(runtime, config, signals)
    model = together(runtime, signals, "model", lambda: _build_model(config, source, device))
    places = binding.agree_on_places(runtime, model, share=config.topology.share_devices)
    # The other ranks get rank 0's weights with the buckets.
    given = config.model.init_from if fresh and runtime.rank == 0 else ""
    origin = together(runtime, signals, "weights", lambda: _initialise(model, config, given))
    # It talks to the other ranks itself, and an agreement of ours would meet one of its own on
    # ranks that fail alone: those end the job instead.
    with memory_errors("buckets"):
        parallel = DataParallel(
            model,
            runtime=runtime,
            comm=config.comm,
            compress=_compress(config),
            seed=config.run.seed,
        )
    optimizer = together(runtime, signals, "optimizer", lambda: make_optimizer(model, train))
    if isinstance(optimizer, OneBitAdam):
        parallel.reducer.transform = optimizer.momentum
    if train.compile:
        models.compile_model(model)
    random_state.seed(data.step_seed(config.run.seed, 0, runtime.rank))
    return Parts(
        source=source,
        sampler=Sampler(source.train_size, train.global_batch, config.run.seed),
        origin=origin,
        places=places,
        parallel=parallel,
        engine=Engine(
            model,
            optimizer,
            parallel,
            train,
            parallel.collectives.recorder,
            parallel.collectives.device,
        ),
    )


def _device(runtime: Runtime, config: Config, signals: StopSignals) -> Device:
    """What this rank computes on; collective.

    Raises:
        AgreedError: it cannot be used, or not for all that the deck wants.
    """
    share = config.topology.share_devices
    name, index = binding.choose(runtime, config.train.device, share=share)
    device = together(runtime, signals, "device", lambda: placement.get(name, index))
    device.profiled = config.trace.nvtx
    problem: UserError | None = None
    if device.queued and config.checkpoint.replay_log:
        problem = UserError(
            f"checkpoint.replay_log: it logs gradients in host memory, and this run computes on "
            f"{device.name}, where each step would wait for it; {REPLAY_LOG}"
        )
    runtime.agree(problem)
    return device


def traces(config: Config, parts: Parts, run_id: str) -> Traces:
    """The observer that keeps timing traces; collective."""
    parallel = parts.parallel
    topology = parallel.collectives.runtime.topology
    crowding = parallel.collectives.runtime.crowding
    place = asdict(saved_costs.Place.here(topology, launch.mpi_library()[0]))

    def describe() -> dict[str, str]:
        buckets = [
            {
                "index": plan.index,
                "bytes": plan.nbytes,
                "elements": plan.numel,
                "coded": plan.coded_numel,
            }
            for plan in parallel.reducer.buckets
        ]
        return {
            "config": dump(config),
            "topology": json.dumps([list(ranks) for ranks in topology.nodes]),
            "codec": config.compress.codec,
            "algorithm": parallel.reducer.algorithm,
            "buckets": json.dumps(buckets),
            "links": json.dumps({"crowding": crowding, "place": place}),
        }

    return Traces(parallel.collectives, config.trace, describe, run_id)


def _compress(config: Config) -> CompressConfig:
    """1-bit Adam learns the variance from gradients as they are: nothing is coded before that."""
    if config.train.optimizer == "adamw":
        return config.compress
    return replace(config.compress, warmup=max(config.compress.warmup, config.train.freeze))


def _build_model(config: Config, source: Source, device: Device) -> nn.Module:
    torch.manual_seed(config.run.seed)
    model = models.build(config.model, source)  # on the host: the same weights on every device
    if device.queued:
        model.to(torch.device(device.name, device.index))
    if config.train.activation_checkpointing:
        models.checkpoint_activations(model)
    return model


def _initialise(model: nn.Module, config: Config, source: str) -> str:
    """Take the weights of ``source`` if there is one; where they are from, in words."""
    if not source:
        return ""
    return weights.load(model, source, strict=config.model.init_strict).describe(source)


def _check_same(runtime: Runtime, source: Source) -> None:
    """The same indices must mean the same samples everywhere."""
    found = runtime.allgather_object((data.fingerprint(source), runtime.host))
    others = [rank for rank, (mark, _) in enumerate(found) if mark != found[0][0]]
    problem: UserError | None = None
    if others and runtime.rank == others[0]:
        problem = DataError(
            f"data: the samples on {runtime.host} are not those of rank 0 on {found[0][1]}; use "
            "the same files on all nodes, and the same Python for data.name=stdlib"
        )
    runtime.agree(problem)


def describe(runtime: Runtime, config: Config, parts: Parts) -> list[tuple[str, str]]:
    """The rows of the banner."""
    threads = banner.count(torch.get_num_threads(), "thread")
    native = kernels.load()
    machine = banner.Machine(
        mpi=launch.mpi_library(),
        threads=launch.thread_level(),
        devices=(
            f"{parts.engine.streams.describe()}, {threads} a rank, torch {torch.__version__}, "
            f"{native.isa if native else 'no'} kernels"
        ),
        transports=parts.parallel.collectives.describe_transports(),
        tried=parts.parallel.collectives.tried,
        buckets=parts.parallel.reducer.buckets_description(),
        algorithm=parts.parallel.reducer.algorithm,
    )
    source = parts.source
    return [
        *banner.machine_rows(runtime.topology, machine, config),
        ("binding", binding.describe(parts.places, runtime.topology)),
        model_row(config, parts.model),
        *([("weights", parts.origin)] if parts.origin else []),
        ("data", data.describe(source)),
        banner.batch_row(config, runtime.size, source.tokens_per_sample, source.unit),
        banner.training_row(config),
    ]


def model_row(config: Config, model: nn.Module) -> tuple[str, str]:
    """Name and size of the model."""
    counts = models.parameter_counts(model)
    words = f"{config.model.name}, {banner.parameters(counts.total)} parameters"
    if counts.trainable != counts.total:
        words += f", {banner.parameters(counts.trainable)} of them trained"
    return "model", f"{words}, {banner.size(counts.nbytes)}"
