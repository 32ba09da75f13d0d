"""Training data by name: what the deck's ``data`` section names becomes a ``Source``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpcsync import registry
from hpcsync.data.base import Source, describe, fingerprint
from hpcsync.data.sampler import Sampler, spread, step_seed
from hpcsync.errors import DataError

if TYPE_CHECKING:
    from hpcsync.config import Config

__all__ = [
    "BUILTINS",
    "Sampler",
    "Source",
    "build",
    "describe",
    "fingerprint",
    "spread",
    "step_seed",
]

BUILTINS = {
    "stdlib": "hpcsync.data.stdlib:build",
    "text": "hpcsync.data.text:build",
    "tokens": "hpcsync.data.tokens:build",
    "digits": "hpcsync.data.digits:build",
}

_NEEDED = (
    "vocab",
    "classes",
    "sample_shape",
    "unit",
    "tokens_per_sample",
    "train_size",
    "val_size",
    "train_batch",
    "val_batch",
)


def build(config: Config, seed: int | None = None) -> Source:
    """The source that ``config.data`` names, with samples of ``config.model.context`` tokens.

    ``seed`` is ``config.run.seed`` when not given. Raises ``DataError``.
    """
    name = config.data.name
    factory = registry.resolve("data", name, BUILTINS)
    source: Source = registry.call(
        "data",
        name,
        factory,
        config.data,
        options=dict(config.data.options),
        context=config.model.context,
        seed=config.run.seed if seed is None else seed,
    )
    missing = [key for key in _NEEDED if not hasattr(source, key)]
    if missing:
        raise DataError(
            f"data.name = {name!r}: it returned a {type(source).__name__} without "
            f"{', '.join(missing)}; see hpcsync.data.base.Source"
        )
    if source.train_size < 1 or source.val_size < 1:
        raise DataError(
            f"data.name = {name!r}: it has {source.train_size} samples to train on and "
            f"{source.val_size} held out; each must be at least 1"
        )
    return source
