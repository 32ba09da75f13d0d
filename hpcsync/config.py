"""The configuration of a run: one tree of frozen dataclasses, from decks and overrides.

``load`` reads a deck, the decks that it extends and ``section.key=value`` overrides, checks
all of it against the tree, and raises one ConfigError with every fault. Each key's text stands
beside its default; ``explain`` and ``dump`` show it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import conflicts, intervals, schema
from . import deck as decks
from .errors import ConfigError
from .schema import Key
from .sections import (
    ALGORITHMS,
    CODECS,
    RAIL_ALGORITHMS,
    CheckpointConfig,
    CommConfig,
    CompressConfig,
    DataConfig,
    LogConfig,
    MetricsConfig,
    ModelConfig,
    RunConfig,
    TopologyConfig,
    TraceConfig,
    TrainConfig,
)
from .wording import dotted, suggest

__all__ = [
    "ALGORITHMS",
    "CODECS",
    "RAIL_ALGORITHMS",
    "CheckpointConfig",
    "CommConfig",
    "CompressConfig",
    "Config",
    "DataConfig",
    "LogConfig",
    "MetricsConfig",
    "ModelConfig",
    "RunConfig",
    "TopologyConfig",
    "TraceConfig",
    "TrainConfig",
    "check_ranks",
    "contradictions",
    "dump",
    "explain",
    "keys",
    "load",
    "loads",
    "micro_batch",
    "to_dict",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything a run is told. Checked by ``load``; made directly, it is taken as it is."""

    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    topology: TopologyConfig = field(default_factory=TopologyConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    compress: CompressConfig = field(default_factory=CompressConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    trace: TraceConfig = field(default_factory=TraceConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    log: LogConfig = field(default_factory=LogConfig)


def load(deck: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> Config:
    """Read a deck (None: the defaults) and overrides such as ``train.lr=1e-3``.

    Args:
        deck: a path, or the bare name of a deck of hpcsync such as ``laptop``.

    Raises:
        ConfigError: with all faults, each as ``file:line: key: what is wrong; what to do``.
    """
    problems: list[str] = []
    sources = [] if deck is None else decks.read_chain(os.fspath(deck), problems)
    return _resolve(sources, overrides, problems)


def loads(text: str, label: str, overrides: Sequence[str] = ()) -> Config:
    """As ``load``, of a deck's text that ``dump`` wrote, maybe long ago; ``label`` stands in
    messages."""
    problems: list[str] = []
    return _resolve([decks.parse(text, label, problems)], overrides, problems, old_names=True)


def _resolve(
    sources: list[decks.Source],
    overrides: Sequence[str],
    problems: list[str],
    *,
    old_names: bool = False,
) -> Config:
    sources = [*sources, *decks.read_overrides(overrides, problems)]
    values: dict[str, Any] = {}
    cited: dict[str, str] = {}
    # A contradiction is told only where all was read right, or the wrong key might be blamed.
    doubtful = {"*"} if problems else set()
    for source in sources:
        checked, faults = schema.check_table(
            Config, source.table, source.typed, old_names=old_names
        )
        for path, text in sorted(faults, key=lambda fault: source.line(fault.path)):
            problems.append(f"{source.where(path)}: {dotted(path)}: {text}")
            doubtful.add(path[0] if len(path) > 1 else "*")
        for name, value in checked.items():
            values[name] = _merge(values.get(name), value)
            cited[name] = source.where(tuple(name.split(".")))
    config = _build(values)
    for names, text in contradictions(config):
        if not doubtful & {"*", *(name.partition(".")[0] for name in names)}:
            named = next((name for name in names if name in cited), names[0])
            problems.append(f"{cited.get(named, 'defaults')}: {named}: {text}")
    if problems:
        raise ConfigError(problems)
    return config


def _merge(old: Any, new: Any) -> Any:
    """Tables merge key by key; of anything else the new one counts."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return {**old, **{name: _merge(old.get(name), item) for name, item in new.items()}}


def _build(values: Mapping[str, Any]) -> Config:
    parts: dict[str, Any] = {}
    for name, kind in schema.sections(Config):
        own = [found for found in schema.keys_of(name, kind) if found.name in values]
        parts[name] = kind(**{found.field: values[found.name] for found in own})
    return Config(**parts)


def contradictions(config: Config) -> list[tuple[tuple[str, ...], str]]:
    """(keys, what is wrong) for values that are right one by one but not together."""
    return list(_contradictions(config))


def _contradictions(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """(keys, what is wrong) for values that are right one by one but not together."""
    model, train, comm = config.model, config.train, config.comm
    if model.name == "gpt" and model.width % model.heads:
        near = " or ".join(map(str, _multiples(model.width, model.heads)))
        yield (
            ("model.width", "model.heads"),
            f"a width of {model.width} does not divide into {model.heads} heads; "
            f"use model.width={near}, or other model.heads",
        )
    if train.global_batch % train.accumulate:
        near = " or ".join(map(str, _multiples(train.global_batch, train.accumulate)))
        yield (
            ("train.global_batch", "train.accumulate"),
            f"{train.global_batch} samples a step do not divide into {train.accumulate} "
            f"micro-batches (train.accumulate) on any number of ranks; "
            f"use train.global_batch={near}",
        )
    for name in ("codec", "allow"):
        values = getattr(config.compress, name)
        for codec in (values,) if name == "codec" else values:
            known = CODECS if name == "allow" else (*CODECS, "auto")
            if codec not in known and ":" not in codec:
                yield (
                    (f"compress.{name}",),
                    f"unknown codec {codec!r}{suggest(codec, known)}; use one of "
                    f"{', '.join(known)}, or your own as 'package.module:name'",
                )
    coded = config.compress.codec != "none"
    if coded and comm.reproducible:
        yield (
            ("compress.codec", "comm.reproducible"),
            "what coding rounds depends on placement, so comm.reproducible cannot hold; use "
            "compress.codec=none, or comm.reproducible=false",
        )
    if coded and config.compress.where == "rail" and comm.algorithm not in ("auto", "hierarchical"):
        yield (
            ("comm.algorithm", "compress.where"),
            f"{comm.algorithm} has no rails to code on; use comm.algorithm=auto, or "
            "compress.where=all",
        )
    try:
        intervals.parse(config.checkpoint.every)
    except ValueError as error:
        yield (("checkpoint.every",), str(error))
    yield from conflicts.found(train.device, comm, config.checkpoint)
    for name in ("algorithm", "rail_algorithm"):
        if comm.reproducible and getattr(comm, name) == "native":
            yield (
                (f"comm.{name}", "comm.reproducible"),
                "native leaves the order of additions to MPI, so comm.reproducible cannot hold; "
                "use auto, or comm.reproducible=false",
            )


def _multiples(number: int, step: int) -> list[int]:
    """The multiples of ``step`` just below and above ``number``, those above 0."""
    below = number // step * step
    return [multiple for multiple in (below, below + step) if multiple]


def check_ranks(config: Config, ranks: int) -> None:
    """Raise ConfigError, with the arithmetic in words, unless the batch divides over ranks."""
    train = config.train
    pieces = ranks * train.accumulate
    if ranks < 1:
        raise ConfigError(f"ranks: must be at least 1, not {ranks}")
    if train.global_batch % pieces == 0:
        return
    over = f"{ranks} {'rank' if ranks == 1 else 'ranks'}"
    if train.accumulate > 1:
        over += f" x {train.accumulate} micro-batches (train.accumulate)"
    if train.global_batch < pieces:
        wrong = f"{train.global_batch} samples a step are too few for {over}, one sample each"
    else:
        rest = train.global_batch % pieces
        wrong = (
            f"{train.global_batch} samples a step do not divide over {over}: "
            f"{train.global_batch // pieces} each and {rest} left over"
        )
    near = " or ".join(map(str, _multiples(train.global_batch, pieces)))
    counts = [n for n in range(1, ranks) if train.global_batch % (n * train.accumulate) == 0]
    fix = f"use train.global_batch={near}"
    if train.accumulate > 1 and train.global_batch % ranks == 0:
        fix += ", or train.accumulate=1"
    if counts:
        fix += f", or run on {counts[-1]} {'rank' if counts[-1] == 1 else 'ranks'}"
    raise ConfigError(
        f"train.global_batch: {wrong}; a step takes ranks x accumulate x micro-batch samples: {fix}"
    )


def micro_batch(config: Config, ranks: int) -> int:
    """Samples of one forward pass on one rank; ConfigError as ``check_ranks``."""
    check_ranks(config, ranks)
    return config.train.global_batch // (ranks * config.train.accumulate)


def keys() -> Iterator[Key]:
    """All keys in order: ``name`` (dotted), ``kind``, ``default``, ``help``, ``accepts()``."""
    for name, kind in schema.sections(Config):
        yield from schema.keys_of(name, kind)


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Section -> key -> value: plain, for JSON."""
    parts = dataclasses.asdict(config)
    return {
        name: {found.leaf: parts[name][found.field] for found in schema.keys_of(name, kind)}
        for name, kind in schema.sections(Config)
    }


def dump(config: Config) -> str:
    """The whole configuration as TOML, with each key's text as comment; ``load`` reads it back."""
    return schema.dump(config)


def explain(name: str = "") -> str:
    """What a key (``comm.bucket_mb``), a section (``comm``) or, if empty, every key means.

    Raises:
        ConfigError: there is no such key or section.
    """
    return schema.explain(Config, name)
