"""Which gradients are coded, from when on, and what codecs remember of each parameter.

What coding lost is kept where it was coded: by the sender, a rank of each node, of its node's
sum; by the owner, one rank of all, of the mean. Buckets may be laid out anew, so that another
rank of the node codes a parameter, or another node owns it. Then a node's stores are put together
by parameter, and dealt out again:

    pending = what its senders hold back + what its owners hold back x number of ranks

of which every element has one owner or sender in the new layout on each node.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np

from .. import codecs
from ..codecs import Codec, Matrix
from ..codecs.base import OWNER, Floats
from ..collectives import Collective, Collectives, choice
from ..collectives.coding import Clock, Coding, Held, settings_of
from ..config import CompressConfig
from ..device import dtype_of
from ..errors import UserError
from .plan import BucketPlan, Parameter

ERROR = "error"  # the field that an owner keeps in units of the mean


class Exchanged(Protocol):
    """A bucket, as far as stores are concerned."""

    @property
    def plan(self) -> BucketPlan: ...

    @property
    def collective(self) -> Collective: ...


class Fragment(NamedTuple):
    """Values of one field that this rank holds of a parameter, from element ``start`` on."""

    role: str
    field: str
    start: int
    values: Floats


@dataclass
class Compression:
    """The compression of one model's gradients.

    Args:
        config: the ``compress`` section; ``auto`` codes nothing until told to.
        seed: of the run.

    Attributes:
        steps: exchanges so far, the same on all ranks.
    """

    collectives: Collectives
    config: CompressConfig
    seed: int = 0

    def __post_init__(self) -> None:
        self.steps = 0
        self.clock = Clock()
        self.codec: Codec | None = None
        self._settings = settings_of(self.config, self.seed)
        self.use("none" if self.config.codec == "auto" else self.config.codec)

    def use(self, name: str) -> None:
        """Code by the codec of that name from the next layout of the buckets on.

        Raises:
            ConfigError: there is no such codec.
        """
        self.config = replace(self.config, codec=name)
        self.codec = None if name == "none" else codecs.build(name, self._settings)

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
        return {"codec": self.config.codec, "steps": self.steps, "coded": self.clock.step}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from there, with the codec of then."""
        if state["codec"] != self.config.codec:
            self.use(state["codec"])
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
        )

    def check(self, params: Iterable[Parameter]) -> UserError | None:
        """Why the codec cannot serve these parameters, if it cannot."""
        check = getattr(self.codec, "check", None)
        if check is None:
            return None
        problem: str = check([each.shape for each in params if codable(self.config, each)])
        return UserError(problem) if problem else None

    def fragments(self, buckets: Sequence[Exchanged]) -> Iterator[tuple[int, Fragment]]:
        """What this rank's stores hold, by the parameter's index."""
        for bucket, held, index, low, high in _overlaps(buckets):
            start = bucket.plan.offsets[bucket.plan.params.index(index)]
            for field in held.store.fields:
                values = held.store.read(field)[low - held.start : high - held.start]
                yield index, Fragment(held.role, field, low - start, values)

    def pending(
        self, buckets: Sequence[Exchanged], params: Sequence[Parameter]
    ) -> dict[str, list[Floats]]:
        """What the ranks of this node hold back, by field and parameter; collective.

        In units of the sum over ranks, which a node's senders code.
        """
        starts = np.concatenate([[0], np.cumsum([param.numel for param in params])])
        total: dict[str, Floats] = {}
        size = self.collectives.runtime.size
        names = sorted({name for _, part in self.fragments(buckets) for name in [part.field]})
        every = self.collectives.runtime.allgather_object(names)
        for field in sorted({name for each in every for name in each}):
            total[field] = np.zeros(starts[-1], np.float32)
        for index, part in self.fragments(buckets):
            factor = size if part.role == OWNER and part.field == ERROR else 1
            low = starts[index] + part.start
            total[part.field][low : low + part.values.shape[0]] += part.values * np.float32(factor)
        for values in total.values():
            self.collectives.node_sum(values)
        return {
            field: [values[low:high] for low, high in pairwise(starts)]
            for field, values in total.items()
        }

    def deal(self, pending: Mapping[str, Sequence[Floats]], buckets: Sequence[Exchanged]) -> None:
        """Put what is pending into the stores of a new layout."""
        size = self.collectives.runtime.size
        for bucket, held, index, low, high in _overlaps(buckets):
            start = bucket.plan.offsets[bucket.plan.params.index(index)]
            for field in held.store.fields:
                if field not in pending:
                    continue
                values = np.array(held.store.read(field))
                part = pending[field][index][low - start : high - start]
                divided = held.role == OWNER and field == ERROR
                values[low - held.start : high - held.start] = part / size if divided else part
                held.store.write(field, values)


def rescale(buckets: Sequence[Exchanged], factor: float) -> None:
    """Multiply all that is held back: gradients come in other units from now on."""
    for bucket in buckets:
        for held in bucket.collective.held:
            for field in held.store.fields:
                held.store.write(field, held.store.read(field) * np.float32(factor))


def restore(
    fragments: Mapping[int, Sequence[tuple[str, str, int, Any]]], buckets: Sequence[Exchanged]
) -> bool:
    """Write fragments of the same layout back, to the same bits; False if the layout is another."""
    left = {
        (index, role, field, start): np.asarray(values, np.float32)
        for index, parts in fragments.items()
        for role, field, start, values in parts
    }
    fields: dict[tuple[int, str], Floats] = {}
    stores: dict[int, Held] = {}
    for bucket, held, index, low, high in _overlaps(buckets):
        start = bucket.plan.offsets[bucket.plan.params.index(index)]
        stores[id(held)] = held
        for field in held.store.fields:
            values = left.pop((index, held.role, field, low - start), None)
            if values is None or values.shape[0] != high - low:
                return False
            own = fields.setdefault((id(held), field), np.array(held.store.read(field)))
            own[low - held.start : high - held.start] = values
    if left:
        return False
    for (which, field), values in fields.items():
        stores[which].store.write(field, values)
    return True


def _overlaps(
    buckets: Sequence[Exchanged],
) -> Iterator[tuple[Exchanged, Held, int, int, int]]:
    """Each part of a store that lies in one parameter: (bucket, store, parameter, low, high).

    The bounds are elements of the bucket.
    """
    for bucket in buckets:
        plan = bucket.plan
        ends = [*plan.offsets[1:], plan.coded_numel]
        for held in bucket.collective.held:
            for index, start, end in zip(plan.params, plan.offsets, ends, strict=True):
                low, high = max(start, held.start), min(min(end, plan.coded_numel), held.stop)
                if low < high:
                    yield bucket, held, index, low, high


def codable(config: CompressConfig, param: Parameter) -> bool:
    """Whether the parameter's gradient is coded, once coding has begun."""
    if not dtype_of(param.dtype).floating or param.numel < config.min_elements:
        return False
    return config.vectors or len(param.shape) >= 2
