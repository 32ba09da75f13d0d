"""Which gradients are coded, by which codec, and from when on."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import codecs
from ..codecs import Codec, Matrix
from ..collectives import Collectives, choice
from ..collectives.coding import Clock, Coding, settings_of
from ..config import CompressConfig
from ..device import dtype_of
from ..errors import UserError
from .plan import BucketPlan, Parameter


@dataclass
class Compression:
    """The compression of one model's gradients.

    Args:
        config: the ``compress`` section; ``auto`` codes nothing until told to.
        seed: of the run.

    Attributes:
        steps: exchanges so far, the same on all ranks.
        deck: the section as it was given.
    """

    collectives: Collectives
    config: CompressConfig
    seed: int = 0

    def __post_init__(self) -> None:
        self.steps = 0
        self.clock = Clock()
        self._recorder = self.collectives.recorder
        self.codec: Codec | None = None
        self._settings = settings_of(self.config, self.seed)
        self.deck = self.config
        self.use("none" if self.config.codec == "auto" else self.config.codec)

    def use(self, name: str) -> None:
        """Code by the codec of that name from the next layout of the buckets on.

        Raises:
            ConfigError: there is no such codec.
        """
        self.config = replace(self.config, codec=name)
        self.codec = None if name == "none" else self._made(name)

    def named(self, name: str) -> Codec:
        """The codec of that name, if the deck allows it here.

        Raises:
            UserError: it does not.
        """
        if name == "none" or name not in _served(self.deck):
            raise UserError(f"codec {name} is not that of compress.codec={self.deck.codec}")
        return self._made(name)

    def _made(self, name: str) -> Codec:
        return codecs.build(name, self._settings, device=self.collectives.device)

    @property
    def warm(self) -> bool:
        """Whether coding has begun: the first ``compress.warmup`` steps go uncoded."""
        here = choice.codes(self.config.where, self.collectives.topology)
        return here and self.codec is not None and self.steps >= self.config.warmup

    def stepped(self) -> bool:
        """Count an exchange; True if the next one is to be coded and this one was not."""
        before = self.warm
        self.steps += 1
        self.clock.step += before
        return self.warm != before

    def state(self) -> dict[str, Any]:
        """Counts that coding depends on."""
        return {"steps": self.steps, "coded": self.clock.step}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.steps, self.clock.step = int(state["steps"]), int(state["coded"])

    def wants(self, param: Parameter) -> bool:
        """Whether the parameter's gradient is coded now."""
        return self.warm and codable(self.config, param)

    def coding(self, plan: BucketPlan, params: Sequence[Parameter]) -> Coding | None:
        """How a bucket is to be coded; None if it holds nothing to be."""
        if self.codec is None or not plan.coded_numel:
            return None
        members = zip(plan.params, plan.offsets, strict=True)
        return Coding(
            codec=self.codec,
            where=self.config.where,
            count=plan.coded_numel,
            matrices=tuple(
                Matrix(start, params[index].shape)
                for index, start in members
                if start < plan.coded_numel
            ),
            seed=zlib.crc32(f"{self.seed} {plan.index}".encode()),
            clock=self.clock,
            recorder=self._recorder,
            bucket=plan.index,
        )


def check(
    codec: Codec | None, config: CompressConfig, params: Iterable[Parameter]
) -> UserError | None:
    """Why the codec cannot serve these parameters, if it cannot."""
    told = getattr(codec, "check", None)
    if told is None:
        return None
    problem: str = told([each.shape for each in params if codable(config, each)])
    return UserError(problem) if problem else None


def _served(deck: CompressConfig) -> tuple[str, ...]:
    return tuple(deck.allow) if deck.codec == "auto" else (deck.codec,)


def codable(config: CompressConfig, param: Parameter) -> bool:
    """Whether the parameter's gradient is coded, once coding has begun."""
    if not dtype_of(param.dtype).floating or param.numel < config.min_elements:
        return False
    return config.vectors or len(param.shape) >= 2
