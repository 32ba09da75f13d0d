"""How a deck differs from that of the run that is resumed, and whether it may. Pure."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from .. import config as configs
from ..config import Config
from ..errors import CheckpointError, ConfigError
from ..wording import suggest, toml

# They change neither the mathematics nor its result, but for rounding.
_SECTIONS = ("topology", "comm", "checkpoint", "trace", "metrics", "log")
_KEYS = (
    *("run.name", "run.dir", "model.init_from", "model.init_strict"),
    *("train.eval_every", "train.eval_batches", "train.max_skipped"),
    *("train.accumulate", "train.activation_checkpointing", "train.compile", "train.threads"),
    "train.device",
)
# They say what the place in the data is a place in.
DATA = ("run.seed", "train.global_batch", "data")


class Change(NamedTuple):
    """A key and its values in TOML; ``harmless`` if it may change without leave."""

    key: str
    before: str
    now: str
    harmless: bool

    def __str__(self) -> str:
        return f"{self.key} = {self.now} (was {self.before})"


def between(before: Config, now: Config) -> list[Change]:
    """The keys that differ, but for the name and the place of the run."""
    old, new = configs.to_dict(before), configs.to_dict(now)
    flat = before.train.min_lr == now.train.min_lr == 1  # no rate depends on the last step

    def harmless(name: str) -> bool:
        return _harmless(name) or (name == "train.steps" and flat)

    return [
        Change(name, toml(old[section][key]), toml(value), harmless(name))
        for section, body in new.items()
        for key, value in body.items()
        for name in (f"{section}.{key}",)
        if old[section][key] != value and name not in ("run.name", "run.dir")
    ]


def check_allowed(allowed: Collection[str]) -> None:
    """Raise ConfigError unless each is a key or a section."""
    every = configs.keys()
    known = {key.name for key in every}
    known |= {name.partition(".")[0] for name in known}
    for name in allowed:
        if name not in known:
            raise ConfigError(f"--allow-change: {name}: no such key{suggest(name, known)}")


def refuse(changes: Collection[Change], allowed: Collection[str], where: Any) -> None:
    """Raise CheckpointError if keys changed that must not without leave, naming all of them."""
    bad = [each for each in changes if not each.harmless and not permits(allowed, each.key)]
    if bad:
        names = ",".join(each.key for each in bad)
        raise CheckpointError(
            f"--resume: the deck differs from that of {where}: {'; '.join(map(str, bad))}; set "
            f"them back, or add --allow-change {names}"
        )


def permits(allowed: Collection[str], key: str) -> bool:
    """Whether a key, or its section, is among those that may change."""
    return key in allowed or key.partition(".")[0] in allowed


def _harmless(name: str) -> bool:
    return name in _KEYS or name.partition(".")[0] in _SECTIONS
